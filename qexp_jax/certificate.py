"""The certificate: what is promised, to whom, and on which assumptions; JSON-able and free of private values."""

from typing import Any

import jax
from dp_accounting import NeighboringRelation

from qexp_jax import accuracy, privacy
from qexp_jax.plan import Plan

_ASSUMPTIONS = (
    "No private unit contributed to the pretrained parameters, to feature statistics, to the public records or to any "
    "choice of settings made before.",
    "num_units, the subspace, the precision, the clip norm and the settings are public.",
    "The curator who runs the mechanism is trusted and releases nothing else: no diagnostics, sums, keys or logs.",
    "The key is secret, drawn from strong randomness and used for one release; computational DP, 64-bit threefry key.",
    "Idealised numerics: real arithmetic and ideal Gaussian noise; floating-point noise is not hardened.",
)
_NEIGHBOURS = {
    NeighboringRelation.REPLACE_SPECIAL: "one unit's slot is emptied; the number of slots is public",
    NeighboringRelation.ADD_OR_REMOVE_ONE: "one unit is added or removed; the true number of units is private",
    NeighboringRelation.REPLACE_ONE: "one unit is replaced by another; the number of units is public",
}


def make_certificate(
    *,
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    num_units: int,
    unit: str,
    noise_multiplier: float,
    plan: Plan,
) -> dict[str, Any]:
    """The dictionary that accompanies a release.

    Args:
      epsilon: the budget asked for.
      delta: the budget asked for.
      relation: neighbouring relation.
      num_units: public N.
      unit: what one unit is, in words.
      noise_multiplier: z of each round.
      plan: public plan of the rounds.
    """
    mus = [privacy.mu_from_noise(noise_multiplier, relation)] * plan.rounds
    mu, dim = privacy.compose(mus), plan.subspace.dim
    excess = plan.expected_step * accuracy.expected_excess(dim, plan.l2_clip_norm * noise_multiplier, num_units)
    return {
        "mechanism": "exponential mechanism with quadratic utility: one exact multivariate normal draw a round; the "
        "step is a function of released sums",
        "epsilon": epsilon,
        "delta": delta,
        "mu": mu,
        "zcdp_rho": privacy.zcdp_rho(mu),
        "neighboring_relation": relation.name,
        "neighbors": _NEIGHBOURS[relation],
        "privacy_unit": unit,
        "num_units": num_units,
        "rounds": plan.rounds,
        "mu_per_round": mus[0],
        "noise_multiplier": noise_multiplier,
        "l2_clip_norm": plan.l2_clip_norm,
        "subspace": plan.subspace.name,
        "subspace_dim": dim,
        "precision_rank": len(plan.precision.arrays[2]),
        "damping": plan.damping,
        "expected_excess_loss_per_round": excess,
        "public_evidence": dict(plan.evidence),
        "assumptions": list(_ASSUMPTIONS),
        "jax_version": jax.__version__,
    }
