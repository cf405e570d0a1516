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
"""

import math
import sys
from collections.abc import Iterable

from dp_accounting import ComposedDpEvent, GaussianDpEvent, NeighboringRelation, ZCDpEvent
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr

from qexp_jax.clipping import sensitivity


def delta_from_mu(mu: float, epsilon: float) -> float:
    """The exact delta at which mu-GDP gives (epsilon, delta)-DP.

    >>> round(delta_from_mu(1.0, 1.0), 6)
    0.126937
    """
    if not mu > 0:
        raise ValueError(f"Expected mu > 0, found {mu}.")
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon >= 0, found {epsilon}.")
    a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    # e^epsilon phi(b) = phi(a), which removes the overflow; erfcx would overflow itself for large positive a.
    scaled = 0.5 * math.exp(-a * a / 2)
    upper = ndtr(a) if a > 0 else scaled * erfcx(-a / math.sqrt(2))
    return float(max(0.0, upper - scaled * erfcx(-b / math.sqrt(2))))


def mu_from_budget(epsilon: float, delta: float) -> float:
    """The largest mu for which mu-GDP implies (epsilon, delta)-DP.

    >>> round(mu_from_budget(1.0, 1e-5), 4)
    0.2681
    """
    return _largest(delta_from_mu, epsilon, delta, least=1e-12)


def _largest(delta_from, epsilon, delta, least):
    """The largest parameter at which an increasing `delta_from(parameter, epsilon)` is at most delta."""
    check_budget(epsilon, delta)
    lower, upper = least, 1.0
    while delta_from(upper, epsilon) < delta:
        upper *= 2
    if delta_from(lower, epsilon) >= delta:
        raise ValueError(f"The budget {epsilon=}, {delta=} is too small to be met in double precision.")
    log_root = brentq(
        lambda x: delta_from(math.exp(x), epsilon) - delta,
        math.log(lower),
        math.log(upper),
        xtol=1e-14,
        rtol=1e-14,
    )
    root = math.exp(log_root)
    while delta_from(root, epsilon) > delta:  # never above the budget by the root's last bits
        root = math.nextafter(root * (1 - 1e-15), 0)
    return root


def epsilon_from_mu(mu: float, delta: float) -> float:
    """The smallest epsilon for which mu-GDP implies (epsilon, delta)-DP.

    >>> round(epsilon_from_mu(0.2681, 1e-5), 3)
    1.0
    """
    return _smallest_epsilon(delta_from_mu, mu, delta)


def _smallest_epsilon(delta_from, parameter, delta):
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta in (0, 1), found {delta}.")
    if delta_from(parameter, 0.0) <= delta:
        return 0.0
    upper = 1.0
    while delta_from(parameter, upper) > delta:
        upper *= 2
    return float(brentq(lambda epsilon: delta_from(parameter, epsilon) - delta, 0.0, upper, xtol=1e-13, rtol=1e-13))


def delta_from_rho(rho: float, epsilon: float) -> float:
    """A delta at which rho-zCDP gives (epsilon, delta)-DP: the least over orders alpha > 1 of

        exp((alpha - 1) (alpha rho - epsilon)) (1 - 1/alpha)^alpha / (alpha - 1),

    whose logarithm is convex, with derivative (2 alpha - 1) rho - epsilon + log(1 - 1/alpha).

    >>> round(delta_from_rho(0.5, 1.0), 4)
    0.2468
    """
    if not (0 < rho < math.inf):
        raise ValueError(f"Expected a finite rho > 0, found {rho}.")
    if not (0 <= epsilon < math.inf):
        raise ValueError(f"Expected a finite epsilon >= 0, found {epsilon}.")

    def slope(x):  # x = log(alpha - 1); log(1 - 1/alpha) = -log(1 + 1/(alpha - 1))
        return (1 + 2 * math.exp(x)) * rho - epsilon - math.log1p(math.exp(-x))

    if slope(-700.0) >= 0:
        return 1.0
    x = 700.0 if slope(700.0) <= 0 else brentq(slope, -700.0, 700.0, xtol=1e-12)  # any order is sound
    excess, alpha = math.exp(x), 1 + math.exp(x)
    return min(1.0, math.exp(excess * (alpha * rho - epsilon) - alpha * math.log1p(1 / excess) - x))


def rho_from_budget(epsilon: float, delta: float) -> float:
    """The largest rho for which rho-zCDP is known to imply (epsilon, delta)-DP.

    >>> round(rho_from_budget(1.0, 1e-5), 4)
    0.0306
    """
    return _largest(delta_from_rho, epsilon, delta, least=1e-24)


def epsilon_from_rho(rho: float, delta: float) -> float:
    """The smallest epsilon for which rho-zCDP is known to imply (epsilon, delta)-DP."""
    return _smallest_epsilon(delta_from_rho, rho, delta)


def check_budget(epsilon: float, delta: float) -> None:
    """Raises ValueError unless 0 < epsilon < inf and 0 < delta < 1."""
    if not 0 < epsilon <= sys.float_info.max:
        raise ValueError(f"Expected a finite epsilon > 0, found {epsilon=}.")
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta in (0, 1), found {delta=}.")


def noise_multiplier(mu: float, relation: NeighboringRelation) -> float:
    """z, the standard deviation of the noise on S in units of the clip norm: Delta / (C mu)."""
    return sensitivity(1.0, relation) / mu


def mu_from_noise(noise_multiplier: float, relation: NeighboringRelation) -> float:
    """The exact mu of one release with noise multiplier z."""
    return sensitivity(1.0, relation) / noise_multiplier


def compose(mus: Iterable[float]) -> float:
    """mu of several releases on the same data, each of which may depend on those before it."""
    return math.sqrt(math.fsum(mu * mu for mu in mus))


def zcdp_rho(mu: float) -> float:
    """rho of zero-concentrated DP; rho adds over releases."""
    return mu * mu / 2


def zcdp_event(rhos: Iterable[float]) -> ComposedDpEvent:
    """Releases that are rho-zCDP as a dp_accounting event, for its RDP accountant."""
    return ComposedDpEvent([ZCDpEvent(rho) for rho in rhos])


def dp_event(mus: Iterable[float]) -> ComposedDpEvent:
    """The releases as a dp_accounting event, for any accountant under ADD_OR_REMOVE_ONE."""
    return ComposedDpEvent([GaussianDpEvent(1 / mu) for mu in mus])
