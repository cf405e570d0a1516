import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import clip_norms, flow

CURVATURE = np.array([1.0, 0.5, 0.2, 0.2])  # the block of all others is as steep as the least leading direction
DIMS = np.ones(4)
NUM_UNITS, LENGTH, SHIFT, NOISE_STD = 3000, 4.0, 0.01, 0.003


def heavy_tailed(n=2000):
    """Gradients in four directions, a few of them ten times as large as the most."""
    rng = np.random.default_rng(5)
    g = rng.normal(size=(n, 4)) * np.sqrt(CURVATURE)
    return g * np.where(rng.random(n) < 0.05, 10.0, 1.0)[:, None]


G = heavy_tailed()


def clipped_at(quantile):
    return clip_norms.clipped(G**2, DIMS, clip_norms.at_quantile(G**2, DIMS, quantile))


def spectrum_of(moments):
    arrays = CURVATURE, moments, DIMS, *flow.shift_prior()
    return flow.Spectrum(jnp.eye(4)[:3], *(jnp.asarray(x, jnp.float32) for x in arrays))


def simulated_excess(found, draws=4000):
    """Of flows along clipped gradients of records that are re-weighted, sampled and seen with noise."""
    rng = np.random.default_rng(6)
    kept = np.minimum(1, found.l2_clip_norm / np.linalg.norm(G, axis=1))[:, None] * G
    weights = rng.normal(size=(draws, len(G))) * np.sqrt(SHIFT / len(G))
    error_var = flow._SAMPLING * np.mean(kept**2, axis=0) / NUM_UNITS + NOISE_STD**2
    seen = weights @ kept + rng.normal(size=(draws, 4)) * np.sqrt(error_var)
    left = weights @ G - (1 - np.exp(-LENGTH * CURVATURE)) * seen
    return np.mean(np.sum(left**2 / (2 * CURVATURE), axis=1))


def stated_excess(found):
    return float(clip_norms.excess(LENGTH, SHIFT, found, spectrum_of(found.moments), NOISE_STD**2, NUM_UNITS))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
def test_the_expected_excess_is_that_of_simulated_flows_along_clipped_gradients(quantile):
    found = clipped_at(quantile)
    assert stated_excess(found) == pytest.approx(simulated_excess(found), rel=0.06)


def test_an_excess_that_forgets_what_clipping_takes_is_rejected():
    """The broken twin: as if the gradients that are left were all there ever was."""
    found = clipped_at(0.5)
    forgetful = found._replace(whole=found.moments, mixed=found.moments)
    assert stated_excess(forgetful) < 0.8 * simulated_excess(found)


def test_without_clipping_the_excess_is_that_of_the_flow():
    found = clipped_at(1.0)
    picture = spectrum_of(found.moments)
    signals = SHIFT * jnp.asarray(found.whole, jnp.float32)
    expected = flow.excess(LENGTH, signals, picture, NOISE_STD**2, NUM_UNITS)
    np.testing.assert_allclose(stated_excess(found), expected, rtol=1e-5)
    assert found.fraction == 0


def test_the_less_noise_the_larger_the_clip_norm_of_least_excess():
    def best(noise_multiplier):
        def least(found):
            noise_std = found.l2_clip_norm * noise_multiplier / NUM_UNITS
            return clip_norms.least(SHIFT, found, spectrum_of(found.moments), noise_std**2, NUM_UNITS, 1e3)

        return min((0.5, 0.9, 0.98, 1.0), key=lambda quantile: float(least(clipped_at(quantile))))

    chosen = [best(noise_multiplier) for noise_multiplier in (1e3, 30.0, 1.0, 1e-3)]
    assert chosen == sorted(chosen) and chosen[0] == 0.5 and chosen[-1] == 1.0
