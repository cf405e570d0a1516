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
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.privacy import accounting
from qexp_jax.privacy.certificate import MECHANISMS, NEIGHBORS, TILT_MECHANISM, TILT_SCHEMA, assumptions
from qexp_jax.privacy.certificate_fields import (
    DISCRETE_NOISE,
    FIELDS,
    SHARE_SENSITIVITY,
    TILT,
    TILT_FIELDS,
    conform,
    is_number,
)
from qexp_jax.privacy.discrete import INTEGER_CLIP_NORM

_RELATIVE = 1e-9
_PLD_DELTA_FROM = 1e-12  # below, a privacy loss distribution is lost in the rounding of its convolutions
# Of the privacy loss distributions: how fine a share's is, and how long that of all of them may become.
_CELLS_PER_MU = 1000
_MOST_CELLS = 1e6
# Of RDP: the best one is near 1 for a large epsilon and far from it for a small one.
_ORDERS = (1 + np.geomspace(1e-3, 1e10, 400)).tolist()


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
    conform(certificate, TILT_FIELDS if is_tilt else FIELDS, "certificate")
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


def _expect(field: str, found: Any, expected: Any, relative: float = _RELATIVE) -> None:
    """Raises ValueError unless two numbers agree but for rounding, and anything else is of one type and equal.

    Args:
      field: its name, for the error.
      found: in the certificate.
      expected: from the other fields.
      relative: tolerance of numbers.
    """
    # To Python True equals 1, so that what is not a number must be of the same type too.
    are_numbers = is_number(expected) and is_number(found)
    is_close = are_numbers and math.isclose(found, expected, rel_tol=relative)
    is_same = type(found) is type(expected) and found == expected
    if not (is_close or is_same):
        raise ValueError(f"Certificate field {field!r}: expected {expected!r} from the other fields, found {found!r}.")


def _check_words(certificate: dict[str, Any], relation: NeighboringRelation) -> None:
    _expect("neighbors", certificate["neighbors"], NEIGHBORS[relation])
    is_tilt = certificate["schema"] == TILT_SCHEMA
    mechanism = TILT_MECHANISM if is_tilt else MECHANISMS[certificate["hardened"]]
    _expect("mechanism", certificate["mechanism"], mechanism)
    _expect("assumptions", certificate["assumptions"], assumptions(certificate["hardened"]))
    if relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        _expect("num_units_from", certificate["num_units_from"], "public_count")


def _check_counts(certificate: dict[str, Any]) -> None:
    # Counted from the budget: the number of rounds is what was paid for.
    shares_of_rounds = [share for share in certificate["budget"] if share["purpose"] == "gradient"]
    _expect("rounds", certificate["rounds"], len(shares_of_rounds))
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
    # A round tunes either everything or the leading directions alone, which may be the same.
    dims = sorted({certificate["subspace_dim"], certificate["precision_rank"]}, reverse=True)
    tuned = [geometry["tuned_dim"] for geometry in certificate["geometries"]]
    _expect("geometries.tuned_dim", tuned, dims)
    first = certificate["public_evidence"]["tuned_at_first"]
    if first not in tuned:
        raise ValueError(f"Certificate field 'public_evidence.tuned_at_first': expected one of {tuned}, found {first}.")


def _check_tilt(certificate: dict[str, Any]) -> None:
    """A tilt has one draw, before the rounds, if there are any, which train where it was accepted."""
    tilt = certificate["tilt"]
    purposes = [share["purpose"] for share in certificate["budget"]]
    rounds = certificate.get("rounds", 0)
    _expect("budget.purpose", purposes, ["tilt"] * (tilt is not None) + ["gradient"] * rounds)
    if tilt is None:
        return
    conform(tilt, TILT, "tilt")
    if not tilt["accepted"]:
        _expect("tilt.effective_sample_size", tilt["effective_sample_size"], 1.0)
    trained = tilt["training_steps"] > 0
    if trained != (tilt["accepted"] and rounds > 0):
        raise ValueError(f"Certificate field 'tilt.accepted': expected training steps with it, found {tilt!r}.")


def _check_shares(certificate: dict[str, Any], relation: NeighboringRelation) -> None:
    for i, share in enumerate(certificate["budget"]):
        mu = SHARE_SENSITIVITY[share["purpose"]](1.0, relation) / share["noise_multiplier"]
        _expect(f"budget[{i}].mu", share["mu"], None if certificate["hardened"] else mu)
        _expect(f"budget[{i}].zcdp_rho", share["zcdp_rho"], mu**2 / 2)
        if share["purpose"] == "gradient":
            _expect(f"budget[{i}].noise_multiplier", share["noise_multiplier"], certificate["noise_multiplier"])
            _expect("mu_per_round", certificate["mu_per_round"], share["mu"])


