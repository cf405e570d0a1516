"""Derives the promise of a certificate from its fields anew.

    fields       exactly those of the schema, of their types, finite
    shares       each share's mu and rho from its noise multiplier and the sensitivity of the relation
    composition  mu^2 = sum mu_t^2, rho = sum rho_t
    curve        delta(epsilon) from mu, exactly, or from rho where the release is hardened
    accountant   delta(epsilon) of dp_accounting from the noise multipliers alone: by its privacy loss distribution, or
                 by RDP where the release is hardened or delta below 1e-12
    words        texts and names that carry a promise are among those that this library writes

What it cannot check is in the certificate's assumptions: that the release was made as the certificate says.
"""

import collections
import functools
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from dp_accounting import NeighboringRelation, rdp
from dp_accounting.pld import privacy_loss_distribution as pld

from qexp_jax.privacy import accounting
from qexp_jax.privacy.certificate import (
    MECHANISMS,
    NEIGHBORS,
    PRIVACY_UNITS,
    PRNG_IMPL,
    SCHEMA,
    TILT_MECHANISM,
    TILT_SCHEMA,
    VERSIONS,
    assumptions,
)
from qexp_jax.privacy.discrete import INTEGER_CLIP_NORM
from qexp_jax.privacy.subspace_names import is_certified_name

_RELATIVE = 1e-9
_PLD_DELTA_FROM = 1e-12  # below, a privacy loss distribution is lost in the rounding of its convolutions
_CELLS_PER_MU, _MOST_CELLS = 1000, 1e6
_ORDERS = (1 + np.geomspace(1e-3, 1e10, 400)).tolist()
_SHARE_SENSITIVITY = {
    "gradient": accounting.sensitivity,
    "tilt": accounting.sensitivity,
}  # in units of the share's clip norm


class _Kind(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max  # JSON knows 10^400


def _is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)


def _one_of(values):
    return _Kind(f"one of {list(values)}", lambda x: isinstance(x, str) and x in values)


def _within(least, most):
    return _Kind(f"a number in [{least:g}, {most:g}]", lambda x: _is_number(x) and least <= x <= most)


_NOT_NEGATIVE = _Kind("a finite number >= 0", lambda x: _is_number(x) and x >= 0)
_POSITIVE = _Kind("a finite number > 0", lambda x: _is_number(x) and x > 0)
_PROBABILITY = _within(0, 1)
_SHARE = _within(0, 1 + 1e-6)  # of float32 numbers, which add up to one within their rounding
_POSITIVE_OR_NONE = _Kind("null or a finite number > 0", lambda x: x is None or (_is_number(x) and x > 0))
_ROUNDING = _Kind("a number in [0, 0.25)", lambda x: _is_number(x) and 0 <= x < 0.25)
_COUNT = _Kind("an integer in [1, 2^63)", lambda x: _is_integer(x) and 1 <= x < 2**63)
_TEXT = _Kind("a text", lambda x: isinstance(x, str) and x != "")
_SHA256 = _Kind("a SHA-256 digest", lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None)
_SHA256_OR_NONE = _Kind("null or a SHA-256 digest", lambda x: x is None or _SHA256.holds(x))
_SUBSPACE = _Kind("a name of a subspace of this library", lambda x: isinstance(x, str) and is_certified_name(x))
_VERSION = _Kind("the number of a version", lambda x: isinstance(x, str) and VERSIONS.fullmatch(x) is not None)
_FLAG = _Kind("true or false", lambda x: isinstance(x, bool))

