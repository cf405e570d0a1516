"""What a certificate says of a plan, in numbers that JSON knows."""

from typing import Any

import numpy as np

from qexp_jax.data import arguments
from qexp_jax.model.subspace import certified_name
from qexp_jax.quadratic.plan import Plan


def terms(plan: Plan, roundings: list[float]) -> dict[str, Any]:
    """What a certificate says of a plan.

    Args:
      plan: public.
      roundings: of each preconditioner, the share of the clip norm kept for what rounding adds (`clipping.rounding`).
    """
    return {
        "rounds": arguments.count("rounds", plan.rounds),
        "most_rounds": arguments.count("most_rounds", plan.most_rounds),
        "geometries": _certified(plan, roundings),
        "subspace": certified_name(plan.subspace),
        "subspace_dim": round(float(np.sum(np.asarray(plan.estimate.dims)))),
        "precision_rank": len(plan.estimate.directions),
        "damping": arguments.real("damping", plan.damping),
        "expected_excess_loss_per_round": arguments.real("expected_cost", plan.expected_cost),
        "public_evidence": {name: _plain(name, value) for name, value in plan.evidence.items()},
        "dtype": str(plan.subspace.layout.dtype),
    }


def _certified(plan: Plan, roundings: list[float]) -> list[dict[str, Any]]:
    """How many dimensions each tunes, C, and the share of C that holds what rounding adds to a unit's part."""
    tuned = np.asarray(plan.preconditioners.tuned, np.float64)
    dims = np.asarray(plan.estimate.dims, np.float64)
    clip_norms = np.asarray(plan.preconditioners.l2_clip_norm)
    return [
        {"tuned_dim": round(tuned_dim), "l2_clip_norm": float(clip_norm), "rounding": float(rounding)}
        for tuned_dim, clip_norm, rounding in zip(tuned @ dims, clip_norms, roundings, strict=True)
    ]


def _plain(name: str, value: Any) -> int | float:
    """As JSON knows numbers: whatever scalar the plan made it."""
    is_integer = np.asarray(value).dtype.kind in "iu"
    return int(value) if is_integer else arguments.real(name, value)
