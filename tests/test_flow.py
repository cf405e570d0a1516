import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax.quadratic import empirical_bayes, secants, step_size
from qexp_jax.quadratic import posterior as posteriors
from qexp_jax.quadratic.components import decompose, recompose, scale, scaled
from qexp_jax.quadratic.posterior import CurvatureEstimate, before_release, signal_curvature

KEY = jax.random.key(29)
HOLD_OTHERS = jnp.array([1.0, 1.0, 1.0, 0.0])


def example(rest=7, shifts=(1e-3, 1e-2, 1e-1)):
    """Three leading directions in R^10, and the block of the other seven."""
    directions = jnp.linalg.qr(jax.random.normal(KEY, (3 + rest, 3)))[0].T
    return CurvatureEstimate(
        directions, jnp.array([2.0, 1.0, 0.5, 0.1]), jnp.array([4.0, 2.0, 1.0, 0.25]),
        jnp.array([1.0, 1.0, 1.0, rest]), jnp.array(shifts), jnp.zeros(len(shifts)),
    )  # fmt: skip


def observe(posterior, estimate, seen, *args):
    return step_size.observe(posterior, estimate, decompose(estimate.directions, seen), *args)


def energies(estimate, x):
    return posteriors.energies(estimate, decompose(estimate.directions, x))


def dense_curvature(estimate):
    v = np.asarray(estimate.directions, float)
    k = np.asarray(estimate.curvature, float)
    return k[-1] * np.eye(v.shape[1]) + v.T @ np.diag(k[:-1] - k[-1]) @ v


def test_energies_and_scale_agree_with_the_dense_matrices():
    estimate, x = example(), jax.random.normal(KEY, (10,))
    energy = energies(estimate, x)
    np.testing.assert_allclose(jnp.vdot(estimate.dims, energy), jnp.vdot(x, x), rtol=1e-5)
    np.testing.assert_allclose(energy[:3], (estimate.directions @ x) ** 2, rtol=1e-5)
    scaled = scale(estimate.directions, estimate.curvature, x)
    np.testing.assert_allclose(scaled, dense_curvature(estimate) @ x, rtol=1e-4, atol=1e-5)


def simulated_excess(estimate, num_units, noise_var, length, share, count=40_000):
    """Mean excess of simulated flows, where the first `share` of the block of the others holds its signal."""
    moments, curvature = (np.asarray(x, float) for x in (estimate.moments, estimate.curvature))
    dim = estimate.directions.shape[1]
    rng, rest, signals = np.random.default_rng(0), dim - 3, np.zeros(dim)
    steep = max(1, round(share * rest))
    signals[:3], signals[3 : 3 + steep] = moments[:3], moments[3] * rest / steep
    # The block's mean curvature, all of it above what the signal leaves; the flow sees the true curvature.
    true = np.append(curvature[:3], np.full(rest, curvature[3]))
    true[3 : 3 + steep] = curvature[:3].min()
    g = rng.normal(size=(count, dim)) * np.sqrt(0.05 * signals)
    seen = g + rng.normal(size=g.shape) * np.sqrt(1.5 * signals / num_units + noise_var)
    error = g / true - seen * (1 - np.exp(-length * true)) / true
    return np.mean(np.sum(true * error**2, axis=1)) / 2


def test_the_expected_excess_is_that_of_simulated_gradient_flows():
    num_units, noise_var, length = 20, 0.1, 0.7
    flat = example()._replace(curvature=jnp.array([2.0, 1.0, 0.1, 0.1]))
    measured = simulated_excess(flat, num_units, noise_var, length, share=1.0)
    predicted = step_size.excess(length, 0.05 * flat.moments, flat, noise_var, num_units)
    np.testing.assert_allclose(predicted, measured, rtol=0.02)
    assert abs(step_size.excess(length, 0.05 * flat.moments, flat, 4 * noise_var, num_units) / measured - 1) > 0.1


