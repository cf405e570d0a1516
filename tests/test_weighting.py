"""Weights of public records against the plain dual in SciPy, without a shift, and over many draws; training on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from qexp_jax import features, subspace, weighting
from qexp_jax.quadratic import tilted_training

KEY = jax.random.key(5)


def rows_of(n, k, seed=0):
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)


def plain_dual(rows, mean, penalties=0.0):
    """theta by Newton's method in float64."""
    rows = np.asarray(rows, np.float64)

    def value(theta):
        scores = rows @ theta
        return np.log(np.mean(np.exp(scores))) - theta @ mean + np.sum(penalties * theta**2) / 2

    return optimize.minimize(value, np.zeros(rows.shape[1]), method="BFGS", options={"gtol": 1e-9}).x


def weights_at(rows, theta):
    raised = np.exp(np.asarray(rows, np.float64) @ theta)
    return raised / raised.mean()


# --- weights ---


def test_the_released_mean_is_met():
    """Where noise is small and records are many, by the weights of the plain dual; those without theta miss it."""
    rows, mean, noise_std = rows_of(40_000, 3), np.array([0.2, -0.1, 0.15]), 1e-5
    tilted = weighting.fit(rows, mean, noise_std, 10**7)
    assert tilted.accepted and tilted.temper == 1
    np.testing.assert_allclose(np.average(rows, axis=0, weights=tilted.weights), mean, atol=1e-3)
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    plain = plain_dual(centred, mean - rows.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(tilted.theta, plain, atol=1e-3)
    np.testing.assert_allclose(tilted.weights, weights_at(centred, plain), rtol=5e-3)
    np.testing.assert_allclose(tilted.weights.mean(), 1, rtol=1e-6)
    assert tilted.weights.dtype == np.float32


def test_noise_shrinks_theta():
    """As the penalised dual in float64 does, with the shift that is told."""
    rows, mean, noise_std, n = rows_of(3000, 4, seed=1), np.array([0.3, 0.1, 0.0, -0.1]), 0.05, 1000
    tilted = weighting.fit(rows, mean, noise_std, n)
    center = rows.mean(axis=0, dtype=np.float64)
    variances = noise_std**2 + rows.var(axis=0, dtype=np.float64) * (1 / n + 1 / 3000)
    expected = plain_dual(rows - center, mean - center, variances / tilted.shift)
    np.testing.assert_allclose(tilted.theta, expected, atol=1e-3)
    assert np.linalg.norm(expected - plain_dual(rows - center, mean - center)) > 0.02  # the twin without penalties


def test_the_shift_is_the_most_likely_one():
    """Its likelihood against one over all shifts, not only those of the grid."""
    rows, mean, noise_std, n = rows_of(2000, 6, seed=2), 0.1 * np.arange(6) - 0.2, 0.03, 500
    tilted = weighting.fit(rows, mean, noise_std, n)
    moved = mean - rows.mean(axis=0, dtype=np.float64)
    spreads = rows.var(axis=0, dtype=np.float64)
    variances = noise_std**2 + spreads / n + spreads / 2000

    def cost(log_shift):
        variance = np.exp(log_shift) * spreads + variances
        return np.sum(np.log(variance) + moved**2 / variance) / 2

    best = optimize.minimize_scalar(cost, bounds=(np.log(1e-4), 0.0), method="bounded")
    assert abs(np.log(tilted.shift) - best.x) < np.log(10) / 10 + 1e-6  # a step of the grid
    np.testing.assert_allclose(tilted.evidence, cost(-np.inf) - best.fun, atol=0.05)


def test_no_shift_leaves_ones():
    rows = rows_of(2000, 5)
    tilted = weighting.fit(rows, rows.mean(axis=0, dtype=np.float64), 0.02, 1000)
    assert not tilted.accepted and tilted.effective_sample_size == 1 and tilted.log_mean == 0
    np.testing.assert_array_equal(tilted.weights, np.ones(2000, np.float32))
    np.testing.assert_array_equal(tilted.theta, np.zeros(5))


def test_support_that_does_not_overlap_is_refused():
    """No weights make up for it, however sure the shift is; one within the records is accepted."""
    rows = rows_of(2000, 3)
    outside = weighting.fit(rows, np.array([8.0, 0.0, 0.0]), 0.01, 1000)
    assert outside.evidence > 100 and outside.temper < 0.25 and not outside.accepted
    np.testing.assert_array_equal(outside.weights, np.ones(2000))
    assert weighting.fit(rows, np.array([0.8, 0.0, 0.0]), 0.01, 1000).accepted


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0, 2.0])
def test_no_few_records_speak_for_all(size):
    """Three quarters of them do, as (sum w)^2 / sum w^2 counts; the whole theta would leave fewer."""
    rows = rows_of(3000, 2)
    tilted = weighting.fit(rows, np.array([size, 0.0]), 0.005, 5000)
    w = np.asarray(tilted.weights, np.float64)
    found = w.sum() ** 2 / np.sum(w**2) / len(w)
    np.testing.assert_allclose(found, tilted.effective_sample_size, rtol=1e-5)
    assert found >= 0.75 - 1e-6
    if tilted.accepted and tilted.temper < 1:
        whole = weights_at(rows, tilted.theta / tilted.temper)
        assert abs(found - 0.75) < 1e-4 and 1 / np.mean(whole**2) < 0.74


