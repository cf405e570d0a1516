"""Privacy arithmetic on the host: Gaussian differential privacy, exact, and composition by dp_accounting.

A release of `S + C z xi` is a Gaussian mechanism of sensitivity Delta and standard deviation C z, hence exactly mu-GDP
with `mu = Delta / (C z)` (Dong, Roth and Su, arXiv:1905.02383), and

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

(Balle and Wang, arXiv:1805.06530). Releases on the same data compose to `mu^2 = sum mu_t^2`; zero-concentrated DP holds
with `rho = mu^2 / 2` (Bun and Steinke, arXiv:1605.02065). Here mu already contains the sensitivity of the relation, so
its dp_accounting event is always `GaussianDpEvent(1/mu)` under ADD_OR_REMOVE_ONE; the true relation is recorded
beside it (under REPLACE_ONE an accountant would double the sensitivity again).

Discrete Gaussian noise is not mu-GDP for the mu of its continuous twin, but it is rho-zCDP for the same rho. That is
converted by the best conversion known (Canonne, Kamath and Steinke, arXiv:2004.00010, Proposition 12), which asks for
about a tenth more noise than the exact conversion of mu.

**Range.** Budgets have epsilon in [1e-4, 1e4] and delta in [1e-30, 0.999]. There delta(epsilon) is exact to a relative
2e-13 and conversions round towards more noise, as `tests/test_privacy.py` checks with 50 digits. Beyond, a promise is
empty or lost in the rounding of what verifies it. Numbers may be scalars of NumPy and JAX of any precision: what counts
is `float(number)`, and all arithmetic is Python's.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from scipy.special import erfcx, ndtr

from qexp_jax.data import arguments
from qexp_jax.data.relation import NeighboringRelation, checked_relation

EPSILON_RANGE = 1e-4, 1e4
DELTA_RANGE = 1e-30, 0.999
# Relative, of mu and rho: more than the rounding of a conversion and of the noise multiplier made from it.
_MARGIN = 2e-14
# Larger ones have no epsilon that double precision resolves.
_LARGEST_MU = 1e6
_LARGEST_RHO = 1e12
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_TAIL = 40.0  # what the integral leaves out is below exp(-40) of it


def sensitivity(l2_clip_norm: float, relation: NeighboringRelation) -> float:
    """Largest |S - S'| between neighbours: C for zero-out and add/remove, 2 C for replace-one."""
    relation = checked_relation(relation)
    return 2 * l2_clip_norm if relation is NeighboringRelation.REPLACE_ONE else l2_clip_norm


def delta_from_mu(mu: float, epsilon: float) -> float:
    """The exact delta at which mu-GDP gives (epsilon, delta)-DP.

    Args:
      mu: finite, > 0.
      epsilon: finite, >= 0.

    >>> round(delta_from_mu(1.0, 1.0), 6)
    0.126937
    """
    mu = arguments.positive("mu", mu)
    epsilon = arguments.not_negative("epsilon", epsilon)
    a = mu / 2 - epsilon / mu
    b = -mu / 2 - epsilon / mu
    # e^epsilon phi(b) = phi(a), which removes the overflow; erfcx would overflow itself for large positive a.
    scaled = 0.5 * math.exp(-a * a / 2)
    if a <= 0 and scaled == 0:
        return 0.0
    # The two terms of a small mu are nearly equal, and their difference would lose digits.
    if a <= 0 and mu < 1:
        return scaled * _erfcx_drop(-a / math.sqrt(2), mu / math.sqrt(2))
    upper = ndtr(a) if a > 0 else scaled * erfcx(-a / math.sqrt(2))
    return float(max(0.0, upper - scaled * erfcx(-b / math.sqrt(2))))