def test_a_blocks_signal_is_taken_to_lie_where_it_is_steep():
    estimate = example(rest=200)._replace(curvature=jnp.array([2.0, 1.0, 0.5, 0.02]))
    measured = simulated_excess(estimate, 20, 1e-4, 3.0, share=0.01)
    signals = 0.05 * estimate.moments
    np.testing.assert_allclose(step_size.excess(3.0, signals, estimate, 1e-4, 20), measured, rtol=0.03)
    naive = estimate._replace(curvature=jnp.array([2.0, 1.0, 0.02, 0.02]))
    assert step_size.excess(3.0, signals, naive, 1e-4, 20) > 5 * measured


@functools.partial(jax.jit, static_argnames="rounds")
def rounds_of(estimate, private_curvature, noise_std, rounds, length, key=KEY):
    """The posterior after rounds on a quadratic with `private_curvature` (k, k), and its gradient at the start."""
    scales = jnp.sqrt(jnp.append(estimate.moments[:3], jnp.full(7, 0.25)))
    start = scales * jax.random.normal(jax.random.key(1), (10,))

    def one(carried, noise_key):
        posterior, gradient = carried
        seen = gradient + noise_std * jax.random.normal(noise_key, (10,))
        posterior = observe(posterior, estimate, seen, noise_std**2)
        multiples, posterior = step_size.advance(posterior, estimate, length, 10**6)
        return (posterior, gradient - private_curvature @ scale(estimate.directions, multiples, seen)), None

    carried = before_release(estimate), start
    return jax.lax.scan(one, carried, jax.random.split(key, rounds))[0][0], start


@pytest.mark.parametrize(("times", "others"), [(1.5, 1.5), (4.0, 30.0), (9.0, 3.0)])
def test_the_steepness_of_the_private_curvature_is_found_in_the_leading_directions_and_in_the_others(times, others):
    estimate = example()._replace(directions=jnp.eye(10)[:3])
    public = signal_curvature(estimate)
    private = jnp.diag(jnp.append(times * public[:3], jnp.full(7, others * public[-1])))
    found, _ = rounds_of(estimate, private, 1e-3, 4, 0.1)
    np.testing.assert_allclose(secants.curvature_ratio(found, estimate, 10**6), [times] * 3 + [others], rtol=0.02)


def test_the_prior_of_the_steepness_is_kept_under_noise():
    estimate = example()._replace(directions=jnp.eye(10)[:3])

    def hidden(key):
        found, _ = rounds_of(estimate, 4 * dense_curvature(estimate), 1e3, 4, 0.1, key)
        return secants.curvature_ratio(found, estimate, 10**6)

    np.testing.assert_allclose(jnp.median(jax.jit(jax.vmap(hidden))(jax.random.split(KEY, 100)), axis=0), 2.0, rtol=0.1)
    np.testing.assert_allclose(secants.curvature_ratio(before_release(estimate), estimate, 10**6), 2.0)


def test_a_gradient_that_is_large_for_its_moments_is_expected_to_be_as_steep_as_its_own_square():
    """The largest generalised eigenvalue of V + g g^T against V, in the leading directions."""
    estimate = example()._replace(directions=jnp.eye(10)[:3])
    g = jnp.append(3 * jnp.sqrt(estimate.moments[:3]), jnp.zeros(7))
    posterior = observe(before_release(estimate), estimate, g, 1e-9)
    moments = jnp.diag(estimate.moments[:3])
    largest_ratio = jnp.linalg.eigvals(jnp.linalg.solve(moments, moments + jnp.outer(g[:3], g[:3]))).real.max()
    curvature_ratio = secants.curvature_ratio(posterior, estimate, 10**6)
    np.testing.assert_allclose(curvature_ratio, [largest_ratio] * 3 + [2.0], rtol=0.02)