def test_false_alarms_are_rare():
    """Fewer than one draw in fifty without a shift; nearly all with one; taking any evidence alarms too often."""
    rows, n, noise_std = rows_of(400, 6), 1000, 0.03
    rng = np.random.default_rng(7)

    def drawn(shift):
        """A private mean of other records, and its noise: public records are a sample as well."""
        mean = rng.normal(size=6) / np.sqrt(n) + noise_std * rng.normal(size=6)
        mean[0] += shift
        return mean

    def fitted(shift):
        public = rng.normal(size=(400, 6)).astype(np.float32)
        return weighting.fit(public, drawn(shift), noise_std, n)

    none = [fitted(0.0) for _ in range(250)]
    some = [weighting.fit(rows, drawn(0.35), noise_std, n) for _ in range(30)]
    assert np.mean([tilted.accepted for tilted in none]) < 0.02
    assert np.mean([tilted.accepted for tilted in some]) > 0.95
    assert np.mean([tilted.evidence > 0 for tilted in none]) > 0.04


def test_other_records_get_the_same_weights():
    """As a stream brings them: those of the same records are the same, and follow one formula."""
    public = {"x": jnp.asarray(rows_of(1500, 4))}
    fitted = features.fit(KEY, public, ())
    rows = np.asarray(features.apply_each(fitted, public))
    fitted = fitted._replace(l2_clip_norm=weighting.clip_norm(rows))
    clipped = weighting.clipped(rows, weighting.clip_norm(rows))
    tilted = weighting.fit(clipped, clipped.mean(axis=0) + 0.2 * clipped.std(axis=0), 0.01, 1000)
    assert tilted.accepted
    np.testing.assert_allclose(weighting.weights_of(tilted, fitted, public), tilted.weights, rtol=1e-4, atol=1e-5)
    one = weighting.weights_of(tilted, fitted, jax.tree.map(lambda a: a[:1], public))
    np.testing.assert_allclose(one, tilted.weights[:1], rtol=1e-4)


def test_rows_are_clipped():
    """A twentieth of the public rows, to the norm, in their direction; zeros stay."""
    rows = rows_of(1000, 3)
    rows[0] = 0
    clip_norm = weighting.clip_norm(rows)
    found = weighting.clipped(rows, clip_norm)
    norms = np.linalg.norm(rows, axis=1)
    assert np.sum(norms > clip_norm) == 50 and np.max(np.linalg.norm(found, axis=1)) <= clip_norm * (1 + 1e-6)
    np.testing.assert_array_equal(found[norms <= clip_norm], rows[norms <= clip_norm])
    np.testing.assert_allclose(found * norms[:, None], rows * np.linalg.norm(found, axis=1)[:, None], atol=1e-5)


@pytest.mark.parametrize(("n", "mu", "expected"), [(1000, 0.2, 0.1), (1000, 0.199, 0.0), (1, 200.0, 0.1), (1, 0.1, 0)])
def test_a_tenth_or_nothing_is_spent(n, mu, expected):
    assert weighting.share(n, mu) == expected


# --- training ---

N = 1000


def squared(params, record):
    """Also of a leaf that is not tuned, and one that the loss knows not."""
    return (record["x"] @ params["w"] * params["scale"] - record["y"]) ** 2 / 2


def problem(curved=1.0):
    """Public records of a line that bends, least squares of them, and weights of those with large x_0."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(N, 3))
    y = x @ np.array([1.0, -1.0, 0.5]) + curved * x[:, 0] ** 2 + 0.1 * rng.normal(size=N)
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    public = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    params = {"w": jnp.asarray(w, jnp.float32), "scale": jnp.ones(()), "other": jnp.arange(2.0)}
    weights = np.exp(0.5 * x[:, 0])
    return params, public, np.asarray(weights / weights.mean(), np.float32)


def trained(params, public, weights, space=None, steps=200, key=KEY, **options):
    space = subspace.full(params, where="^w$") if space is None else space
    return tilted_training.train(key, squared, params, space, public, weights, steps, **options)


def weighted_loss(params, public, weights):
    return jnp.mean(weights * jax.vmap(squared, (None, 0))(params, public))


def test_equal_weights_stay_at_a_stationary_point():
    params, public, _ = problem()
    found = trained(params, public, np.ones(N, np.float32))
    np.testing.assert_array_equal(found["w"], params["w"])


def test_equal_weights_move_nothing():
    """Of a convex loss: its slope there is taken off, so that more of the old training is none of the tilt's."""
    params, public, weights = problem()
    params["w"] = params["w"] + 0.3
    np.testing.assert_array_equal(trained(params, public, np.ones(N, np.float32))["w"], params["w"])
    assert np.any(trained(params, public, weights)["w"] != params["w"])