_FIELDS: dict[str, Any] = {
    "schema": _Kind(repr(SCHEMA), lambda x: isinstance(x, str) and x == SCHEMA),
    "mechanism": _TEXT,
    "hardened": _FLAG,
    "epsilon": _within(*accounting.EPSILON_RANGE),
    "delta": _within(*accounting.DELTA_RANGE),
    "mu": _POSITIVE_OR_NONE,
    "zcdp_rho": _POSITIVE,
    "privacy_curve": [{"epsilon": _NOT_NEGATIVE, "delta": _PROBABILITY}],
    "budget": [
        {
            "purpose": _one_of(_SHARE_SENSITIVITY),
            "noise_multiplier": _POSITIVE,
            "mu": _POSITIVE_OR_NONE,
            "zcdp_rho": _POSITIVE,
        }
    ],
    "neighboring_relation": _one_of([relation.name for relation in NeighboringRelation]),
    "neighbors": _TEXT,
    "privacy_unit": _one_of(PRIVACY_UNITS),
    "num_units": _COUNT,
    "num_units_from": _one_of(["slots", "public_count"]),
    "rounds": _COUNT,
    "most_rounds": _COUNT,
    "mu_per_round": _POSITIVE_OR_NONE,
    "noise_multiplier": _POSITIVE,
    "tilt": _Kind("null or a mapping", lambda x: x is None or isinstance(x, dict)),
    "geometries": [{"tuned_dim": _COUNT, "l2_clip_norm": _POSITIVE, "rounding": _ROUNDING}],
    "discrete_noise": _Kind("null or a mapping", lambda x: x is None or isinstance(x, dict)),
    "subspace": _SUBSPACE,
    "subspace_dim": _COUNT,
    "precision_rank": _COUNT,
    "damping": _POSITIVE,
    "expected_excess_loss_per_round": _NOT_NEGATIVE,
    "public_evidence": {
        "largest_curvature": _POSITIVE,
        "leading_share_of_energy": _SHARE,
        "tolerated_noise": _POSITIVE,
        "longest_length": _NOT_NEGATIVE,
        "tuned_at_first": _COUNT,
        "public_fraction_clipped": _SHARE,
        "clipping_bias_in_clip_norms": _NOT_NEGATIVE,
    },
    "provenance": {"anchor_sha256": _SHA256, "public_records_sha256": _SHA256, "subspace_sha256": _SHA256_OR_NONE},
    "dtype": _one_of(["float32", "float64"]),
    "prng_impl": _one_of([PRNG_IMPL]),
    "assumptions": [_TEXT],
    "versions": {"qexp_jax": _VERSION, "jax": _VERSION, "dp_accounting": _VERSION},
}
_TILT = {
    "features": _one_of(["default", "given"]),
    "num_axes": _COUNT,
    "l2_clip_norm": _POSITIVE,
    "rounding": _ROUNDING,
    "accepted": _FLAG,
    "effective_sample_size": _SHARE,
    "training_steps": _Kind("an integer >= 0", lambda x: _is_integer(x) and 0 <= x < 2**63),
}
_OF_ROUNDS = (
    "rounds", "most_rounds", "mu_per_round", "noise_multiplier", "geometries", "discrete_noise", "subspace",
    "subspace_dim", "precision_rank", "damping", "expected_excess_loss_per_round", "public_evidence", "dtype",
)  # fmt: skip
_TILT_FIELDS = {name: kind for name, kind in _FIELDS.items() if name not in _OF_ROUNDS} | {
    "schema": _one_of([TILT_SCHEMA]),
    "hardened": _Kind("false", lambda x: x is False),
    "tilt": _TILT,
    "provenance": {"public_records_sha256": _SHA256},
}
_DISCRETE_NOISE = {"l2_clip_norm": _COUNT, "scale": _COUNT}


def verify(certificate: dict[str, Any]) -> None:
    """Checks a certificate against itself, against this library's formulas and against dp_accounting.

    Args:
      certificate: of a `Release`, or read back from JSON.

    Raises:
      ValueError: naming the first field that is missing, unknown, of another type, not finite, or inconsistent with
        the others.

    Takes a fraction of a second.

    References:
      Dong, Roth and Su, arXiv:1905.02383 (mu-GDP); Canonne, Kamath and Steinke, arXiv:2004.00010 (the discrete
      Gaussian).
    """
    is_tilt = isinstance(certificate, dict) and certificate.get("schema") == TILT_SCHEMA
    _conform(certificate, _TILT_FIELDS if is_tilt else _FIELDS, "certificate")
    relation = NeighboringRelation[certificate["neighboring_relation"]]
    _check_words(certificate, relation)
    _check_tilt(certificate)
    if not is_tilt:
        _check_counts(certificate)
    _check_shares(certificate, relation)
    if not is_tilt:
        _check_discrete_noise(certificate)
    _check_total(certificate)
    _check_accountant(certificate, relation)