def test_the_measured_and_the_public_curvature_have_no_bias_under_noise():
    estimate = example()._replace(directions=jnp.eye(10)[:3])
    g, followed = jnp.append(jnp.array([2.0, -1.0, 1.5]), jnp.full(7, 0.8)), jnp.array([0.4, 0.3, 0.2, 0.5])
    curvature, steps = signal_curvature(estimate), jnp.append(followed[:3], jnp.full(7, followed[3]))
    private = jnp.append(curvature[:3], jnp.full(7, estimate.curvature[3]))  # the others as noise meets them

    def one(key):
        first, second = jax.random.split(key)
        y = g + jax.random.normal(first, (10,))
        later = g - private * steps * y + jax.random.normal(second, (10,))
        last = decompose(estimate.directions, y)
        posterior = before_release(estimate)._replace(last=last, last_var=jnp.array(1.0), followed=followed)
        naive = jnp.vdot(steps[:3] * y[:3], (y - later)[:3])
        return secants.secant(posterior, estimate, decompose(estimate.directions, later)), naive

    pairs, naive = jax.jit(jax.vmap(one))(jax.random.split(KEY, 200_000))
    moved = (steps * g) ** 2
    by_block = [jnp.vdot(curvature[:3], moved[:3]), jnp.sum(moved[3:])]
    expected = [[by_block[0], estimate.curvature[3] * by_block[1]], [by_block[0], curvature[3] * by_block[1]]]
    np.testing.assert_allclose(jnp.mean(pairs, axis=0), expected, rtol=0.01, atol=0.015)  # three standard errors
    assert jnp.mean(naive) > 1.5 * by_block[0]


def final_excess(times, length_of, dim=60, rank=40, rounds=80):
    """After rounds whose noise is as large as the gradient, along which alone the private curvature is steep.

    For each of `times` as steep as the public one.
    """
    curvature = jnp.append(jnp.geomspace(2.0, 0.02, rank), 0.02)
    shifts = (jnp.asarray(x, jnp.float32) for x in empirical_bayes.shift_prior(2000))
    dims = jnp.append(jnp.ones(rank), dim - rank)
    estimate = CurvatureEstimate(jnp.eye(dim)[:rank], curvature, curvature, dims, *shifts)
    public = jnp.append(curvature[:-1], jnp.full(dim - rank, 0.02))
    g = jnp.sqrt(0.1 * public) * jax.random.normal(jax.random.key(1), (dim,))
    along = jnp.vdot(g, public * g) / jnp.vdot(g, g) ** 2 * jnp.outer(g, g)
    noise_var = jnp.vdot(g, g) / dim

    def one(private, carried, key):
        posterior, x = carried
        seen = g + private @ x + jnp.sqrt(noise_var) * jax.random.normal(key, (dim,))
        posterior = observe(posterior, estimate, seen, noise_var)
        length = length_of(posterior, estimate, noise_var, rounds)
        multiples, posterior = step_size.advance(posterior, estimate, length, 10**6)
        return (posterior, x - scale(estimate.directions, multiples, seen)), None

    def run(curvature_ratio, key):
        private = jnp.diag(public) + curvature_ratio * along
        start = before_release(estimate), jnp.zeros(dim)
        (_, x), _ = jax.lax.scan(functools.partial(one, private), start, jax.random.split(key, rounds))
        error = x + jnp.linalg.solve(private, g)
        return error @ private @ error / 2

    over_keys = jax.vmap(run, in_axes=(None, 0))
    return jnp.mean(jax.jit(jax.vmap(over_keys, in_axes=(0, None)))(times, jax.random.split(KEY, 100)), axis=1)


def planned(posterior, estimate, noise_var, rounds):
    """The rounds' shares of the length of least J."""
    signal = empirical_bayes.pooled_signal(posterior, estimate, 10**6)
    return step_size.best_length(signal, estimate, noise_var / rounds, 10**6, 20.0)[0] / rounds


def of_its_own(posterior, estimate, noise_var, rounds):
    return step_size.best_step(posterior, estimate, noise_var, 10**6, 20.0 / rounds)[0]


def test_a_gradient_that_one_step_consumes_is_not_followed_by_rounds_of_noise():
    of_all, by_itself = (final_excess(jnp.array([50.0]), length_of) for length_of in (planned, of_its_own))
    assert by_itself < 0.9 * of_all  # what it allows for noise costs some


