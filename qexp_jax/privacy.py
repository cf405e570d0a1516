"""Privacy arithmetic on the host: Gaussian differential privacy, exact, and composition by dp_accounting.

A release of `S + C z xi` is a Gaussian mechanism of sensitivity Delta and standard deviation C z, hence exactly mu-GDP
with `mu = Delta / (C z)` (Dong, Roth and Su, arXiv:1905.02383), and

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

(Balle and Wang, arXiv:1805.06530). Releases on the same data compose to `mu^2 = sum mu_t^2`; zero-concentrated DP holds
with `rho = mu^2 / 2` (Bun and Steinke, arXiv:1605.02065). Here mu already contains the sensitivity of the relation, so
its dp_accounting event is always `GaussianDpEvent(1/mu)` under ADD_OR_REMOVE_ONE; the true relation is recorded
beside it (under REPLACE_ONE an accountant would double the sensitivity again).
"""

import math
from collections.abc import Iterable

from dp_accounting import ComposedDpEvent, GaussianDpEvent, NeighboringRelation
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
    check_budget(epsilon, delta)
    lower, upper = 1e-12, 1.0
    while delta_from_mu(upper, epsilon) < delta:
        upper *= 2
    if delta_from_mu(lower, epsilon) >= delta:
        raise ValueError(f"The budget {epsilon=}, {delta=} is too small to be met in double precision.")
    log_mu = brentq(
        lambda x: delta_from_mu(math.exp(x), epsilon) - delta,
        math.log(lower),
        math.log(upper),
        xtol=1e-14,
        rtol=1e-14,
    )
    mu = math.exp(log_mu)
    while delta_from_mu(mu, epsilon) > delta:  # never above the budget by the root's last bits
        mu = math.nextafter(mu * (1 - 1e-15), 0)
    return mu


def epsilon_from_mu(mu: float, delta: float) -> float:
    """The smallest epsilon for which mu-GDP implies (epsilon, delta)-DP.

    >>> round(epsilon_from_mu(0.2681, 1e-5), 3)
    1.0
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta in (0, 1), found {delta}.")
    if delta_from_mu(mu, 0.0) <= delta:
        return 0.0
    upper = 1.0
    while delta_from_mu(mu, upper) > delta:
        upper *= 2
    return float(brentq(lambda epsilon: delta_from_mu(mu, epsilon) - delta, 0.0, upper, xtol=1e-13, rtol=1e-13))


def check_budget(epsilon: float, delta: float) -> None:
    """Raises ValueError unless 0 < epsilon < inf and 0 < delta < 1."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
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
    """rho of zero-concentrated DP."""
    return mu * mu / 2


def dp_event(mus: Iterable[float]) -> ComposedDpEvent:
    """The releases as a dp_accounting event, for any accountant under ADD_OR_REMOVE_ONE."""
    return ComposedDpEvent([GaussianDpEvent(1 / mu) for mu in mus])