def _conform(value, expected, field):
    if isinstance(expected, _Kind):
        if not expected.holds(value):
            raise ValueError(f"Certificate field {field!r}: expected {expected.words}, found {value!r}.")
    elif isinstance(expected, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"Certificate field {field!r}: expected a list of at least one entry, found {value!r}.")
        for i, entry in enumerate(value):
            _conform(entry, expected[0], f"{field}[{i}]")
    else:
        if not isinstance(value, dict):
            raise ValueError(f"Certificate field {field!r}: expected a mapping, found {type(value).__name__}.")
        for name in set(expected) ^ set(value):
            wrong = "missing" if name in expected else "unknown"
            raise ValueError(f"Certificate field {name!r} of {field!r} is {wrong}.")
        for name, inner in expected.items():
            _conform(value[name], inner, name if field == "certificate" else f"{field}.{name}")


def _expect(field, found, expected, relative=_RELATIVE):
    same = math.isclose(found, expected, rel_tol=relative) if _is_number(expected) and _is_number(found) else False
    if not (same or (type(found) is type(expected) and found == expected)):
        raise ValueError(f"Certificate field {field!r}: expected {expected!r} from the other fields, found {found!r}.")


def _check_words(certificate, relation):
    _expect("neighbors", certificate["neighbors"], NEIGHBORS[relation])
    is_tilt = certificate["schema"] == TILT_SCHEMA
    _expect("mechanism", certificate["mechanism"], TILT_MECHANISM if is_tilt else MECHANISMS[certificate["hardened"]])
    _expect("assumptions", certificate["assumptions"], assumptions(certificate["hardened"]))
    if relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        _expect("num_units_from", certificate["num_units_from"], "public_count")


def _check_counts(certificate):
    _expect("rounds", certificate["rounds"], len([s for s in certificate["budget"] if s["purpose"] == "gradient"]))
    if certificate["most_rounds"] < certificate["rounds"]:
        raise ValueError(
            f"Certificate field 'most_rounds': expected at least rounds={certificate['rounds']}, "
            f"found {certificate['most_rounds']}."
        )
    if certificate["precision_rank"] > certificate["subspace_dim"]:
        raise ValueError(
            f"Certificate field 'precision_rank': expected at most subspace_dim={certificate['subspace_dim']}, "
            f"found {certificate['precision_rank']}."
        )
    dims = sorted({certificate["subspace_dim"], certificate["precision_rank"]}, reverse=True)
    _expect("geometries.tuned_dim", [geometry["tuned_dim"] for geometry in certificate["geometries"]], dims)
    tuned = [geometry["tuned_dim"] for geometry in certificate["geometries"]]
    first = certificate["public_evidence"]["tuned_at_first"]
    if first not in tuned:
        raise ValueError(f"Certificate field 'public_evidence.tuned_at_first': expected one of {tuned}, found {first}.")


def _check_tilt(certificate):
    """A tilt has one draw, before the rounds, if there are any, which train where it was accepted."""
    tilt, purposes = certificate["tilt"], [share["purpose"] for share in certificate["budget"]]
    rounds = certificate.get("rounds", 0)
    _expect("budget.purpose", purposes, ["tilt"] * (tilt is not None) + ["gradient"] * rounds)
    if tilt is None:
        return
    _conform(tilt, _TILT, "tilt")
    if not tilt["accepted"]:
        _expect("tilt.effective_sample_size", tilt["effective_sample_size"], 1.0)
    trained = tilt["training_steps"] > 0
    if trained != (tilt["accepted"] and rounds > 0):
        raise ValueError(f"Certificate field 'tilt.accepted': expected training steps with it, found {tilt!r}.")


def _check_shares(certificate, relation):
    for i, share in enumerate(certificate["budget"]):
        mu = _SHARE_SENSITIVITY[share["purpose"]](1.0, relation) / share["noise_multiplier"]
        _expect(f"budget[{i}].mu", share["mu"], None if certificate["hardened"] else mu)
        _expect(f"budget[{i}].zcdp_rho", share["zcdp_rho"], mu**2 / 2)
        if share["purpose"] == "gradient":
            _expect(f"budget[{i}].noise_multiplier", share["noise_multiplier"], certificate["noise_multiplier"])
            _expect("mu_per_round", certificate["mu_per_round"], share["mu"])


