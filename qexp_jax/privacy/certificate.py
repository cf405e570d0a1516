"""The certificate: what is promised, to whom, and on which assumptions; JSON-able and free of private values.

Its fields are those of one versioned schema. `verification.verify` derives the promise from them anew.
"""

import functools
import hashlib
import importlib.metadata
import re
from typing import Any

from qexp_jax.data import arguments
from qexp_jax.data.records import absorb
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.privacy import accounting
from qexp_jax.privacy.discrete import DiscreteNoise

SCHEMA = "qexp_jax/certificate/2"
NEIGHBORS = {
    NeighboringRelation.REPLACE_SPECIAL: "one unit's slot is emptied; the number of slots is public",
    NeighboringRelation.ADD_OR_REMOVE_ONE: "one unit is added or removed; the true number of units is private",
    NeighboringRelation.REPLACE_ONE: "one unit is replaced by another; the number of units is public",
}
_POST_PROCESSING = (
    "and one of a mean of features before them where the certificate has a tilt; anchor, preconditioner and step, and "
    "whether the budget left is split over more rounds, are functions of released sums"
)
MECHANISMS = {
    False: "exponential mechanism with quadratic utility: one exact multivariate normal draw a round, "
    + _POST_PROCESSING,
    True: "exponential mechanism with quadratic utility on an integer grid: one exact discrete Gaussian draw a round, "
    + _POST_PROCESSING,
}
ONE_RECORD = "one record"
ONE_ID = "all records with one unit id"
TILT_SCHEMA = "qexp_jax/tilt_certificate/1"
TILT_MECHANISM = (
    "exponential mechanism with quadratic utility: one exact multivariate normal draw of a mean of features; weights "
    "of public records are functions of it"
)
PRIVACY_UNITS = (ONE_RECORD, ONE_ID)
PRNG_IMPL = "threefry2x32"  # all noise is made by it
_NOT_INSTALLED = "not installed"  # run from a source tree
VERSIONS = re.compile(
    r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+([._-][a-z0-9]+)*)?|" + _NOT_INSTALLED
)
_STANDING_ASSUMPTIONS = (
    "No private unit contributed to the pretrained parameters, to feature statistics, to the public records or to any "
    "choice of settings made before.",
    "num_units, the cap on a unit's records (where none was given, the size of the largest unit), the length of a "
    "stream's pieces, the subspace, the features, the precisions, the clip norms and the settings are public.",
    "The curator who runs the mechanism is trusted and releases nothing else: no diagnostics, sums, keys or logs, nor "
    "how long it took.",
)
_HARDENED_ASSUMPTIONS = (
    "The program of one unit returns integers that depend on that unit and on public values alone; they are clipped, "
    "added and noised exactly, whatever floating point did before.",
    "The noise is OpenDP's exact discrete Gaussian; its random bits are a cryptographic generator's, seeded by the "
    "operating system, and taken for random.",
)
# Of the budget's epsilon: where the certificate says delta.
_CURVE = (0.25, 0.5, 1.0, 2.0, 4.0)


def assumptions(hardened: bool) -> list[str]:
    """In words."""
    if hardened:
        return [*_STANDING_ASSUMPTIONS, *_HARDENED_ASSUMPTIONS]
    return [
        *_STANDING_ASSUMPTIONS,
        "The key is secret, drawn from strong randomness and used for one release; computational DP, as strong as a "
        "64-bit threefry key.",
        "Ideal Gaussian noise: that of floating point has gaps, and is not hardened.",
        "What rounding adds to a unit's part is within the clip norm: a share is kept free for it, stated with each "
        "geometry, which assumes that matrix products add up at most 1024 terms at a time in float32, and that the "
        "gradient of a unit does not depend on the units beside it.",
    ]


def sha256_of(tree: Any) -> str:
    """Digest of a **public** pytree of arrays: paths, dtypes, shapes and bytes.

    Never of private values: a digest lets anyone test a guess of what was digested.
    """
    digest = hashlib.sha256()
    absorb(digest, tree)
    return digest.hexdigest()


