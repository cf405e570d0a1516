import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import flow

KEY = jax.random.key(29)


def example(rest=7, shifts=(1e-3, 1e-2, 1e-1)):
    """Three leading directions in R^10, and the block of the other seven."""
    directions = jnp.linalg.qr(jax.random.normal(KEY, (3 + rest, 3)))[0].T
    return flow.Spectrum(
        directions, jnp.array([2.0, 1.0, 0.5, 0.1]), jnp.array([4.0, 2.0, 1.0, 0.25]),
        jnp.array([1.0, 1.0, 1.0, rest]), jnp.array(shifts), jnp.zeros(len(shifts)),
    )  # fmt: skip


def dense_curvature(spectrum):
    v = np.asarray(spectrum.directions, float)
    k = np.asarray(spectrum.curvature, float)
    return k[-1] * np.eye(v.shape[1]) + v.T @ np.diag(k[:-1] - k[-1]) @ v


def test_energies_and_predicted_gradient_agree_with_the_dense_matrices():
    spectrum, x = example(), jax.random.normal(KEY, (10,))
    energy = flow.energies(spectrum.directions, x)
    np.testing.assert_allclose(jnp.vdot(spectrum.dims, energy), jnp.vdot(x, x), rtol=1e-5)
    np.testing.assert_allclose(energy[:3], (spectrum.directions @ x) ** 2, rtol=1e-5)
    np.testing.assert_allclose(
        flow.predicted_gradient(spectrum, x), dense_curvature(spectrum) @ x, rtol=1e-4, atol=1e-5
    )


def test_the_expected_excess_is_that_of_simulated_gradient_flows():
    spectrum, num_units, noise_var, length = example(), 20, 0.1, 0.7
    rng, matrix = np.random.default_rng(0), dense_curvature(example())
    moments = np.asarray(spectrum.moments, float)
    basis = np.linalg.svd(np.asarray(spectrum.directions, float))[2]  # its first rows span the leading directions
    basis[:3] = spectrum.directions
    per_direction = np.append(moments[:3], np.full(7, moments[3]))
    g = rng.normal(size=(40_000, 10)) * np.sqrt(0.05 * per_direction) @ basis
    seen = g + rng.normal(size=g.shape) * np.sqrt(1.5 * per_direction / num_units + noise_var) @ basis
    values, vectors = np.linalg.eigh(matrix)
    gain = (vectors * (1 - np.exp(-length * values)) / values) @ vectors.T
    error = -seen @ gain + np.linalg.solve(matrix, g.T).T
    measured = np.mean(np.einsum("ni,ij,nj->n", error, matrix, error)) / 2
    predicted = flow.excess(length, 0.05 * spectrum.moments, spectrum, noise_var, num_units)
    np.testing.assert_allclose(predicted, measured, rtol=0.02)
    assert abs(flow.excess(length, 0.05 * spectrum.moments, spectrum, 4 * noise_var, num_units) / measured - 1) > 0.1


def test_the_best_length_is_the_least_of_the_excess_and_grows_with_signal_over_noise():
    spectrum = example()

    def best(shift, noise_var):
        return flow.best_length(shift * spectrum.moments, spectrum, noise_var, 1000, 50.0)

    lengths = jnp.geomspace(50 / 64, 50, 49)
    costs = [flow.excess(length, 0.1 * spectrum.moments, spectrum, 0.05, 1000) for length in lengths]
    np.testing.assert_allclose(best(0.1, 0.05), lengths[np.argmin(costs)], rtol=1e-5)
    assert best(10.0, 1e-9) > 40 and best(1e-8, 1.0) == pytest.approx(50 / 64, rel=1e-5)
    assert best(0.1, 0.1) < best(0.1, 0.01) and best(0.01, 0.05) < best(0.1, 0.05)


def test_the_signal_is_the_posterior_mean_of_a_grid_computed_in_full():
    spectrum, noise_var, num_units = example(), 0.02, 50
    spectrum = spectrum._replace(log_prior=-2 * jnp.log(spectrum.shifts))
    x = np.asarray(0.3 * jax.random.normal(jax.random.key(3), (10,)), float)
    energy = flow.energies(spectrum.directions, jnp.asarray(x, jnp.float32))
    moments, dims = np.asarray(spectrum.moments, float), np.asarray(spectrum.dims, float)
    error, log_evidence, means = 1.5 * moments / num_units + noise_var, [], []
    for tau in np.asarray(spectrum.shifts, float):
        total = tau * moments + error
        log_evidence.append(-2 * np.log(tau) - 0.5 * np.sum(dims * (np.log(total) + np.asarray(energy, float) / total)))
        share = tau * moments / total
        means.append(share**2 * np.asarray(energy, float) + tau * moments * (1 - share))
    weight = np.exp(log_evidence - np.max(log_evidence))
    expected = weight @ np.array(means) / weight.sum()
    np.testing.assert_allclose(flow.signal(energy, spectrum, noise_var, num_units), expected, rtol=1e-4)


def test_the_shift_is_found_where_there_is_signal_and_the_prior_kept_where_there_is_not():
    spectrum = example(rest=5000, shifts=tuple(np.geomspace(1e-4, 1e-1, 13)))
    scale = jnp.sqrt(jnp.append(spectrum.moments[:3], jnp.full(5000, spectrum.moments[3])))
    g = 0.1 * scale * jax.random.normal(KEY, (5003,))  # tau = .01; axes serve as directions
    spectrum = spectrum._replace(directions=jnp.eye(5003)[:3])
    found = flow.signal(flow.energies(spectrum.directions, g), spectrum, 1e-6, 10**6)
    assert 0.5 < jnp.vdot(spectrum.dims, found) / jnp.vdot(g, g) < 1.5
    hidden = flow.signal(flow.energies(spectrum.directions, g), spectrum, 1e4, 10**6)
    np.testing.assert_allclose(hidden, jnp.mean(spectrum.shifts) * spectrum.moments, rtol=0.05)


def test_a_spectrum_without_a_rest_is_a_spectrum():
    spectrum = example(rest=0)._replace(directions=jnp.eye(3), dims=jnp.array([1.0, 1.0, 1.0, 0.0]))
    energy = flow.energies(spectrum.directions, jnp.array([0.1, 0.2, 0.3]))
    assert jnp.all(jnp.isfinite(flow.signal(energy, spectrum, 0.1, 100)))
    assert jnp.isfinite(flow.best_length(energy, spectrum, 0.1, 100, 5.0))