def test_the_recent_mean_has_the_latest_releases_with_the_most_weight_and_the_stated_variance():
    estimate, posterior = example(), before_release(example())
    seen, noise_vars = jax.random.normal(KEY, (4, 10)), jnp.array([1.0, 3.0, 0.5, 2.0])
    for y, noise_var, tuned in zip(seen, noise_vars, (1.0, HOLD_OTHERS, 1.0, 1.0), strict=True):
        posterior = observe(posterior, estimate, y, noise_var, tuned)
    leading, others = jnp.array([1, 2, 3, 4]) / 10, jnp.array([1, 0, 2, 3]) / 6
    np.testing.assert_allclose(posterior.recent.leading, leading @ seen @ estimate.directions.T, rtol=1e-4)
    outside = jnp.eye(10) - estimate.directions.T @ estimate.directions
    np.testing.assert_allclose(posterior.recent.others, outside @ (others @ seen), rtol=1e-4, atol=1e-6)
    expected = [leading**2 @ noise_vars] * 3 + [others**2 @ noise_vars]
    np.testing.assert_allclose(posterior.recent_var, expected, rtol=1e-5)
    np.testing.assert_array_equal(posterior.times, [4, 4, 4, 3])


def test_rounds_that_hold_a_block_count_since_it_was_tuned():
    posterior, found = before_release(example()), []
    for tuned in (HOLD_OTHERS, 1.0, HOLD_OTHERS, HOLD_OTHERS):
        posterior = observe(posterior, example(), jnp.ones(10), 1.0, tuned)
        found.append([float(posterior.idle[0]), float(posterior.idle[-1])])
    assert found == [[0, float("inf")], [0, 0], [0, 1], [0, 2]]


def test_the_signal_left_is_what_the_latest_releases_show_but_for_one_standard_deviation_of_the_noises_energy():
    """Seen eight times, a tenth of the gradient of the first release; with a prior that lets it be as large."""
    estimate = example(rest=997, shifts=(100.0,))._replace(directions=jnp.eye(1000)[:3])
    g = jnp.append(jnp.array([2.0, -1.0, 1.5]), jax.random.normal(jax.random.key(1), (997,)))
    noise_std = 3.0

    def found(key):
        posterior = observe(before_release(estimate), estimate, 10 * g, 1e-6)
        for k in jax.random.split(key, 8):
            posterior = observe(posterior, estimate, g + noise_std * jax.random.normal(k, (1000,)), noise_std**2)
        left = empirical_bayes.debiased_energy(posterior, estimate, 10**9)
        return jnp.stack([jnp.sum(left[:3]), 997 * left[-1]])

    weights = np.arange(1, 10) / 45
    shown, noise_var = (10 * weights[0] + weights[1:].sum()) ** 2, noise_std**2 * np.sum(weights[1:] ** 2)
    energy = jnp.array([jnp.sum(g[:3] ** 2), jnp.sum(g[3:] ** 2)])
    spread = noise_var * np.sqrt(2 * np.array([3, 997]))
    left = jax.jit(jax.vmap(found))(jax.random.split(KEY, 1000))
    np.testing.assert_allclose(jnp.mean(left, axis=0), shown * energy + spread, rtol=0.02)
    assert jnp.all(spread > 0.03 * shown * energy)  # without it, or with the noise's energy left in, the above fails


def test_no_more_is_left_than_there_was_and_what_was_never_tuned_keeps_it_all():
    estimate, seen = example(), jax.random.normal(KEY, (10,))
    before = before_release(estimate)
    np.testing.assert_array_equal(
        empirical_bayes.debiased_energy(before, estimate, 100), empirical_bayes.pooled_signal(before, estimate, 100)
    )  # fmt: skip
    posterior = observe(before, estimate, seen, 0.5, HOLD_OTHERS)
    left, had = (f(posterior, estimate, 100) for f in (empirical_bayes.debiased_energy, empirical_bayes.pooled_signal))
    assert left[-1] == had[-1]
    np.testing.assert_array_equal(left, had)  # together they show more than that
    quieter = posterior._replace(recent=scaled(jnp.full(4, 0.01), posterior.recent))
    assert jnp.sum(empirical_bayes.debiased_energy(quieter, estimate, 100)[:-1]) < jnp.sum(had[:-1])
    louder = posterior._replace(recent=scaled(jnp.full(4, 100.0), posterior.recent))
    np.testing.assert_array_equal(
        empirical_bayes.debiased_energy(louder, estimate, 100), empirical_bayes.pooled_signal(louder, estimate, 100)
    )


