import math

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting import NeighboringRelation, pld

from qexp_jax import privacy


def exact_delta(mu, epsilon):
    with mpmath.workdps(60):
        mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 1.0, 8.0, 60.0])
def test_delta_is_exact(mu, epsilon):
    expected = exact_delta(mu, epsilon)
    if expected > 1e-300:
        np.testing.assert_allclose(privacy.delta_from_mu(mu, epsilon), float(expected), rtol=1e-10)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_conversion_is_exact_both_ways_and_never_over_budget(epsilon, delta):
    mu = privacy.mu_from_budget(epsilon, delta)
    assert exact_delta(mu, epsilon) <= delta * (1 + 1e-12)
    np.testing.assert_allclose(privacy.epsilon_from_mu(mu, delta), epsilon, rtol=1e-10)
    assert privacy.delta_from_mu(mu * (1 + 1e-6), epsilon) > delta


def test_dp_accounting_agrees_on_a_composition():
    mus = [0.2, 0.3, 0.1]
    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE).compose(privacy.dp_event(mus))
    expected = privacy.epsilon_from_mu(privacy.compose(mus), 1e-5)
    np.testing.assert_allclose(accountant.get_epsilon(1e-5), expected, rtol=1e-3)
    rdp = dp_accounting.rdp.RdpAccountant().compose(privacy.dp_event(mus))
    assert rdp.get_epsilon(1e-5) > expected


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_noise_and_mu_are_inverse_and_replace_one_needs_twice_the_noise(relation):
    z = privacy.noise_multiplier(0.5, relation)
    assert privacy.mu_from_noise(z, relation) == 0.5
    assert z == (4.0 if relation is NeighboringRelation.REPLACE_ONE else 2.0)
    assert math.isclose(privacy.zcdp_rho(0.5), 0.125)


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 0.1), (-1, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1, 0), (1, 1)])
def test_impossible_budgets_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match="Expected"):
        privacy.mu_from_budget(epsilon, delta)


@pytest.mark.parametrize("rho", [1e-4, 0.03, 1.0, 50.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 3.0, 20.0])
def test_delta_of_zcdp_is_the_least_over_orders_and_above_the_exact_one_of_the_gaussian(rho, epsilon):
    excess = np.geomspace(1e-9, 1e9, 200_001)
    with np.errstate(over="ignore"):
        exponent = excess * ((1 + excess) * rho - epsilon) - (1 + excess) * np.log1p(1 / excess) - np.log(excess)
        least = min(1.0, np.exp(exponent.min()))
    found = privacy.delta_from_rho(rho, epsilon)
    np.testing.assert_allclose(found, least, rtol=1e-6)
    assert found >= privacy.delta_from_mu(math.sqrt(2 * rho), epsilon)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_conversion_of_zcdp_agrees_with_dp_accounting_and_is_never_over_budget(epsilon, delta):
    rho = privacy.rho_from_budget(epsilon, delta)
    assert privacy.delta_from_rho(rho, epsilon) <= delta < privacy.delta_from_rho(rho * (1 + 1e-6), epsilon)
    np.testing.assert_allclose(privacy.epsilon_from_rho(rho, delta), epsilon, rtol=1e-9)
    rdp = dp_accounting.rdp.RdpAccountant().compose(privacy.zcdp_event([rho / 3] * 3))
    assert epsilon * (1 - 1e-9) <= rdp.get_epsilon(delta) <= 1.02 * epsilon + 0.005  # it tries fewer orders


@pytest.mark.parametrize(
    ("rho", "epsilon"), [(0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.nan)]
)
def test_impossible_zcdp_is_refused(rho, epsilon):
    with pytest.raises(ValueError, match="Expected"):
        privacy.delta_from_rho(rho, epsilon)


def test_hopeless_zcdp_gives_delta_one():
    assert privacy.delta_from_rho(1e10, 1.0) == 1.0
