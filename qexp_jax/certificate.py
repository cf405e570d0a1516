"""The certificate: what is promised, to whom, and on which assumptions; JSON-able and free of private values.

Its fields are those of one versioned schema. `verification.verify` derives the promise from them anew.
"""

import functools
import hashlib
import importlib.metadata
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation

from qexp_jax import privacy
from qexp_jax.hardened import DiscreteNoise
from qexp_jax.plan import Plan
from qexp_jax.records import absorb
from qexp_jax.subspace import Subspace

SCHEMA = "qexp_jax/certificate/1"
NEIGHBORS = {
    NeighboringRelation.REPLACE_SPECIAL: "one unit's slot is emptied; the number of slots is public",
    NeighboringRelation.ADD_OR_REMOVE_ONE: "one unit is added or removed; the true number of units is private",
    NeighboringRelation.REPLACE_ONE: "one unit is replaced by another; the number of units is public",
}
MECHANISMS = {
    False: "exponential mechanism with quadratic utility: one exact multivariate normal draw a round; geometry and "
    "step, and whether the budget left is split over more rounds, are functions of released sums",
    True: "exponential mechanism with quadratic utility on an integer grid: one exact discrete Gaussian draw a round; "
    "geometry and step, and whether the budget left is split over more rounds, are functions of released sums",
}
_STANDING_ASSUMPTIONS = (
    "No private unit contributed to the pretrained parameters, to feature statistics, to the public records or to any "
    "choice of settings made before.",
    "num_units, the subspace, the precisions, the clip norms and the settings are public.",
    "The curator who runs the mechanism is trusted and releases nothing else: no diagnostics, sums, keys or logs.",
)
_HARDENED_ASSUMPTIONS = (
    "The program of one unit returns integers that depend on that unit and on public values alone; they are clipped, "
    "added and noised exactly, whatever floating point did before.",
    "The noise is OpenDP's exact discrete Gaussian; its random bits are a cryptographic generator's, seeded by the "
    "operating system, and taken for random. How long the release takes is not hidden.",
)
_CURVE = (0.25, 0.5, 1.0, 2.0, 4.0)


def assumptions(hardened: bool, prng_impl: str) -> list[str]:
    """In words."""
    if hardened:
        return [*_STANDING_ASSUMPTIONS, *_HARDENED_ASSUMPTIONS]
    bits = "64-bit threefry" if prng_impl == "threefry2x32" else prng_impl
    return [
        *_STANDING_ASSUMPTIONS,
        "The key is secret, drawn from strong randomness and used for one release; computational DP, as strong as a "
        f"{bits} key.",
        "Idealised numerics: real arithmetic and ideal Gaussian noise; floating-point noise is not hardened.",
    ]


def sha256_of(tree: Any) -> str:
    """Digest of a **public** pytree of arrays: paths, dtypes, shapes and bytes.

    Never of private values: a digest lets anyone test a guess of what was digested.
    """
    digest = hashlib.sha256()
    absorb(digest, tree)
    return digest.hexdigest()


def make_provenance(params: Any, public: Any, subspace: Subspace | None) -> dict[str, Any]:
    """Digests of the public inputs from which subspace, curvature and clip norm were made.

    Args:
      params: the anchor.
      public: the records that the plan read (`plan.looked_at`).
      subspace: as given.
    """
    return {
        "anchor_sha256": sha256_of(params),
        "public_records_sha256": sha256_of(public),
        "subspace_sha256": None if subspace is None else sha256_of(subspace.arrays),
    }


def make_certificate(
    *,
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    num_units: int,
    num_units_from: str,
    unit: str,
    noise_multiplier: float,
    plan: Plan,
    provenance: dict[str, Any],
    prng_impl: str,
    discrete_noise: DiscreteNoise | None = None,
) -> dict[str, Any]:
    """The dictionary that accompanies a release.

    Args:
      epsilon: the budget asked for.
      delta: the budget asked for.
      relation: neighbouring relation.
      num_units: public N.
      num_units_from: `"slots"` or `"public_count"`.
      unit: what one unit is, in words.
      noise_multiplier: z of each round.
      plan: public plan of the rounds.
      provenance: of `make_provenance`.
      prng_impl: name of the key's generator.
      discrete_noise: of a hardened release; `noise_multiplier` is its multiplier.
    """
    hardened, dim = discrete_noise is not None, plan.subspace.dim
    mu_per_round = privacy.mu_from_noise(noise_multiplier, relation)
    mu = privacy.compose([mu_per_round] * plan.rounds)
    rho_per_round, rho = privacy.zcdp_rho(mu_per_round), privacy.zcdp_rho(mu)
    share = {
        "purpose": "gradient",
        "noise_multiplier": noise_multiplier,
        "mu": None if hardened else mu_per_round,
        "zcdp_rho": rho_per_round,
    }
    return {
        "schema": SCHEMA,
        "mechanism": MECHANISMS[hardened],
        "hardened": hardened,
        "epsilon": float(epsilon),
        "delta": float(delta),
        "mu": None if hardened else mu,
        "zcdp_rho": rho,
        "privacy_curve": [
            {"epsilon": e, "delta": privacy.delta_from_rho(rho, e) if hardened else privacy.delta_from_mu(mu, e)}
            for e in (float(epsilon) * factor for factor in _CURVE)
        ],
        "budget": [dict(share) for _ in range(plan.rounds)],
        "neighboring_relation": relation.name,
        "neighbors": NEIGHBORS[relation],
        "privacy_unit": unit,
        "num_units": num_units,
        "num_units_from": num_units_from,
        "rounds": plan.rounds,
        "most_rounds": plan.most_rounds,
        "mu_per_round": share["mu"],
        "noise_multiplier": noise_multiplier,
        "geometries": _geometries(plan),
        "discrete_noise": None if discrete_noise is None else discrete_noise._asdict(),
        "subspace": plan.subspace.name,
        "subspace_dim": dim,
        "precision_rank": len(plan.spectrum.directions),
        "damping": float(plan.damping),
        "expected_excess_loss_per_round": plan.expected_cost,
        "public_evidence": dict(plan.evidence),
        "provenance": provenance,
        "dtype": str(plan.subspace.layout.dtype),
        "prng_impl": prng_impl,
        "assumptions": assumptions(hardened, prng_impl),
        "versions": _versions(),
    }


def _geometries(plan):
    """How many dimensions each tunes, and C."""
    tuned = np.asarray(plan.geometries.tuned, np.float64) @ np.asarray(plan.spectrum.dims, np.float64)
    norms = np.asarray(plan.geometries.l2_clip_norm)
    return [{"tuned_dim": round(t), "l2_clip_norm": float(c)} for t, c in zip(tuned, norms, strict=True)]


def _versions():
    return {name: _version(name) for name in ("qexp_jax", "jax", "dp_accounting")}


@functools.cache
def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"
