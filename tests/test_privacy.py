import decimal
import fractions
import math

import dp_accounting
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from dp_accounting import pld

from qexp_jax import NeighboringRelation, hardened, privacy
from qexp_jax.data import arguments


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
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(privacy.dp_event(mus))
    expected = privacy.epsilon_from_mu(privacy.compose(mus), 1e-5)
    np.testing.assert_allclose(accountant.get_epsilon(1e-5), expected, rtol=1e-3)
    rdp = dp_accounting.rdp.RdpAccountant().compose(privacy.dp_event(mus))
    assert rdp.get_epsilon(1e-5) > expected


def test_relations_are_those_of_dp_accounting_and_either_is_taken():
    theirs = list(dp_accounting.NeighboringRelation)
    assert [(r.name, r.value) for r in NeighboringRelation] == [(r.name, r.value) for r in theirs]
    assert [privacy.sensitivity(1.0, relation) for relation in theirs] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("wrong", ["REPLACE_ONE", 2, None, NeighboringRelation])
def test_nothing_else_is_a_relation(wrong):
    with pytest.raises(ValueError, match="neighboring_relation"):
        privacy.sensitivity(1.0, wrong)


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_noise_and_mu_are_inverse_and_replace_one_needs_twice_the_noise(relation):
    z = privacy.noise_multiplier(0.5, relation)
    assert privacy.mu_from_noise(z, relation) == 0.5
    assert z == (4.0 if relation is NeighboringRelation.REPLACE_ONE else 2.0)
    assert math.isclose(privacy.zcdp_rho(0.5), 0.125)


EPSILONS, DELTAS = [1e-4, 3e-3, 0.1, 1.0, 8.0, 150.0, 1e4], [1e-30, 1e-18, 1e-10, 1e-5, 0.02, 0.5, 0.999]


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_budgets_are_kept_exactly(epsilon, delta):
    """Over the documented range, at 50 digits: never above the budget, and below it by rounding alone."""
    mu = privacy.mu_from_budget(epsilon, delta)
    assert 1 - 1e-10 < exact_delta(mu, epsilon) / mpmath.mpf(delta) <= 1
    for scale in (1e-3, 0.3, 0.9, 1.1, 3.0):
        expected = exact_delta(scale * mu, epsilon)
        if expected > 1e-300:
            np.testing.assert_allclose(privacy.delta_from_mu(scale * mu, epsilon), float(expected), rtol=3e-13)
    np.testing.assert_allclose(privacy.epsilon_from_mu(mu, delta), epsilon, rtol=1e-8)


def exact_zcdp_delta(rho, epsilon, found_order):
    """The least over orders near one that is close to the best."""
    with mpmath.workdps(50):
        rho, epsilon = mpmath.mpf(rho), mpmath.mpf(epsilon)
        slope = lambda x: (1 + 2 * mpmath.exp(x)) * rho - epsilon - mpmath.log1p(mpmath.exp(-x))
        x = mpmath.findroot(slope, found_order)
        excess, alpha = mpmath.exp(x), 1 + mpmath.exp(x)
        return mpmath.exp(excess * (alpha * rho - epsilon) - alpha * mpmath.log1p(1 / excess) - x)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_zcdp_budgets_are_kept_exactly(epsilon, delta):
    """The same of rho, against the least over all orders at 50 digits."""
    rho = privacy.rho_from_budget(epsilon, delta)
    x = np.linspace(-30, 40, 20_001)
    excess = np.exp(x)
    bound = excess * ((1 + excess) * rho - epsilon) - (1 + excess) * np.log1p(1 / excess) - x
    exact = exact_zcdp_delta(rho, epsilon, x[np.argmin(bound)])
    assert 1 - 1e-9 < exact / mpmath.mpf(delta) <= 1 + 1e-15
    np.testing.assert_allclose(privacy.epsilon_from_rho(rho, delta), epsilon, rtol=1e-7)
    np.testing.assert_allclose(hardened.mu_from_budget(epsilon, delta), math.sqrt(2 * rho), rtol=1e-15)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [
        (0, 0.1), (-1, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1, 0), (1, 1), (1, math.nan), (1, -0.1),
        (1e300, 1e-5), (10**400, 1e-5), (1e-300, 1e-5), (9.9e-5, 1e-5), (1.01e4, 1e-5), (1, 9.9e-31), (1, 0.9991),
    ],
)  # fmt: skip
def test_impossible_budgets_are_refused(epsilon, delta):
    """With the name of what is beyond its range."""
    name = "delta" if epsilon == 1 else "epsilon"
    for function in (privacy.mu_from_budget, privacy.rho_from_budget, hardened.mu_from_budget, privacy.check_budget):
        with pytest.raises(ValueError, match=f"Expected {name} "):
            function(epsilon, delta)