def test_loud_noise_does_not_hide_what_many_leading_directions_have_left_together():
    """Five releases of a known gradient under noise four times as loud in each of 64 directions.

    Held to what there was at theta_0 one by one, the directions' sum would be far below zero in all of 500.
    """
    ones = jnp.ones(65)
    estimate = example(shifts=(100.0,))._replace(
        directions=jnp.eye(80)[:64], curvature=ones, moments=ones, dims=ones.at[-1].set(16.0)
    )
    g = jax.random.normal(jax.random.key(1), (80,))

    def found(key):
        posterior = observe(before_release(estimate), estimate, g, 1e-6)
        for k in jax.random.split(key, 5):
            posterior = observe(posterior, estimate, g + 4 * jax.random.normal(k, (80,)), 16.0)
        return jnp.sum(empirical_bayes.debiased_energy(posterior, estimate, 10**9)[:64])

    left, had = jax.jit(jax.vmap(found))(jax.random.split(KEY, 500)), jnp.sum(g[:64] ** 2)
    assert jnp.mean(left > 0) > 0.9 and jnp.median(left) > 0.5 * had
    assert jnp.max(left) < 1.001 * had


@pytest.mark.parametrize(("times", "noise_std"), [(1.0, 3.0), (6.0, 0.3)])
def test_the_best_step_lowers_the_loss_most_by_itself(times, noise_std):
    """The private curvature is `times` the public one along the signal; noise meets the public one."""
    estimate = example(rest=40, shifts=(100.0,))._replace(directions=jnp.eye(43)[:3])
    g, xi = jax.random.normal(jax.random.key(1), (43,)), noise_std * jax.random.normal(KEY, (4000, 43))
    posterior = observe(before_release(estimate), estimate, g, 1e-6)
    posterior = posterior._replace(slopes=1e9 * jnp.array([[times, times], [1.0, 1.0]]))  # measured for good
    along, public = (
        jnp.append(x[:3], jnp.full(40, x[3])) for x in (signal_curvature(estimate), estimate.curvature)
    )  # fmt: skip

    def change(length):
        steps = -jnp.expm1(-length * times * along) / (times * along)
        signal = -jnp.sum(steps * g**2) + times * jnp.sum(along * (steps * g) ** 2) / 2
        return signal + jnp.mean(jnp.sum(public * (steps * xi) ** 2, axis=1)) / 2

    costs = jax.jit(jax.vmap(change))(step_size.lengths_up_to(20.0))
    best, lowered = step_size.best_step(posterior, estimate, noise_std**2, 10**9, 20.0)
    assert jnp.min(costs) < 0 and change(best) < 0.999 * jnp.min(costs)
    assert lowered == pytest.approx(float(change(best)), rel=0.02)
    louder, silent = (step_size.best_step(posterior, estimate, v, 10**9, 20.0)[0] for v in (4 * noise_std**2, 1e-9))
    assert louder < best < silent


def test_where_no_signal_is_left_the_best_step_is_the_shortest():
    estimate = example()
    posterior = observe(before_release(estimate), estimate, jnp.full(10, 1e-6), 1.0)
    length, change = step_size.best_step(posterior, estimate, 1.0, 10**6, 5.0)
    assert length == pytest.approx(5 / 64) and change > 0
    held = observe(before_release(estimate), estimate, jnp.ones(10), 0.01, HOLD_OTHERS)
    alone = estimate._replace(dims=HOLD_OTHERS)  # of directions held fixed neither signal nor noise counts
    lengths = [step_size.best_step(held, s, 0.01, 10**6, 5.0, HOLD_OTHERS) for s in (estimate, alone)]
    np.testing.assert_array_equal(*lengths)


def test_no_flow_passes_the_minimum_of_a_quadratic_as_steep_as_measured():
    estimate = example()
    posterior, _ = rounds_of(estimate, 6 * dense_curvature(estimate), 1e-3, 4, 0.2)
    multiples, _ = step_size.advance(posterior, estimate, 1e6, 10**6)
    rates = secants.curvature_ratio(posterior, estimate, 10**6) * signal_curvature(estimate)
    np.testing.assert_allclose(multiples * rates, -np.expm1(-4 * rates / estimate.curvature.max()), rtol=1e-5)
    assert 0.98 < jnp.max(multiples * rates) <= 1
    short, _ = step_size.advance(posterior, estimate, 1e-6, 10**6)
    np.testing.assert_allclose(short, 1e-6, rtol=1e-4)


