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
SKEWED = np.random.default_rng(7).exponential(size=(4000, 4)) - 1  # of mean 0; clipped, it is not
NO_PULL = np.zeros(4)


def gradients(g):
    return clip_norms.Gradients(g[:, :3], g**2, DIMS)


def clipped_at(quantile, g=G):
    return clip_norms.clipped(gradients(g), float(np.quantile(np.linalg.norm(g, axis=1), quantile)))


def spectrum_of(moments):
    arrays = CURVATURE, moments, DIMS, *flow.shift_prior()
    return flow.Spectrum(jnp.eye(4)[:3], *(jnp.asarray(x, jnp.float32) for x in arrays))


def simulated_excess(found, g=G, pull=NO_PULL, draws=4000):
    """Of flows along clipped gradients of records that are re-weighted, sampled and seen with noise."""
    rng = np.random.default_rng(6)
    kept = np.minimum(1, found.l2_clip_norm / np.linalg.norm(g, axis=1))[:, None] * g
    weights = rng.normal(size=(draws, len(g))) * np.sqrt(SHIFT / len(g))
    error_var = flow._SAMPLING * np.mean(kept**2, axis=0) / NUM_UNITS + NOISE_STD**2
    seen = weights @ kept + pull + rng.normal(size=(draws, 4)) * np.sqrt(error_var)
    left = weights @ g - (1 - np.exp(-LENGTH * CURVATURE)) * seen
    return np.mean(np.sum(left**2 / (2 * CURVATURE), axis=1))


def stated_excess(found):
    return float(clip_norms.excess(LENGTH, SHIFT, found, spectrum_of(found.moments), NOISE_STD**2, NUM_UNITS))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
def test_the_expected_excess_is_that_of_simulated_flows_along_clipped_gradients(quantile):
    found = clipped_at(quantile)._replace(pulls=NO_PULL)
    assert stated_excess(found) == pytest.approx(simulated_excess(found), rel=0.06)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_a_pull_of_clipping_is_in_the_expected_excess_and_one_that_forgets_it_is_rejected(quantile):
    found = clipped_at(quantile, SKEWED)
    kept = np.minimum(1, found.l2_clip_norm / np.linalg.norm(SKEWED, axis=1))[:, None] * SKEWED
    pull = np.sqrt(6) * np.mean(kept - SKEWED, axis=0) * [1, 1, 1, 0]
    simulated = simulated_excess(found, SKEWED, pull)
    assert stated_excess(found) == pytest.approx(simulated, rel=0.06)
    assert stated_excess(found._replace(pulls=NO_PULL)) < 0.8 * simulated


def test_squares_of_pulls_are_without_the_bias_of_a_finite_sample():
    """Of symmetric gradients clipping takes 0 but for the sampling error, whose square is not 0 on average."""
    rng = np.random.default_rng(10)
    sets = rng.normal(size=(4000, 50, 4))
    pulls = np.array([clip_norms.clipped(gradients(g), 1.0).pulls[:3] for g in sets])
    taken = (1 - np.minimum(1, 1 / np.linalg.norm(sets, axis=2)))[..., None] * sets
    biased = np.mean(np.mean(taken, axis=1)[:, :3] ** 2)
    assert abs(pulls.mean()) < 0.05 * biased


@pytest.mark.parametrize(("skew", "of_the_sample"), [(0.0, 0.6), (1.0, 1.1)])
def test_the_shrunken_pull_costs_less_than_the_mean_of_a_sample_or_none(skew, of_the_sample):
    """Over samples of a population whose gradients are skewed, or not, in the first direction alone."""
    rng = np.random.default_rng(12)

    def sampled(n):
        g = rng.normal(size=(n, 4)) * np.sqrt(CURVATURE) * np.where(rng.random(n) < 0.05, 10.0, 1.0)[:, None]
        g[:, 0] += 2 * skew * (rng.exponential(size=n) - 1)
        return g

    def added(g):
        return np.mean((np.minimum(1, 1.5 / np.linalg.norm(g, axis=1)) - 1)[:, None] * g, axis=0)[:3]

    truth, samples = added(sampled(400_000)), [sampled(5000) for _ in range(200)]
    found = [clip_norms.pull(gradients(g), 1.5, CURVATURE[:3]) for g in samples]
    shrunken, plain, none = (
        np.mean(np.sum((np.array(x) - truth) ** 2 / CURVATURE[:3], axis=-1))
        for x in (found, [added(g) for g in samples], np.zeros(3))
    )
    assert shrunken < of_the_sample * plain
    assert shrunken < 0.2 * none or skew == 0


