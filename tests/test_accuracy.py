import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import network, network_loss, quadratic_from, spd
from scipy import stats

from qexp_jax import accuracy, curvature, mechanism, subspace

KEY = jax.random.key(13)


def test_measured_excess_follows_the_predicted_law_and_not_one_of_half_the_noise():
    k, n, noise_std = 5, 40, 3.0
    quadratic = quadratic_from(spd(KEY, k), jnp.arange(5.0), n)
    draws = jax.jit(jax.vmap(lambda key: mechanism.draw(key, quadratic, noise_std)))(jax.random.split(KEY, 5000))
    excess = np.asarray(jax.jit(jax.vmap(lambda w: mechanism.excess_utility(quadratic, w)))(draws), float) / n
    np.testing.assert_allclose(excess.mean(), accuracy.expected_excess(k, noise_std, n), rtol=0.05)
    scale = noise_std**2 / (2 * n**2)
    assert stats.kstest(excess / scale, stats.chi2(k).cdf).pvalue > 1e-3
    assert stats.kstest(4 * excess / scale, stats.chi2(k).cdf).pvalue < 1e-9
    below = np.mean(excess <= accuracy.excess_quantile(0.9, accuracy.expected_excess(k, noise_std, n), k))
    np.testing.assert_allclose(below, 0.9, atol=0.02)


def test_the_cost_of_a_steps_noise_has_the_stated_mean_and_nearly_the_stated_law():
    multiples, dims, noise_std, n = np.array([0.1, 0.3, 0.5]), np.array([3, 2, 40]), 3.0, 40
    curvature = np.array([10.0, 4.0, 2.0])
    xi = np.random.default_rng(0).normal(size=(20_000, 45))
    excess = noise_std**2 / (2 * n**2) * (xi**2 @ np.repeat(curvature * multiples**2, dims))
    mean, degrees = accuracy.noise_cost(curvature, multiples, dims, noise_std=noise_std, num_units=n)
    np.testing.assert_allclose(excess.mean(), mean, rtol=0.01)
    for p in (0.05, 0.95):
        np.testing.assert_allclose(np.mean(excess < accuracy.excess_quantile(p, mean, degrees)), p, atol=0.006)
    assert abs(np.mean(excess < accuracy.excess_quantile(0.05, mean, 10)) - 0.05) > 0.02


def test_subspace_bias_is_the_gain_left_unused():
    matrix, gradient = spd(KEY, 6), jnp.arange(1.0, 7.0)
    basis = jax.random.normal(KEY, (6, 2))

    def best(columns):
        h, g = columns.T @ matrix @ columns, columns.T @ gradient
        return g @ jnp.linalg.solve(h, g) / 2

    np.testing.assert_allclose(
        accuracy.subspace_bias(gradient, matrix, basis), best(jnp.eye(6)) - best(basis), rtol=1e-3
    )
    np.testing.assert_allclose(accuracy.subspace_bias(gradient, matrix, jnp.eye(6)), 0, atol=1e-4)


def test_clipping_bias_vanishes_without_clipping_and_grows_with_it():
    whitened = np.random.default_rng(0).normal(size=(50, 3)) + 1
    assert accuracy.clipping_bias(whitened, 100.0) == 0
    assert accuracy.clipping_bias(whitened, 0.5) > accuracy.clipping_bias(whitened, 1.5) > 0


def test_taylor_ratio_is_one_for_a_quadratic_loss_with_its_own_curvature():
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    records = {"x": jax.random.normal(KEY, (30, 3)), "y": jnp.ones(30)}

    def loss(p, r):
        return (r["x"] @ p["w"] - r["y"]) ** 2 / 2

    space = subspace.full(params)
    matrix = curvature.hessian(loss, params, space, records)
    gradient = curvature.mean_gradient(loss, params, space, records)
    steps = jax.random.normal(KEY, (4, 3))
    predicted = jnp.einsum("mi,ij,mj->m", steps, matrix, steps) / 2
    ratios = accuracy.taylor_ratio(loss, params, space, steps, gradient, predicted, records)
    np.testing.assert_allclose(ratios, 1, rtol=1e-4)
    network_params, data = network(KEY)
    full = subspace.full(network_params)
    far = 30 * jnp.ones((1, full.dim))
    g = curvature.mean_gradient(network_loss, network_params, full, data)
    assert not np.allclose(
        accuracy.taylor_ratio(network_loss, network_params, full, far, g, jnp.ones(1), data), 1, atol=0.5
    )


def test_the_tolerated_noise_is_where_the_cost_reaches_the_limit():
    assert accuracy.noise_tolerance(lambda s: 3 * s**2, 0.012) == pytest.approx(0.0632456, rel=1e-4)
    assert accuracy.noise_tolerance(lambda s: np.inf if s > 1 else 0.0, 0.1) == pytest.approx(1, rel=1e-4)
    assert accuracy.noise_tolerance(lambda s: np.nan, 0.1) < 1e-7
    # Steeper than any power, and flat before.
    assert accuracy.noise_tolerance(lambda s: 1e-9 + np.expm1(30 * s), 0.5) == pytest.approx(np.log(1.5) / 30, rel=1e-3)
    seen = []
    found = accuracy.noise_tolerance(lambda s: seen.append(s) or np.expm1(s) - s + 0.3 * s**3, 0.012)
    assert np.expm1(found) - found + 0.3 * found**3 == pytest.approx(0.012, rel=1e-3) and len(seen) < 6


def test_impossible_probabilities_are_refused():
    with pytest.raises(ValueError, match="found 1.0"):
        accuracy.excess_quantile(1.0, 0.5, 10)