def valley(width, remember, rounds=40):
    """Positions, from 1 on, along the first direction, where the slope is nearly constant outside a valley at 0."""
    estimate = example()._replace(directions=jnp.eye(10)[:3])

    def one(carried, _):
        posterior, x = carried
        seen = jnp.zeros(10).at[0].set(3 * (jax.nn.sigmoid(x / width) - 0.5))
        posterior = observe(posterior, estimate, seen, 1e-6)
        posterior = posterior if remember else posterior._replace(largest_ratio=jnp.zeros(2))
        multiples, posterior = step_size.advance(posterior, estimate, 1.0, 10**6)
        return (posterior, x - multiples[0] * seen[0]), x

    return jax.lax.scan(one, (before_release(estimate), 1.0), length=rounds)[1]


@pytest.mark.parametrize("width", [0.01, 0.001])
def test_a_narrow_valley_is_not_jumped_over_forever(width):
    assert jnp.abs(valley(width, remember=True)[-1]) < width / 100
    assert jnp.abs(valley(width, remember=False)[-10:]).max() > 5 * width


@pytest.mark.parametrize("noise_std", [0.01, 0.3, 10.0])
def test_noise_does_not_pass_for_a_minimum_that_was_passed(noise_std):
    estimate = example()._replace(directions=jnp.eye(10)[:3])

    def largest_ratio(key):
        return rounds_of(estimate, 4 * dense_curvature(estimate), noise_std, 24, 0.3, key)[0].largest_ratio

    found = jax.jit(jax.vmap(largest_ratio))(jax.random.split(KEY, 300))
    assert jnp.mean(found[:, 0] > 8) < 0.06 and jnp.mean(found[:, 1] > 0) < 0.06


def test_a_passed_minimum_shows_no_more_steepness_than_there_is_however_little_of_a_step_was_signal():
    """One direction of a large block is jumped over and over, with a step hardly longer than its noise is.

    Over the public curvature's estimate, not its upper limit, the largest of 20,000 would be ninety times the truth.
    """
    estimate = example(rest=997)._replace(directions=jnp.eye(1000)[:3])
    followed, jumped = jnp.array([0.1, 0.1, 0.1, 1.0]), 2.2  # private curvature times step
    truth = jumped / (followed[-1] * signal_curvature(estimate)[-1])

    def largest_ratio(key):
        first, second = jax.random.split(key)
        g = jnp.zeros(1000).at[500].set(10.0)
        y = g + jax.random.normal(first, g.shape)
        later = g.at[500].add(-jumped * y[500]) + jax.random.normal(second, g.shape)
        last = decompose(estimate.directions, y)
        posterior = before_release(estimate)._replace(last=last, last_var=jnp.array(1.0), followed=followed)
        return observe(posterior, estimate, later, 1.0).largest_ratio[1]

    found = jax.jit(lambda keys: jax.lax.map(largest_ratio, keys, batch_size=500))(jax.random.split(KEY, 20_000))
    assert jnp.mean(found > 0) > 0.3 and found.max() < truth


def remembered(posterior, estimate):
    """The gradient at theta_0."""
    return recompose(estimate.directions, scaled(1 / posterior.weights, posterior.gradients))


def test_the_initial_gradient_is_remembered_through_the_flow_with_the_stated_variance():
    estimate = example()._replace(curvature=jnp.array([2.0, 1.0, 0.1, 0.1]))
    private = 2.0 * dense_curvature(estimate)  # the curvature_ratio expected
    posterior, gradient = rounds_of(estimate, private, 1e-4, 8, 0.3)
    np.testing.assert_allclose(remembered(posterior, estimate), gradient, atol=5e-3)
    mean = recompose(estimate.directions, posterior.gradients) / 8
    assert jnp.linalg.norm(mean - gradient) > 0.3 * jnp.linalg.norm(gradient)

    def energy(key):
        found, _ = rounds_of(estimate, 0 * private, 1.0, 4, 1e-9, key)
        return jnp.sum((remembered(found, estimate) - gradient) ** 2)

    mean = jnp.mean(jax.jit(jax.vmap(energy))(jax.random.split(KEY, 2000)))
    np.testing.assert_allclose(mean, 10 / 4, rtol=0.05)


