"""The drawn law against the oracle's, with twins that must be rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import law, linear_loss, network, network_loss, quadratic_from, spd
from scipy import stats

from qexp_jax import clipping, curvature, mechanism, precision, subspace
from qexp_jax.mechanism import gaussian

KEY = jax.random.key(7)
MATRIX = spd(KEY, 4)
GRADIENT_SUM = jnp.array([3.0, -1.0, 2.0, 0.5])
N, NOISE_STD, DRAWS = 50, 2.5, 20_000


def gaussian_pvalue(draws, mean, covariance):
    """Smallest p-value, corrected, of tests of the mean, of every variance and of every correlation."""
    z = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(draws, float) - mean).T)
    k, n = z.shape
    centre = stats.chi2.sf(n * np.sum(z.mean(axis=1) ** 2), k)
    squares = np.sum(z**2, axis=1)
    variances = 2 * np.minimum(stats.chi2.cdf(squares, n), stats.chi2.sf(squares, n))
    products = (z @ z.T)[np.triu_indices(k, 1)] / np.sqrt(n)
    correlations = 2 * stats.norm.sf(np.abs(products))
    every = np.array([centre, *variances, *correlations])
    return every.min() * len(every)


def draw_many(quadratic, noise_std=NOISE_STD):
    return jax.jit(jax.vmap(lambda key: mechanism.draw(key, quadratic, noise_std)))(jax.random.split(KEY, DRAWS))


def test_draws_follow_the_closed_form_and_broken_twins_are_rejected():
    mean, covariance = law(MATRIX, GRADIENT_SUM, N, NOISE_STD)
    quadratic = quadratic_from(MATRIX, GRADIENT_SUM, N)
    assert gaussian_pvalue(draw_many(quadratic), mean, covariance) > 1e-3
    assert gaussian_pvalue(draw_many(quadratic, NOISE_STD / 2), mean, covariance) < 1e-9
    whitened_twice = jax.vmap(
        lambda w: precision.whiten(quadratic.precision, precision.uncolor(quadratic.precision, w))
    )
    assert gaussian_pvalue(whitened_twice(draw_many(quadratic)), mean, covariance) < 1e-9  # R^{-1} for R^{-T}


def test_many_draws_at_once_follow_the_same_law():
    mean, covariance = law(MATRIX, GRADIENT_SUM, N, NOISE_STD)
    quadratic = quadratic_from(MATRIX, GRADIENT_SUM, N)
    assert gaussian_pvalue(mechanism.draws(KEY, quadratic, NOISE_STD, DRAWS), mean, covariance) > 1e-3
    assert gaussian_pvalue(mechanism.draws(KEY, quadratic, 0.9 * NOISE_STD, DRAWS), mean, covariance) < 1e-9
    other = quadratic._replace(whitened_sum=quadratic.whitened_sum + 1e-3)
    noises = [mechanism.draws(KEY, q, NOISE_STD, 1)[0] - mechanism.minimiser(q) for q in (quadratic, other)]
    assert not np.allclose(*noises, rtol=1e-2)  # a reused key does not repeat its noise on other data


def test_no_noise_and_no_clipping_reproduce_the_exact_minimiser_of_the_quadratic():
    params, records = network(KEY)
    space = subspace.full(params)
    matrix = curvature.psd_part(curvature.hessian(network_loss, params, space, records)) + 0.5 * jnp.eye(space.dim)
    factored = precision.dense(matrix)
    total, info = clipping.clipped_sum(network_loss, params, space, factored, records, l2_clip_norm=100.0)
    w = mechanism.draw(KEY, mechanism.Quadratic(factored, total, 37), 0.0)
    gradient = curvature.mean_gradient(network_loss, params, space, records)
    np.testing.assert_allclose(w, -np.linalg.solve(matrix, gradient), rtol=2e-3, atol=1e-4)
    assert info.num_clipped == 0


def test_utility_density_and_minimiser_agree_with_the_oracle():
    quadratic = quadratic_from(MATRIX, GRADIENT_SUM, N)
    mean, covariance = law(MATRIX, GRADIENT_SUM, N, NOISE_STD)
    w = jnp.array([0.1, -0.2, 0.3, 0.0])
    np.testing.assert_allclose(mechanism.minimiser(quadratic), mean, rtol=1e-4)
    utility = -(N / 2 * w @ MATRIX @ w + w @ GRADIENT_SUM)
    np.testing.assert_allclose(mechanism.utility(quadratic, w), utility, rtol=1e-5)
    best = mechanism.utility(quadratic, mechanism.minimiser(quadratic))
    np.testing.assert_allclose(mechanism.excess_utility(quadratic, w), best - utility, rtol=1e-4)
    expected = stats.multivariate_normal(mean, covariance).logpdf(np.asarray(w, float))
    np.testing.assert_allclose(mechanism.log_density(quadratic, w, NOISE_STD), expected, rtol=1e-4)


def test_density_is_the_exponential_mechanism_at_the_calibrated_temperature():
    quadratic = quadratic_from(MATRIX, GRADIENT_SUM, N)
    a, b = jnp.zeros(4), jnp.array([0.1, -0.2, 0.3, 0.0])
    log_ratio = mechanism.log_density(quadratic, a, NOISE_STD) - mechanism.log_density(quadratic, b, NOISE_STD)
    gap = mechanism.utility(quadratic, a) - mechanism.utility(quadratic, b)
    np.testing.assert_allclose(log_ratio, mechanism.inverse_temperature(N, NOISE_STD) * gap, rtol=1e-4)


def test_a_reused_key_never_repeats_its_noise_on_other_data_or_another_scale():
    total = jnp.arange(6.0)
    nudged = total.at[3].set(jnp.nextafter(total[3], jnp.inf))

    def noise(s, std):
        return (mechanism.noisy_sum(KEY, s, std) - s) / std

    np.testing.assert_array_equal(noise(total, 1e3), noise(total, 1e3))
    for other in (noise(nudged, 1e3), noise(total, 2e3), noise(total[::-1], 1e3)):
        assert np.max(np.abs(other - noise(total, 1e3))) > 0.01


def test_the_keys_of_like_sums_are_unlike():
    """Sums that differ in one word, and of one number throughout, have other keys, of which no bit is rare."""
    ones = jnp.eye(3)[0] * jnp.arange(4096.0)[:, None]
    throughout = jnp.ones(3) * jnp.arange(1.0, 4097.0)[:, None]
    sums = jnp.concatenate([ones, throughout])
    keys = np.asarray(jax.jit(jax.vmap(lambda x: jax.random.key_data(gaussian.protecting_key(KEY, x))))(sums))
    assert len(np.unique(keys, axis=0)) == len(sums)
    shares = np.unpackbits(keys.view(np.uint8), axis=1).mean(axis=0)
    assert len(shares) == 64
    np.testing.assert_allclose(shares, 0.5, atol=5 * 0.5 / np.sqrt(len(sums)))


@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_whole_space_draw_runs_under_jit(form):
    params = {"w": jnp.zeros(30)}
    vectors = jnp.eye(3, 30)
    factored = (
        precision.low_rank(0.5, vectors, jnp.ones(3))
        if form == "low_rank"
        else precision.dense(0.5 * jnp.eye(30) + vectors.T @ vectors)
    )
    records = {"g": jax.random.normal(KEY, (20, 30))}

    @jax.jit
    def release(key):
        total, _ = clipping.clipped_sum(linear_loss, params, subspace.full(params), factored, records, l2_clip_norm=2.0)
        return mechanism.draw(key, mechanism.Quadratic(factored, total, 20), 0.0)

    whitened = jax.jit(jax.vmap(lambda g: precision.whiten(factored, g)))(records["g"])
    clipped = jax.jit(jax.vmap(lambda v: clipping.clip(v, jnp.linalg.norm(v), 2.0)[0]))(whitened).sum(0)
    np.testing.assert_allclose(release(KEY), -precision.color(factored, clipped) / 20, atol=1e-5)