def _erfcx_drop(u: float, step: float) -> float:
    """erfcx(u) - erfcx(u + step), u >= 0, 0 < step < 1, as the integral of a positive function: no difference cancels.

    erfcx(u) = 2/sqrt(pi) int_0^inf exp(-s^2 - 2 u s) ds.
    """
    # Here the exponent s^2 + 2 u s reaches _TAIL; written so that nothing cancels for large u.
    reach = _TAIL / (u + math.sqrt(u * u + _TAIL))
    s = reach * (_NODES + 1) / 2
    heights = np.exp(-s * (s + 2 * u)) * -np.expm1(-2 * step * s)
    return float(reach * np.sum(_WEIGHTS * heights) / math.sqrt(math.pi))


def mu_from_budget(epsilon: float, delta: float) -> float:
    """The largest mu for which mu-GDP implies (epsilon, delta)-DP.

    >>> round(mu_from_budget(1.0, 1e-5), 4)
    0.2681
    """
    return _largest(delta_from_mu, epsilon, delta, least=1e-12)


def _largest(delta_from: Callable[[float, float], float], epsilon: float, delta: float, least: float) -> float:
    """The largest parameter at which an increasing `delta_from(parameter, epsilon)` is at most delta."""
    epsilon, delta = check_budget(epsilon, delta)
    upper = 1.0
    while delta_from(upper, epsilon) < delta:
        upper *= 2
    # In logarithms, so that the tolerance is relative: parameters range over many powers of ten.
    log_root = _root(
        lambda x: delta_from(math.exp(x), epsilon) - delta,
        math.log(least),
        math.log(upper),
        xtol=1e-14,
        rtol=1e-14,
    )
    root = math.exp(log_root)
    while delta_from(root, epsilon) > delta:  # never above the budget by the root's last bits
        root *= 1 - _MARGIN
    return root * (1 - _MARGIN)


def _root(function: Callable[[float], float], low: float, high: float, **tolerances: float) -> float:
    """Where a function changes its sign."""
    from scipy.optimize import brentq  # slow to import

    return brentq(function, low, high, **tolerances)


def epsilon_from_mu(mu: float, delta: float) -> float:
    """The smallest epsilon for which mu-GDP implies (epsilon, delta)-DP.

    >>> round(epsilon_from_mu(0.2681, 1e-5), 3)
    1.0
    """
    mu = _up_to("mu", mu, _LARGEST_MU)
    return _smallest_epsilon(delta_from_mu, mu, delta)


def _up_to(name: str, parameter: Any, largest: float) -> float:
    number = arguments.positive(name, parameter)
    if number > largest:
        raise ValueError(f"Expected {name} in (0, {largest:g}], found {number}.")
    return number


def _smallest_epsilon(delta_from: Callable[[float, float], float], parameter: float, delta: float) -> float:
    delta = _check_delta(delta)
    if delta_from(parameter, 0.0) <= delta:
        return 0.0
    upper = 1.0
    while delta_from(parameter, upper) > delta:
        upper *= 2
    excess = lambda epsilon: delta_from(parameter, epsilon) - delta
    root = float(_root(excess, 0.0, upper, xtol=1e-18, rtol=1e-13))
    while delta_from(parameter, root) > delta:  # never below what is known by the root's last bits
        root += 1e-13 * max(root, 1e-4)
    return root


def delta_from_rho(rho: float, epsilon: float) -> float:
    """A delta at which rho-zCDP gives (epsilon, delta)-DP: the least over orders alpha > 1 of

        exp((alpha - 1) (alpha rho - epsilon)) (1 - 1/alpha)^alpha / (alpha - 1),

    whose logarithm is convex, with derivative (2 alpha - 1) rho - epsilon + log(1 - 1/alpha).

    >>> round(delta_from_rho(0.5, 1.0), 4)
    0.2468
    """
    rho = arguments.positive("rho", rho)
    epsilon = arguments.not_negative("epsilon", epsilon)

    def slope(x: float) -> float:  # x = log(alpha - 1); log(1 - 1/alpha) = -log(1 + 1/(alpha - 1))
        return (1 + 2 * math.exp(x)) * rho - epsilon - math.log1p(math.exp(-x))

    # exp(700) is still a double. Any order is sound, so that the best one is not needed to the last bit.
    if slope(-700.0) >= 0:
        return 1.0
    x = 700.0 if slope(700.0) <= 0 else _root(slope, -700.0, 700.0, xtol=1e-12)
    excess = math.exp(x)
    alpha = 1 + excess
    log_delta = excess * (alpha * rho - epsilon) - alpha * math.log1p(1 / excess) - x
    return min(1.0, math.exp(log_delta))


