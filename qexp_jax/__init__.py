"""Differentially private fine-tuning by exact draws of an exponential mechanism with a quadratic utility.

`fine_tune` is the one call. Under it lie pure functions, a room each, every room knowing only those above it:

    arguments    numbers and options as callers give them
    keys         release keys from the system's entropy
    rounding     how far float32 arithmetic can be from real arithmetic
    integers     exact sums in two 32-bit words
    records      records and privacy units
    operations   what a trace says of a function
    convolutions convolutions as matrix products, for CPUs
    outer_products gradients of dense layers by their factors
    sketching    random projections made again from their keys
    subspace     public directions: lift R^k -> params, project params -> R^k
    gradients    projected gradients of single records
    curvature    public curvature P^T H P
    directions   where public gradients are large
    precision    the SPD precision H = R R^T as an operator: whiten, color, draw
    clipping     the private pass: whitened, clipped sums of stated sensitivity
    privacy      mu <-> (epsilon, delta), composition
    ledger       what all releases over one dataset have spent
    mechanism    quadratic utility and the exact draw
    hardened     the same in integers with exact discrete noise
    truncated    a Gaussian restricted to a ball
    pure         draws of pure epsilon
    accuracy     what the noise costs
    rule         every number that decides how a release moves a model
    flow         how far to follow the released gradients
    features     what public records look like, in few numbers
    weighting    public records weighted towards the private population
    isolation    that a loss keeps records apart
    validation   checks of public and static input
    survey       what public records say of the loss around the anchor
    plan         the public side of a release
    certificate  what is promised
    verification the promise derived from a certificate anew
    stream       data that does not fit in memory
    passes       the private pass over streams, devices and processes
    checkpoint   a release in progress on disk
    rounds       the rounds of a release
    tilting      that, before the rounds of a release
    preflight    its memory and arithmetic, before any data is read
    door         checks of what comes in
    tilt         that, for a training loop of one's own
    finetune     the one call
    audit        attained against claimed privacy
"""

from dp_accounting import NeighboringRelation

from qexp_jax import (
    accuracy,
    audit,
    clipping,
    curvature,
    features,
    flow,
    gradients,
    hardened,
    keys,
    ledger,
    mechanism,
    plan,
    precision,
    preflight,
    privacy,
    pure,
    records,
    subspace,
    tilt,
    truncated,
    verification,
    weighting,
)
from qexp_jax.checkpoint import Checkpoint
from qexp_jax.finetune import Release, fine_tune
from qexp_jax.keys import fresh_key
from qexp_jax.ledger import BudgetExceeded, Ledger
from qexp_jax.rounds import RoundInfo
from qexp_jax.stream import Stream
from qexp_jax.verification import verify

__version__ = "0.1.0"
__all__ = [
    "BudgetExceeded",
    "Checkpoint",
    "Ledger",
    "NeighboringRelation",
    "Release",
    "RoundInfo",
    "Stream",
    "accuracy",
    "audit",
    "clipping",
    "curvature",
    "features",
    "fine_tune",
    "flow",
    "fresh_key",
    "gradients",
    "hardened",
    "keys",
    "ledger",
    "mechanism",
    "plan",
    "precision",
    "preflight",
    "privacy",
    "pure",
    "records",
    "subspace",
    "tilt",
    "truncated",
    "verification",
    "verify",
    "weighting",
]
