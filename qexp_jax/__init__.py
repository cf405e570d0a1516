"""Differentially private fine-tuning by exact draws of an exponential mechanism with a quadratic utility.

`fine_tune` is the one call. Under it lie pure functions, a room each, every room knowing only those above it:

    records      records and privacy units
    subspace     public directions: lift R^k -> params, project params -> R^k
    convolutions convolutions as matrix products, for CPUs
    gradients    projected gradients of single records
    curvature    public curvature P^T H P
    precision    the SPD precision H = R R^T as an operator: whiten, color, draw
    clipping     the private pass: whitened, clipped sums of stated sensitivity
    privacy      mu <-> (epsilon, delta), composition
    mechanism    quadratic utility and the exact draw
    accuracy     what the noise costs
    flow         how far to follow the released gradients
    validation   checks of public and static input
    plan         the public side of a release
    certificate  what is promised
    finetune     the one call
"""

from dp_accounting import NeighboringRelation

from qexp_jax import (
    accuracy,
    clipping,
    curvature,
    flow,
    gradients,
    mechanism,
    plan,
    precision,
    privacy,
    records,
    subspace,
)
from qexp_jax.finetune import Release, RoundInfo, fine_tune

__version__ = "0.1.0"
__all__ = [
    "NeighboringRelation",
    "Release",
    "RoundInfo",
    "accuracy",
    "clipping",
    "curvature",
    "fine_tune",
    "flow",
    "gradients",
    "mechanism",
    "plan",
    "precision",
    "privacy",
    "records",
    "subspace",
]