def _check_discrete_noise(certificate):
    noise = certificate["discrete_noise"]
    if not certificate["hardened"]:
        return _expect("discrete_noise", noise, None)
    _conform(noise, _DISCRETE_NOISE, "discrete_noise")
    _expect("discrete_noise.l2_clip_norm", noise["l2_clip_norm"], INTEGER_CLIP_NORM)
    _expect("discrete_noise.scale", noise["scale"] / noise["l2_clip_norm"], certificate["noise_multiplier"])
    for i, share in enumerate(certificate["budget"]):
        steps = share["noise_multiplier"] * noise["l2_clip_norm"]
        _expect(f"budget[{i}].noise_multiplier", steps, float(round(steps)))


def _check_total(certificate):
    shares, hardened = certificate["budget"], certificate["hardened"]
    rho = math.fsum(share["zcdp_rho"] for share in shares)
    _expect("zcdp_rho", certificate["zcdp_rho"], rho)
    _expect("mu", certificate["mu"], None if hardened else accounting.compose([share["mu"] for share in shares]))
    delta_from, parameter = (
        (accounting.delta_from_rho, rho) if hardened else (accounting.delta_from_mu, certificate["mu"])
    )
    for i, point in enumerate(certificate["privacy_curve"]):
        _expect(f"privacy_curve[{i}].delta", point["delta"], delta_from(parameter, point["epsilon"]), relative=1e-7)
    epsilon, asked = certificate["epsilon"], certificate["delta"]
    delta, wasteful = delta_from(parameter, epsilon), delta_from(parameter * _slack(certificate), epsilon) <= asked
    if delta > asked * (1 + _RELATIVE) or wasteful:
        raise ValueError(f"Certificate field 'delta': expected {delta!r} at its epsilon, found {asked!r}.")


def _slack(certificate):
    """By how much mu or rho may stay below the budget: rounding, and steps of the integer scale."""
    if not certificate["hardened"]:
        return 1 + 1e-6
    scale = certificate["discrete_noise"]["scale"]
    return (scale / (scale - 2)) ** 2 if scale > 2 else 1e200


def _check_accountant(certificate, relation):
    """dp_accounting on the noise multipliers alone, at the certificate's epsilon."""
    mus = [_SHARE_SENSITIVITY[s["purpose"]](1.0, relation) / s["noise_multiplier"] for s in certificate["budget"]]
    epsilon, delta = certificate["epsilon"], certificate["delta"]
    if certificate["hardened"]:
        least = 0.85 * _delta_of_rdp(mus, epsilon)  # up to a tenth above the least over all orders
    elif delta >= _PLD_DELTA_FROM:
        least = 0.99 * _least_delta_of_pld(mus, epsilon)
    else:
        least = 0.02 * _delta_of_rdp(mus, epsilon)  # up to 25 times the exact one of a Gaussian
    if delta < least:
        raise ValueError(f"Certificate field 'delta': dp_accounting finds at least {least!r}, found {delta!r}.")


def _delta_of_rdp(mus, epsilon):
    """An upper bound, of orders a tenth apart."""
    accountant = rdp.RdpAccountant(_ORDERS).compose(accounting.zcdp_event(mu**2 / 2 for mu in mus))
    return float(accountant.get_delta(epsilon))


def _least_delta_of_pld(mus, epsilon):
    """A lower bound, by up to a tenth for 300 rounds: losses are rounded down to cells, small beside a share's mu."""
    cell = max(max(mus) / _CELLS_PER_MU, 20 * accounting.compose(mus) / _MOST_CELLS)
    distributions = [
        pld.from_gaussian_mechanism(
            1 / mu,
            pessimistic_estimate=False,
            value_discretization_interval=cell,
            use_connect_dots=False,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        ).self_compose(times)
        for mu, times in collections.Counter(mus).items()
    ]
    total = functools.reduce(lambda one, other: one.compose(other), distributions)
    return float(total.get_delta_for_epsilon(epsilon))