def test_gradients_that_are_not_clipped_are_not_pulled():
    largest = np.linalg.norm(SKEWED, axis=1).max()
    np.testing.assert_allclose(clip_norms.pull(gradients(SKEWED), 1.001 * largest, CURVATURE[:3]), 0)


def test_where_clipping_pulls_the_clip_norm_of_least_excess_is_larger():
    """The same gradients with signs at random have the same moments and no pull."""
    signs = np.random.default_rng(11).choice([-1, 1], size=(len(SKEWED), 1))

    def best(g):
        def least(found):
            noise_std = found.l2_clip_norm * 100.0 / NUM_UNITS
            return clip_norms.least(SHIFT, found, spectrum_of(found.moments), noise_std**2, NUM_UNITS, 1e3)

        return min((0.5, 0.9, 0.98, 1.0), key=lambda quantile: float(least(clipped_at(quantile, g))))

    assert best(SKEWED) > best(signs * SKEWED)


def test_an_excess_that_forgets_what_clipping_takes_is_rejected():
    """The broken twin: as if the gradients that are left were all there ever was."""
    found = clipped_at(0.5)._replace(pulls=NO_PULL)
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


def share_of(g, noise_std, length=LENGTH):
    arrays = CURVATURE, np.ones(4), np.append(np.ones(3), 50), *flow.shift_prior()
    picture = flow.Spectrum(jnp.eye(53)[:3], *(jnp.asarray(x, jnp.float32) for x in arrays))
    clip_norm = float(np.quantile(np.linalg.norm(g, axis=1), 0.9))
    return clip_norms.share_under_heavy_shift(gradients(g), clip_norm, picture, noise_std**2, length)


def test_the_more_noise_the_smaller_the_share_and_without_any_it_is_whole():
    shares = [share_of(SKEWED, noise_std) for noise_std in (0, 0.01, 0.03, 0.1, 1)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 3
    assert shares[0] == 1 and shares[-1] == 0.25


def test_pulls_that_cancel_allow_a_smaller_share():
    """The same gradients with signs at random: a rule that saw their squares alone would not tell the two apart."""
    signs = np.random.default_rng(8).choice([-1, 1], size=(len(SKEWED), 1))
    assert share_of(signs * SKEWED, 0.03) < 0.6 * share_of(SKEWED, 0.03)


@pytest.mark.parametrize("noise_std", [0.02, 0.05])
def test_the_share_costs_simulated_flows_least(noise_std):
    """Flows from the minimum of a quadratic along noise and root two times what clipping adds to a mean of 0."""
    norms = np.linalg.norm(SKEWED, axis=1)
    clip_norm, rng = np.quantile(norms, 0.9), np.random.default_rng(9)
    xi = noise_std * rng.normal(size=(20000, 53))
    curvature = np.append(CURVATURE[:3], np.full(50, CURVATURE[3]))

    def cost(share):
        def mean(c):
            return np.mean(np.minimum(1, c / norms)[:, None] * SKEWED[:, :3], axis=0)

        pull = mean(share * clip_norm) / share - mean(clip_norm)
        released = share * xi
        released[:, :3] += np.sqrt(2) * pull
        moved = (1 - np.exp(-LENGTH * curvature)) / curvature * released
        return np.mean(np.sum(curvature * moved**2 / 2, axis=1))

    found = share_of(SKEWED, noise_std)
    costs = {share: cost(share) for share in np.linspace(1, 0.25, 16)}
    assert costs[found] < 1.002 * min(costs.values()) and costs[found] < 0.9 * costs[1.0]