def rho_from_budget(epsilon: float, delta: float) -> float:
    """The largest rho for which rho-zCDP is known to imply (epsilon, delta)-DP.

    >>> round(rho_from_budget(1.0, 1e-5), 4)
    0.0306
    """
    return _largest(delta_from_rho, epsilon, delta, least=1e-24)


def epsilon_from_rho(rho: float, delta: float) -> float:
    """The smallest epsilon for which rho-zCDP is known to imply (epsilon, delta)-DP."""
    rho = _up_to("rho", rho, _LARGEST_RHO)
    return _smallest_epsilon(delta_from_rho, rho, delta)


def check_budget(epsilon: Any, delta: Any) -> tuple[float, float]:
    """The budget as Python floats.

    Args:
      epsilon: one real number in [1e-4, 1e4].
      delta: one real number in [1e-30, 0.999].

    Raises:
      ValueError: for anything else.

    >>> check_budget(np.float32(0.5), 1e-5)
    (0.5, 1e-05)
    """
    return check_epsilon(epsilon), _check_delta(delta)


def check_epsilon(epsilon: Any) -> float:
    """One real number in [1e-4, 1e4] as a Python float; ValueError for anything else."""
    epsilon = arguments.real("epsilon", epsilon)
    least, most = EPSILON_RANGE
    if not least <= epsilon <= most:
        raise ValueError(f"Expected epsilon in [{least:g}, {most:g}], found {epsilon=}.")
    return epsilon


def _check_delta(delta: Any) -> float:
    delta = arguments.real("delta", delta)
    least, most = DELTA_RANGE
    if not least <= delta <= most:
        raise ValueError(f"Expected delta in [{least:g}, {most:g}], found {delta=}.")
    return delta


def noise_multiplier(mu: float, relation: NeighboringRelation) -> float:
    """z, the standard deviation of the noise on S in units of the clip norm: Delta / (C mu)."""
    return _unit_sensitivity(relation) / arguments.positive("mu", mu)


def mu_from_noise(noise_multiplier: float, relation: NeighboringRelation) -> float:
    """The exact mu of one release with noise multiplier z."""
    return _unit_sensitivity(relation) / arguments.positive("noise_multiplier", noise_multiplier)


def _unit_sensitivity(relation: NeighboringRelation) -> float:
    """In units of the clip norm."""
    return sensitivity(1.0, relation)


def compose(mus: Iterable[float]) -> float:
    """mu of several releases on the same data, each of which may depend on those before it."""
    return math.hypot(*(arguments.not_negative("mu", mu) for mu in mus))


def zcdp_rho(mu: float) -> float:
    """rho of zero-concentrated DP; rho adds over releases."""
    return arguments.not_negative("mu", mu) ** 2 / 2


def zcdp_event(rhos: Iterable[float]) -> Any:
    """Releases that are rho-zCDP as a dp_accounting event, for its RDP accountant."""
    # Slow to import.
    from dp_accounting import ComposedDpEvent, ZCDpEvent

    return ComposedDpEvent([ZCDpEvent(arguments.positive("rho", rho)) for rho in rhos])


def dp_event(mus: Iterable[float]) -> Any:
    """The releases as a dp_accounting event, for any accountant under ADD_OR_REMOVE_ONE."""
    # Slow to import.
    from dp_accounting import ComposedDpEvent, GaussianDpEvent

    return ComposedDpEvent([GaussianDpEvent(1 / arguments.positive("mu", mu)) for mu in mus])