def _check_discrete_noise(certificate: dict[str, Any]) -> None:
    noise = certificate["discrete_noise"]
    if not certificate["hardened"]:
        _expect("discrete_noise", noise, None)
        return
    conform(noise, DISCRETE_NOISE, "discrete_noise")
    _expect("discrete_noise.l2_clip_norm", noise["l2_clip_norm"], INTEGER_CLIP_NORM)
    _expect("discrete_noise.scale", noise["scale"] / noise["l2_clip_norm"], certificate["noise_multiplier"])
    # The sampler takes a scale in whole steps, for the tilt's draw as for those of the rounds.
    for i, share in enumerate(certificate["budget"]):
        steps = share["noise_multiplier"] * noise["l2_clip_norm"]
        _expect(f"budget[{i}].noise_multiplier", steps, float(round(steps)))


def _check_total(certificate: dict[str, Any]) -> None:
    shares = certificate["budget"]
    hardened = certificate["hardened"]
    rho = math.fsum(share["zcdp_rho"] for share in shares)
    _expect("zcdp_rho", certificate["zcdp_rho"], rho)
    _expect("mu", certificate["mu"], None if hardened else accounting.compose([share["mu"] for share in shares]))
    delta_from: Callable[[float, float], float] = accounting.delta_from_rho if hardened else accounting.delta_from_mu
    parameter = rho if hardened else certificate["mu"]
    for i, point in enumerate(certificate["privacy_curve"]):
        _expect(f"privacy_curve[{i}].delta", point["delta"], delta_from(parameter, point["epsilon"]), relative=1e-7)
    epsilon = certificate["epsilon"]
    asked = certificate["delta"]
    delta = delta_from(parameter, epsilon)
    # A promise that is far weaker than what was paid for is no lie, but not what this library would have made either.
    is_wasteful = delta_from(parameter * _slack(certificate), epsilon) <= asked
    if delta > asked * (1 + _RELATIVE) or is_wasteful:
        raise ValueError(f"Certificate field 'delta': expected {delta!r} at its epsilon, found {asked!r}.")


def _slack(certificate: dict[str, Any]) -> float:
    """By how much mu or rho may stay below the budget: rounding, and steps of the integer scale."""
    if not certificate["hardened"]:
        return 1 + 1e-6
    scale = certificate["discrete_noise"]["scale"]
    # Of so coarse a scale the next smaller one says nothing: any budget is then well spent.
    return (scale / (scale - 2)) ** 2 if scale > 2 else 1e200


def _check_accountant(certificate: dict[str, Any], relation: NeighboringRelation) -> None:
    """dp_accounting on the noise multipliers alone, at the certificate's epsilon."""
    mus = [SHARE_SENSITIVITY[s["purpose"]](1.0, relation) / s["noise_multiplier"] for s in certificate["budget"]]
    epsilon = certificate["epsilon"]
    delta = certificate["delta"]
    if certificate["hardened"]:
        least = 0.85 * _delta_of_rdp(mus, epsilon)  # up to a tenth above the least over all orders
    elif delta >= _PLD_DELTA_FROM:
        least = 0.99 * _least_delta_of_pld(mus, epsilon)
    else:
        least = 0.02 * _delta_of_rdp(mus, epsilon)  # up to 25 times the exact one of a Gaussian
    if delta < least:
        raise ValueError(f"Certificate field 'delta': dp_accounting finds at least {least!r}, found {delta!r}.")


def _delta_of_rdp(mus: Iterable[float], epsilon: float) -> float:
    """An upper bound, of orders a tenth apart."""
    from dp_accounting import rdp  # slow to import

    accountant = rdp.RdpAccountant(_ORDERS).compose(accounting.zcdp_event(mu**2 / 2 for mu in mus))
    return float(accountant.get_delta(epsilon))


def _least_delta_of_pld(mus: list[float], epsilon: float) -> float:
    """A lower bound, by up to a tenth for 300 rounds: losses are rounded down to cells, small beside a share's mu."""
    # Slow to import.
    from dp_accounting import NeighboringRelation as Relation
    from dp_accounting.pld import privacy_loss_distribution as pld

    cell = max(max(mus) / _CELLS_PER_MU, 20 * accounting.compose(mus) / _MOST_CELLS)
    distributions = [
        pld.from_gaussian_mechanism(
            1 / mu,
            pessimistic_estimate=False,
            value_discretization_interval=cell,
            use_connect_dots=False,
            neighboring_relation=Relation.ADD_OR_REMOVE_ONE,
        ).self_compose(times)
        for mu, times in collections.Counter(mus).items()
    ]
    total = functools.reduce(lambda one, other: one.compose(other), distributions)
    return float(total.get_delta_for_epsilon(epsilon))