SCALARS = [
    np.float16, np.float32, np.float64, np.longdouble, jnp.float16, jnp.bfloat16, jnp.float32, np.asarray,
    fractions.Fraction, decimal.Decimal, lambda x: np.asarray(x, jnp.bfloat16), lambda x: jnp.asarray(x),
]  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS)
def test_scalars_count_as_their_floats(scalar):
    """All arithmetic is that of Python floats, bit by bit, whatever the numbers come as."""
    epsilon, delta, mu = scalar(0.1), scalar(1e-3), scalar(0.7)
    e, d, m = float(epsilon), float(delta), float(mu)
    relation = NeighboringRelation.REPLACE_ONE
    pairs = [
        (privacy.delta_from_mu(mu, epsilon), privacy.delta_from_mu(m, e)),
        (privacy.mu_from_budget(epsilon, delta), privacy.mu_from_budget(e, d)),
        (privacy.epsilon_from_mu(mu, delta), privacy.epsilon_from_mu(m, d)),
        (privacy.delta_from_rho(mu, epsilon), privacy.delta_from_rho(m, e)),
        (privacy.rho_from_budget(epsilon, delta), privacy.rho_from_budget(e, d)),
        (privacy.epsilon_from_rho(mu, delta), privacy.epsilon_from_rho(m, d)),
        (privacy.noise_multiplier(mu, relation), privacy.noise_multiplier(m, relation)),
        (privacy.mu_from_noise(mu, relation), privacy.mu_from_noise(m, relation)),
        (privacy.compose([mu, mu]), privacy.compose([m, m])),
        (privacy.zcdp_rho(mu), privacy.zcdp_rho(m)),
        (hardened.mu_from_budget(epsilon, delta), hardened.mu_from_budget(e, d)),
    ]
    for found, expected in pairs:
        assert type(found) is float and found == expected
    assert privacy.dp_event([mu]) == privacy.dp_event([m]) and privacy.zcdp_event([mu]) == privacy.zcdp_event([m])
    assert hardened.discrete_noise(mu, np.int32(3)) == hardened.discrete_noise(m, 3)
    assert exact_delta(privacy.mu_from_budget(epsilon, delta), e) <= mpmath.mpf(d)


NO_NUMBERS = [
    "1.0", None, 1j, True, np.bool_(True), np.complex64(1), np.ones(1), np.ones((2, 3)), jnp.ones(2), [1.0], (),
    np.timedelta64(1), np.timedelta64(1, "s"), np.array("1.0"), np.array(None), {"a": 1},
    jax.ShapeDtypeStruct((), jnp.float32),
    decimal.Decimal("sNaN"), fractions.Fraction(10) ** 400,
]  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_other_types_are_refused(value):
    """By the name of the argument, its type and its shape."""
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    calls = {
        "epsilon": lambda: privacy.mu_from_budget(value, 1e-5),
        "delta": lambda: privacy.mu_from_budget(1.0, value),
        "mu": lambda: privacy.compose([0.1, value]),
        "rho": lambda: privacy.epsilon_from_rho(value, 1e-5),
        "noise_multiplier": lambda: hardened.discrete_noise(value, 3),
        "dim": lambda: hardened.discrete_noise(1.0, value),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} .*{kind}") as caught:
            call()
        assert shape is None or str(shape) in str(caught.value)


def test_keys_are_never_printed():
    """A key in the place of a number, of whatever kind it is."""
    key = jax.random.key(123456789)
    for value in (key, jax.random.key_data(key), "secret", ["secret"]):
        with pytest.raises(ValueError, match="epsilon") as caught:
            privacy.mu_from_budget(value, 1e-5)
        assert "123456789" not in str(caught.value) and "secret" not in str(caught.value)


def test_traced_numbers_are_refused():
    with pytest.raises(ValueError, match="epsilon"):
        jax.jit(lambda epsilon: privacy.mu_from_budget(epsilon, 1e-5))(1.0)


@pytest.mark.parametrize("value", [3.0, "3", None, True, np.float32(3), np.ones(1, int), fractions.Fraction(3), 0, -1])
def test_counts_are_integers(value):
    with pytest.raises(ValueError, match="Expected an integer rounds >= 1"):
        arguments.count("rounds", value)


@pytest.mark.parametrize("scalar", [int, np.int8, np.uint64, np.asarray, jnp.int32, jnp.asarray])
def test_integer_scalars_are_counts(scalar):
    found = arguments.count("rounds", scalar(3))
    assert type(found) is int and found == 3


@pytest.mark.parametrize("function", [privacy.noise_multiplier, privacy.mu_from_noise])
def test_relations_are_no_texts(function):
    """As a text, REPLACE_ONE would pass for a relation of half its sensitivity."""
    with pytest.raises(ValueError, match="neighboring_relation"):
        function(1.0, "REPLACE_ONE")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_noise_is_finite_and_positive(value):
    for function in (privacy.noise_multiplier, privacy.mu_from_noise):
        with pytest.raises(ValueError, match="Expected a finite"):
            function(value, NeighboringRelation.REPLACE_ONE)
    with pytest.raises(ValueError, match="Expected mu|finite mu"):
        privacy.epsilon_from_mu(value, 1e-5)


def test_conversions_end_at_any_scale():
    """Without a warning, an overflow or a search without end."""
    assert privacy.delta_from_mu(1e-300, 1e300) == 0 and privacy.delta_from_mu(1e300, 1e-300) == 1
    assert privacy.delta_from_mu(1e-300, 0) >= 0 and privacy.delta_from_rho(1e-300, 1e300) == 0
    assert privacy.epsilon_from_mu(1e-300, 1e-30) == 0 and 5e11 < privacy.epsilon_from_mu(1e6, 1e-30) < 5.1e11
    assert privacy.epsilon_from_rho(1e-300, 1e-30) == 0 and 1e12 < privacy.epsilon_from_rho(1e12, 1e-30) < 1.1e12
    assert privacy.compose([1e-200, 1e-200]) > 1e-200 and privacy.compose([]) == 0
    for convert in (privacy.epsilon_from_mu, privacy.epsilon_from_rho):
        with pytest.raises(ValueError, match="Expected"):
            convert(1e300, 1e-5)


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