def test_the_best_length_is_the_least_of_the_excess_and_grows_with_signal_over_noise():
    estimate = example()

    def best(shift, noise_var):
        return step_size.best_length(shift * estimate.moments, estimate, noise_var, 1000, 50.0)[0]

    lengths = jnp.geomspace(50 / 64, 50, 49)
    costs = [step_size.excess(length, 0.1 * estimate.moments, estimate, 0.05, 1000) for length in lengths]
    np.testing.assert_allclose(best(0.1, 0.05), lengths[np.argmin(costs)], rtol=1e-5)
    _, cost = step_size.best_length(0.1 * estimate.moments, estimate, 0.05, 1000, 50.0)
    np.testing.assert_allclose(cost, np.min(costs), rtol=1e-5)
    # e^{-L K} is the share of sampling error in the signal, where noise has none: L = 17.6 at K = .5.
    assert best(10.0, 1e-9) == pytest.approx(17.6, rel=0.1) and best(1e-8, 1.0) == pytest.approx(50 / 64, rel=1e-5)
    flat = estimate._replace(curvature=jnp.array([2.0, 1.0, 0.1, 0.1]))
    assert step_size.best_length(10 * flat.moments, flat, 1e-9, 1000, 50.0)[0] > 40
    assert best(0.1, 0.1) < best(0.1, 0.01) and best(0.01, 0.05) < best(0.1, 0.05)


def test_the_signal_is_the_posterior_mean_of_a_grid_computed_in_full():
    estimate, noise_var, num_units = example(), 0.02, 50
    estimate = estimate._replace(log_prior=-2 * jnp.log(estimate.shifts))
    x = np.asarray(0.3 * jax.random.normal(jax.random.key(3), (10,)), float)
    energy = energies(estimate, jnp.asarray(x, jnp.float32))
    moments, dims = np.asarray(estimate.moments, float), np.asarray(estimate.dims, float)
    expected = moments * [1, 1, 1, 0.5]  # of the others half
    error, log_evidence, means = 1.5 * moments / num_units + noise_var, [], []
    for tau in np.asarray(estimate.shifts, float):
        total = tau * expected + error
        log_evidence.append(-2 * np.log(tau) - 0.5 * np.sum(dims * (np.log(total) + np.asarray(energy, float) / total)))
        share = tau * expected / total
        means.append(share**2 * np.asarray(energy, float) + tau * expected * (1 - share))
    weight = np.exp(log_evidence - np.max(log_evidence))
    expected = weight @ np.array(means) / weight.sum()
    np.testing.assert_allclose(empirical_bayes.signal(energy, estimate, noise_var, num_units), expected, rtol=1e-4)


def test_the_shift_is_found_where_there_is_signal_and_the_prior_kept_where_there_is_not():
    estimate = example(rest=5000, shifts=tuple(np.geomspace(1e-4, 1e-1, 13)))
    scale = jnp.sqrt(jnp.append(estimate.moments[:3], jnp.full(5000, estimate.moments[3])))
    g = 0.1 * scale * jax.random.normal(KEY, (5003,))  # tau = .01; axes serve as directions
    estimate = estimate._replace(directions=jnp.eye(5003)[:3])
    found = empirical_bayes.signal(energies(estimate, g), estimate, 1e-6, 10**6)
    assert 0.5 < jnp.vdot(estimate.dims, found) / jnp.vdot(g, g) < 1.5
    hidden = empirical_bayes.signal(energies(estimate, g), estimate, 1e4, 10**6)
    prior = jnp.mean(estimate.shifts) * estimate.moments * jnp.array([1.0, 1.0, 1.0, 0.5])
    np.testing.assert_allclose(hidden, prior, rtol=0.05)