def make_provenance(params: Any, public: Any, subspace_arrays: Any) -> dict[str, Any]:
    """Digests of the public inputs from which subspace, curvature and clip norm were made.

    Args:
      params: pretrained.
      public: the records that the plan read (`plan.looked_at`).
      subspace_arrays: the numbers of the subspace, as given, or None.
    """
    return {
        "anchor_sha256": sha256_of(params),
        "public_records_sha256": sha256_of(public),
        "subspace_sha256": None if subspace_arrays is None else sha256_of(subspace_arrays),
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
    plan: dict[str, Any],
    provenance: dict[str, Any],
    prng_impl: str,
    discrete_noise: DiscreteNoise | None = None,
    tilt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The dictionary that accompanies a release.

    Args:
      epsilon: the budget asked for.
      delta: the budget asked for.
      relation: neighbouring relation.
      num_units: public N.
      num_units_from: `"slots"` or `"public_count"`.
      unit: what one unit is, of `PRIVACY_UNITS`.
      noise_multiplier: z of each round.
      plan: what a certificate says of the public plan of the rounds, `plan_terms.terms`.
      provenance: of `make_provenance`.
      prng_impl: name of the noise's generator, `PRNG_IMPL`.
      discrete_noise: of a hardened release; `noise_multiplier` is its multiplier.
      tilt: of the draw before the rounds, with its `noise_multiplier`; None where there was none.
    """
    rounds = plan["rounds"]
    noise_multiplier = arguments.positive("noise_multiplier", noise_multiplier)
    hardened = discrete_noise is not None
    share = _share("gradient", noise_multiplier, relation, hardened)
    budget = [dict(share) for _ in range(rounds)]
    # The tilt comes first, as it is drawn before the rounds.
    if tilt is not None:
        budget.insert(0, _share("tilt", tilt["noise_multiplier"], relation, hardened))
    return {
        "schema": SCHEMA,
        "mechanism": MECHANISMS[hardened],
        "hardened": hardened,
        **_promise(epsilon, delta, relation, budget, hardened),
        **_neighbors(relation, unit, num_units, num_units_from),
        **plan,
        "mu_per_round": share["mu"],
        "noise_multiplier": noise_multiplier,
        "tilt": None if tilt is None else _of_tilt(tilt),
        "discrete_noise": None if discrete_noise is None else discrete_noise._asdict(),
        "provenance": provenance,
        "prng_impl": prng_impl,
        "assumptions": assumptions(hardened),
        "versions": _versions(),
    }


def make_tilt_certificate(
    *,
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    num_units: int,
    num_units_from: str,
    unit: str,
    public: Any,
    prng_impl: str,
    tilt: dict[str, Any],
) -> dict[str, Any]:
    """The dictionary that accompanies weights of `tilt.weights`: one draw, and no rounds.

    Args:
      epsilon: the budget asked for.
      delta: the budget asked for.
      relation: neighbouring relation.
      num_units: public N.
      num_units_from: `"slots"` or `"public_count"`.
      unit: what one unit is, of `PRIVACY_UNITS`.
      public: the public records, of which a digest is taken.
      prng_impl: name of the noise's generator, `PRNG_IMPL`.
      tilt: of the draw, with its `noise_multiplier`.
    """
    budget = [_share("tilt", tilt["noise_multiplier"], relation, False)]
    return {
        "schema": TILT_SCHEMA,
        "mechanism": TILT_MECHANISM,
        "hardened": False,
        **_promise(epsilon, delta, relation, budget, False),
        **_neighbors(relation, unit, num_units, num_units_from),
        "tilt": _of_tilt(tilt),
        "provenance": {"public_records_sha256": sha256_of(public)},
        "prng_impl": prng_impl,
        "assumptions": assumptions(False),
        "versions": _versions(),
    }


def _promise(
    epsilon: float, delta: float, relation: NeighboringRelation, budget: list[dict[str, Any]], hardened: bool
) -> dict[str, Any]:
    """The budget asked for, what its shares add up to, and the curve that follows."""
    epsilon, delta = accounting.check_budget(epsilon, delta)
    mu = accounting.compose([accounting.mu_from_noise(part["noise_multiplier"], relation) for part in budget])
    rho = accounting.zcdp_rho(mu)

    def point(epsilon: float) -> dict[str, float]:
        delta = accounting.delta_from_rho(rho, epsilon) if hardened else accounting.delta_from_mu(mu, epsilon)
        return {"epsilon": epsilon, "delta": delta}

    return {
        "epsilon": epsilon,
        "delta": delta,
        # Discrete Gaussian noise is not mu-GDP for the mu of its continuous twin.
        "mu": None if hardened else mu,
        "zcdp_rho": rho,
        "privacy_curve": [point(epsilon * factor) for factor in _CURVE],
        "budget": budget,
    }


def _neighbors(relation: NeighboringRelation, unit: str, num_units: int, num_units_from: str) -> dict[str, Any]:
    """Between which datasets the promise holds."""
    return {
        "neighboring_relation": relation.name,
        "neighbors": NEIGHBORS[relation],
        "privacy_unit": unit,
        "num_units": arguments.count("num_units", num_units),
        "num_units_from": num_units_from,
    }


def _of_tilt(tilt: dict[str, Any]) -> dict[str, Any]:
    """What the field says of a tilt; its noise multiplier stands in the budget."""
    return {name: x for name, x in tilt.items() if name != "noise_multiplier"}


def _share(purpose: str, noise_multiplier: float, relation: NeighboringRelation, hardened: bool) -> dict[str, Any]:
    """One draw's part of the budget."""
    mu = accounting.mu_from_noise(noise_multiplier, relation)
    return {
        "purpose": purpose,
        "noise_multiplier": noise_multiplier,
        "mu": None if hardened else mu,
        "zcdp_rho": accounting.zcdp_rho(mu),
    }


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("qexp_jax", "jax", "dp_accounting")}


@functools.cache  # a look into the file system
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NOT_INSTALLED