def test_the_weighted_loss_falls():
    """Towards its minimiser, which is known; leaves that are not tuned keep their bits."""
    params, public, weights = problem(curved=0.1)
    found = trained(params, public, weights, steps=400)
    x, root = np.asarray(public["x"], np.float64), np.sqrt(np.asarray(weights, np.float64))
    best = np.linalg.lstsq(x * root[:, None], np.asarray(public["y"]) * root, rcond=None)[0]
    before, after = (np.linalg.norm(np.asarray(p["w"]) - best) for p in (params, found))
    assert after < 0.3 * before
    assert weighted_loss(found, public, weights) < weighted_loss(params, public, weights)
    for name in ("scale", "other"):
        np.testing.assert_array_equal(found[name], params[name])


def test_held_coordinates_keep_their_bits():
    params, public, weights = problem()
    space = subspace.full(params, where="^w$")
    held = subspace.holding(space, [jnp.array([True, False, True])])
    found = np.asarray(trained(params, public, weights, space=held)["w"])
    assert found[1] == params["w"][1] and np.all(found[[0, 2]] != np.asarray(params["w"])[[0, 2]])
    assert trained(params, public, weights)["w"][1] != params["w"][1]  # not held, it moves


def test_a_subspace_is_kept():
    """Training moves along its directions alone."""
    params, public, weights = problem()
    space = subspace.span(
        params, {"w": jnp.array([[1.0, 1.0, 0.0]]), "scale": jnp.zeros(1), "other": jnp.zeros((1, 2))}
    )
    moved = np.asarray(trained(params, public, weights, space=space)["w"] - params["w"])
    assert abs(moved[0]) > 1e-3
    np.testing.assert_allclose(moved, moved[0] * np.array([1.0, 1.0, 0.0]), atol=1e-6)


def test_training_that_does_not_help_is_undone(monkeypatch):
    """Steps that lead away raise the weighted loss: the parameters are returned as they were."""
    params, public, weights = problem()
    assert np.any(trained(params, public, weights, steps=60)["w"] != params["w"])
    monkeypatch.setattr(tilted_training, "train_steps", lambda loss, steps, carry, *_: (carry[0] + 100, carry[1]))
    np.testing.assert_array_equal(trained(params, public, weights, steps=60)["w"], params["w"])


def test_the_slope_is_that_of_all_records():
    """By the dense oracle, in whatever pieces the records come; of padding nothing."""
    params, public, _ = problem()
    space = subspace.full(params, where="^w$")
    at = params | {"w": params["w"] + 0.2}
    expected = jax.grad(lambda w: weighted_loss(at | {"w": w}, public, 1.0))(at["w"])
    found = sum(
        count / N * tilted_training.public_slope(squared, at, space, part, count)
        for part, count in features.chunks(public, 300)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(tilted_training.public_slope(squared, params, space, public, N), 0, atol=1e-4)


def test_training_repeats_and_says_how_far_it_is():
    params, public, weights = problem()
    stages = []
    watched = trained(params, public, weights, steps=50, progress=stages.append)
    assert stages == [f"tilt, step {i} of 50" for i in range(0, 50, 5)]
    np.testing.assert_array_equal(watched["w"], trained(params, public, weights, steps=50)["w"])


def steps_for(num_public, width=4):
    params = {"w": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    record = {"x": jax.ShapeDtypeStruct((width,), jnp.float32)}
    return tilted_training.num_steps(lambda p, r: jnp.sum((p["w"] @ r["x"]) ** 2), params, record, num_public)


def test_steps_are_bounded():
    """By a thousand, by nine passes, in tens; a model too dear has none."""
    assert steps_for(10**6) == 1000 and steps_for(1280) == 90 and steps_for(1) == 10
    assert steps_for(10**6, width=5000) == 0
    dear = [steps_for(10**6, width) for width in (500, 1500, 2500)]
    assert dear[0] == 1000 > dear[1] > dear[2] >= 40 and all(n % 10 == 0 for n in dear)


def test_gradients_are_counted():
    assert tilted_training.num_gradients(0, 5000) == 0
    assert tilted_training.num_gradients(100, 5000) == 5000 + 100 * 128
    assert tilted_training.num_gradients(10, 50) == 50 + 10 * 50