def test_a_spectrum_without_a_rest_is_a_spectrum():
    estimate = example(rest=0)._replace(directions=jnp.eye(3), dims=jnp.array([1.0, 1.0, 1.0, 0.0]))
    energy = energies(estimate, jnp.array([0.1, 0.2, 0.3]))
    assert jnp.all(jnp.isfinite(empirical_bayes.signal(energy, estimate, 0.1, 100)))
    assert jnp.all(jnp.isfinite(jnp.stack(step_size.best_length(energy, estimate, 0.1, 100, 5.0))))


def test_a_round_that_holds_the_others_moves_and_learns_nothing_there():
    estimate, seen = example(), jax.random.normal(KEY, (10,))
    posterior = observe(before_release(estimate), estimate, seen, 0.5, HOLD_OTHERS)
    multiples, posterior = step_size.advance(posterior, estimate, 0.3, 10**6, HOLD_OTHERS)
    assert multiples[-1] == 0 and posterior.left[-1] == 1 and posterior.weights[-1] == 0 and jnp.all(multiples[:3] > 0)
    np.testing.assert_array_equal(posterior.gradients.others, 0)
    whole = observe(before_release(estimate), estimate, seen, 0.5)
    assert whole.weights[-1] > 0 and jnp.all(posterior.weights[:3] == whole.weights[:3])


def test_what_was_never_tuned_keeps_the_prior_at_the_shift_that_the_others_show():
    estimate = example(shifts=tuple(np.geomspace(1e-3, 1, 13)))._replace(directions=jnp.eye(10)[:3])
    before = empirical_bayes.pooled_signal(before_release(estimate), estimate, 10**6)
    np.testing.assert_allclose(before, jnp.mean(estimate.shifts) * estimate.moments * (1 - 0.5 * (1 - HOLD_OTHERS)))

    def others_after(size):
        g = size * jnp.append(jnp.sqrt(estimate.moments[:3]), jnp.full(7, 1e3))
        posterior = observe(before_release(estimate), estimate, g, 1e-6, HOLD_OTHERS)
        return empirical_bayes.pooled_signal(posterior, estimate, 10**6)[-1]

    assert 3 * others_after(0.05) < before[-1] < others_after(1.0) / 3


@pytest.mark.parametrize("shift", [1e-3, 0.1])
def test_the_pooled_shift_is_the_one_that_the_gradients_have(shift):
    estimate = example(rest=500, shifts=tuple(np.geomspace(1e-4, 1, 25)))
    estimate = estimate._replace(directions=jnp.eye(503)[:3])
    scales = jnp.sqrt(shift * estimate.moments * jnp.array([1.0, 1.0, 1.0, 0.5]))  # of the others half
    g = jnp.append(scales[:3], jnp.full(500, scales[3])) * jax.random.normal(KEY, (503,))
    posterior = observe(before_release(estimate), estimate, g, 1e-9)
    np.testing.assert_allclose(empirical_bayes.pooled_shift(posterior, estimate, 10**7), shift, rtol=0.3)


def test_releases_of_unequal_noise_are_weighed_by_it():
    """Two looks at one gradient with variances 1 and 4: the mean of least variance has 4/5."""
    estimate, g = example(), jax.random.normal(jax.random.key(1), (10,))

    def error(key):
        posterior = before_release(estimate)
        for k, std in zip(jax.random.split(key), (1.0, 2.0), strict=True):
            posterior = observe(posterior, estimate, g + std * jax.random.normal(k, (10,)), std**2)
        found = remembered(posterior, estimate)
        return jnp.append(jnp.mean((found - g) ** 2), 1 / posterior.weights[0])

    mean, stated = jnp.mean(jax.jit(jax.vmap(error))(jax.random.split(KEY, 4000)), axis=0)
    np.testing.assert_allclose([mean, stated], 0.8, rtol=0.03)


def test_the_excess_of_a_round_that_holds_the_others_is_that_of_the_leading_ones_and_the_others_signal():
    estimate = example()
    signals, alone = 0.1 * estimate.moments, estimate._replace(dims=HOLD_OTHERS)
    held = step_size.excess(0.7, signals, estimate, 0.1, 20, HOLD_OTHERS)
    rest = 7 * signals[-1] / (2 * estimate.curvature[:3].min())
    np.testing.assert_allclose(held, step_size.excess(0.7, signals, alone, 0.1, 20) + rest, rtol=1e-5)
