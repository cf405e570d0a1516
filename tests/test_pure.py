"""Pure epsilon: exact laws with twins that are rejected, and log-ratios that touch the claim and never exceed it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import quadratic_from, spd
from scipy import special, stats

from qexp_jax import NeighboringRelation, accuracy, mechanism, precision, privacy, pure, truncated

KEY = jax.random.key(23)
ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL
MATRIX = spd(KEY, 4)
DRAWS = 1500
TOTALS = jnp.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, np.nextafter(np.float32(4), np.float32(5))]])


# --- The Gaussian restricted to a ball ---


def radius_cdf(dim, concentration, centre):
    """CDF of |y|^2: a noncentral chi-square variable, cut off at 1."""
    law = stats.ncx2(dim, concentration * centre**2 + 1e-12)
    return lambda square: law.cdf(concentration * square) / law.cdf(concentration)


def axial_cdf(dim, concentration, centre):
    """CDF of t from the other order of integration: all of the ball's slice at t, an incomplete gamma function."""
    t = np.linspace(-1, 1, 400_001)
    slices = special.gammainc((dim - 1) / 2, concentration * (1 - t**2) / 2) if dim > 1 else 1.0
    masses = np.cumsum(np.exp(-concentration / 2 * ((t - centre) ** 2 - max(0, centre - 1) ** 2)) * slices)
    return lambda x: np.interp(x, t, masses / masses[-1])


@functools.partial(jax.jit, static_argnums=(1, 2))
def draws(mean, concentration, count):
    one = lambda key: truncated.draw(key, mean, concentration, num_cells=512)
    return jax.lax.map(one, jax.random.split(KEY, count), batch_size=250)


def sample(dim, concentration, centre, count=DRAWS):
    """Draws around a mean in a generic direction, and their coordinates along it."""
    axis = np.asarray(jax.random.normal(jax.random.key(dim), (dim,)))
    axis = axis / np.linalg.norm(axis)
    y = np.asarray(draws(jnp.asarray(centre * axis), concentration, count), float)
    return y, y @ axis


CASES = [(1, 30.0, 1.5), (3, 8.0, 0.0), (3, 8.0, 0.6), (3, 8.0, 1.3), (1500, 900.0, 0.7)]


@pytest.mark.parametrize(("dim", "concentration", "centre"), CASES)
def test_draws_in_the_ball_follow_the_exact_law_and_a_wrong_scale_is_rejected(dim, concentration, centre):
    y, t = sample(dim, concentration, centre)
    squares = np.sum(y**2, axis=1)
    assert squares.max() <= 1 + 1e-5
    wrong = 1.4 * concentration + 10
    if dim < 1000:  # the slices of many dimensions underflow
        assert stats.kstest(t, axial_cdf(dim, concentration, centre)).pvalue > 1e-3
        assert stats.kstest(t, axial_cdf(dim, wrong, centre)).pvalue < 1e-6
    assert stats.kstest(squares, radius_cdf(dim, concentration, centre)).pvalue > 1e-3
    if centre > 0:
        assert stats.kstest(squares, radius_cdf(dim, wrong, centre)).pvalue < 1e-6 or dim <= 3


def test_directions_across_the_axis_are_uniform():
    y, t = sample(3, 8.0, 0.6)
    axis = np.asarray(jax.random.normal(jax.random.key(3), (3,)), float)
    basis = np.linalg.svd(axis[None])[2][1:]
    angle = np.arctan2(*(y @ basis.T).T) / (2 * np.pi) + 0.5
    assert stats.kstest(angle, "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(angle, t).statistic) < 0.06


def interpolation_errors(dim, concentration, centre, num_cells):
    """Interpolated minus exact log-density in tau, in float64, within cells and tails."""
    chi = truncated._nodes(num_cells)
    log_rho2, log_b2 = truncated._log_squares(chi)
    tau = log_rho2 - log_b2

    def exact(tau):
        b2, rho2 = special.expit(-tau), special.expit(tau)
        fixed = (dim - 1) / 2 * np.log(rho2) + 1.5 * np.log(b2) - concentration / 2 * rho2
        return fixed + truncated._centred_part(concentration, centre, np.sqrt(b2), np)

    shares, beyond, heights = (np.arange(4) + 0.5) / 4, np.geomspace(1e-3, 60, 100), exact(tau)
    inner = tau[:-1, None] + np.diff(tau)[:, None] * shares
    errors = [
        heights[:-1, None] + np.diff(heights)[:, None] * shares - exact(inner),
        heights[0] - (dim - 1) / 2 * beyond - exact(tau[0] - beyond),
        heights[-1] - 1.5 * beyond - exact(tau[-1] + beyond),
    ]
    return np.concatenate([e.ravel() for e in errors])


def test_the_density_error_is_bounded_as_stated_and_the_bound_is_nearly_attained():
    num_cells, shares = 1024, []
    for dim in (2, 3, 50, 5000):
        for concentration in (0.1, 3.0, 1e3, 1e5):
            for centre in (0.0, 0.3, 0.9, 1.0, 1.2, 2.0):
                errors = interpolation_errors(dim, concentration, centre, num_cells)
                along = concentration / (2 * num_cells**2)
                bound = truncated.density_error(dim, concentration, centre, num_cells)
                shares.append((np.ptp(errors) + along) / bound)
    assert 0.95 < max(shares) <= 1 and min(shares) > 0.4  # a bound of 9/10 would be violated


def test_float32_heights_agree_with_float64_where_draws_fall():
    chi = truncated._nodes(1024)
    log_widths = np.log(truncated._stretch(chi))
    for dim, concentration, centre in ((10, 5e4, 0.9), (500, 5e4, 0.1), (2000, 1e3, 1.2)):
        b = truncated._chord(chi)
        fixed = truncated._fixed_part(dim, concentration, chi)
        exact = fixed - fixed.max() + truncated._centred_part(concentration, centre, b, np)
        single = (fixed - fixed.max()).astype(np.float32)
        single = single + truncated._centred_part(concentration, jnp.float32(centre), jnp.asarray(b, jnp.float32), jnp)
        seen = exact + log_widths > np.max(exact + log_widths) - 15
        assert np.ptp((np.asarray(single, float) - exact)[seen]) < 5e-4


def test_log_mass_is_the_noncentral_chi_square_distribution_function():
    for dim, concentration in ((1, 4.0), (2, 3.0), (7, 40.0), (300, 200.0)):
        found = [truncated.log_mass(dim, concentration, m) for m in (0.0, 0.3, 1.0, 1.4)]
        exact = [stats.ncx2.logcdf(concentration, dim, concentration * m**2 + 1e-14) for m in (0.0, 0.3, 1.0, 1.4)]
        np.testing.assert_allclose(np.diff(found), np.diff(exact), rtol=1e-8, atol=1e-8)


# --- The ball mechanism ---


def calibrated(dim=4, num_units=40, epsilon=1.0, relation=ZERO_OUT, **kwargs):
    return pure.calibrate_ball(
        dim=dim, num_units=num_units, l2_clip_norm=1.5, epsilon=epsilon, relation=relation, **kwargs
    )


def log_ratios(ball, delta, count=300):
    """log p_S(w) - log p_S'(w) over random and worst allowed neighbours, at points in and on the ball."""
    rng, axis = np.random.default_rng(0), np.array([0.6, 0.0, -0.8, 0.0])
    worst = (ball.sum_bound - delta) * axis, ball.sum_bound * axis, ball.radius * 0.999999 * axis
    yield from ((s, t, x) for s, t, x in (worst, (worst[1], worst[0], -worst[2])))
    for _ in range(count):
        s, move, x = rng.normal(size=(3, 4))
        s *= rng.uniform() ** 0.3 * ball.sum_bound / np.linalg.norm(s)
        t = s + move * delta / np.linalg.norm(move)
        t *= min(1, ball.sum_bound / np.linalg.norm(t))
        yield s, t, x * ball.radius * 0.999999 / np.linalg.norm(x)


def largest_log_ratio(ball, delta, count):
    quadratic = lambda s: mechanism.Quadratic(FACTORED, jnp.asarray(s, jnp.float32), ball.num_units)
    densities = [
        [float(pure.ball_log_density(ball, quadratic(v), precision.color(FACTORED, jnp.asarray(x)))) for v in (s, t)]
        for s, t, x in log_ratios(ball, delta, count)
    ]
    return max(abs(a - b) for a, b in densities)


FACTORED = precision.dense(MATRIX)


@pytest.mark.parametrize("relation", [ZERO_OUT, NeighboringRelation.REPLACE_ONE])
@pytest.mark.parametrize("options", [{}, {"radius": 4.0}, {"sum_bound": 12.0, "radius": 0.5}])
def test_the_log_ratio_of_neighbours_touches_epsilon_and_never_exceeds_it(relation, options):
    ball = calibrated(relation=relation, **options)
    delta = 1.5 if relation is ZERO_OUT else 3.0
    assert ball.epsilon <= 1.0
    exact = ball.epsilon - 2 * ball.density_error
    assert exact > 0.9979
    assert 0.999 * exact < largest_log_ratio(ball, delta, count=10) < exact * 1.0005  # float32
    larger = ball._replace(inverse_temperature=1.03 * ball.inverse_temperature)
    assert largest_log_ratio(larger, delta, count=0) > 1.02


def test_calibration_is_never_worse_than_the_textbook_by_more_than_the_density_error_and_up_to_twice_better():
    gains = {}
    for name, options in {
        "radius C": {"num_units": 1000},
        "radius 3 C": {"num_units": 1000, "radius": 4.5},
        "small sums": {"num_units": 1000, "radius": 1.5, "sum_bound": 150.0},
        "wide noise": {"dim": 2000, "num_units": 50},
    }.items():
        ball = calibrated(**options)
        gains[name] = ball.inverse_temperature * 2 * ball.radius * 1.5
    assert 0.997 < gains["radius C"] < 1.05
    np.testing.assert_allclose(gains["radius 3 C"], 1.5, rtol=0.01)  # 2 r / (r + C)
    assert gains["small sums"] > 1.8 and gains["wide noise"] > 1.9


BALL = calibrated(epsilon=4.0, radius=2.0)


@jax.jit
def ball_draws(total):
    quadratic = mechanism.Quadratic(FACTORED, total, 40)
    one = lambda key: pure.ball_draw(key, quadratic, BALL)
    return jax.lax.map(one, jax.random.split(KEY, DRAWS), batch_size=250)


def test_ball_draws_follow_the_law_in_the_models_coordinates():
    total = jnp.array([30.0, -10.0, 5.0, 12.0])
    w = ball_draws(total)
    x = np.asarray(jax.jit(jax.vmap(lambda v: precision.uncolor(FACTORED, v)))(w), float)
    assert np.linalg.norm(x, axis=1).max() <= 2.0001
    norm = float(jnp.linalg.norm(total))
    concentration, centre = BALL.inverse_temperature * 40 * 4, norm / 80
    along = -x @ np.asarray(total) / norm / 2
    assert stats.kstest(along, axial_cdf(4, concentration, centre)).pvalue > 1e-3
    assert stats.kstest(along, axial_cdf(4, concentration / 2, centre)).pvalue < 1e-6  # the textbook's order of beta
    excess = np.sum((x + np.asarray(total) / 40) ** 2, axis=1) / 2
    expected = pure.ball_expected_excess(BALL, norm)
    assert abs(np.mean(excess) - expected) < 4 * np.std(excess) / DRAWS**0.5
    sharper = BALL._replace(inverse_temperature=1.5 * BALL.inverse_temperature)
    assert np.mean(excess) > 1.1 * pure.ball_expected_excess(sharper, norm)


def test_a_reused_key_never_repeats_its_noise_on_other_data_and_a_sum_of_zero_is_no_exception():
    first, other = ball_draws(TOTALS[0]), ball_draws(TOTALS[1])
    np.testing.assert_array_equal(first[:9], ball_draws(TOTALS[0])[:9])
    assert np.min(np.max(np.abs(first - other), axis=1)) > 1e-3
    assert np.all(np.isfinite(ball_draws(jnp.zeros(4))))


def test_sums_beyond_the_bound_are_moved_to_it():
    ball = calibrated(sum_bound=12.0)
    far, on = (mechanism.Quadratic(FACTORED, jnp.array([s, 0.0, 0.0, 0.0]), 40) for s in (50.0, 12.0))
    w = precision.color(FACTORED, jnp.array([0.1, 0.1, 0.0, 0.0]))
    np.testing.assert_allclose(pure.ball_log_density(ball, far, w), pure.ball_log_density(ball, on, w), rtol=1e-6)


def test_the_exact_law_is_gaussian_dp_like_the_unrestricted_draw_and_not_of_a_smaller_mu():
    """k = 1, by integration: delta(epsilon) of neighbours against that of mu-GDP."""
    y, excess, mus = np.linspace(-1, 1, 200_001), [], np.array([1.0, 0.95])
    for concentration in (0.5, 50.0, 500.0):
        for centre in (0.0, 0.5, 1.0, 1.4):
            mu, move = 0.7, 0.7 / concentration**0.5
            p, q = (np.exp(-concentration / 2 * ((y - m) ** 2 - max(0, m - 1) ** 2)) for m in (centre, centre + move))
            p, q = p / p.sum(), q / q.sum()
            for epsilon in (0.1, 1.0, 2.0):
                found = max(np.sum(np.maximum(0, a - np.exp(epsilon) * b)) for a, b in ((p, q), (q, p)))
                excess.append([found - privacy.delta_from_mu(mu * share, epsilon) for share in mus])
    assert np.max(excess, axis=0)[0] < 1e-9 < np.max(excess, axis=0)[1]


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="num_units"):
        pure.ball_draw(KEY, mechanism.Quadratic(FACTORED, jnp.zeros(4), 2), BALL)
    for bad in ({"epsilon": 0.0}, {"radius": -1.0}, {"num_units": 10**12}):
        with pytest.raises(ValueError, match="Expected"):
            calibrated(**bad)
    assert calibrated(num_units=1, epsilon=0.1, relation=NeighboringRelation.REPLACE_ONE).epsilon <= 0.1


def test_calibration_holds_at_any_scale():
    """Beta is a number of any scale: its search ends by a share of it, or the draw would spend more than was asked."""
    for clip_norm in (1e-12, 1.0, 1e12):
        for epsilon in (1e-4, 1.0, 30.0):
            ball = pure.calibrate_ball(dim=2, num_units=3, l2_clip_norm=clip_norm, epsilon=epsilon, relation=ZERO_OUT)
            assert 0.997 * epsilon < ball.epsilon <= epsilon


SCALARS = [np.float16, np.float32, np.longdouble, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("scalar", SCALARS)
def test_scalars_calibrate_as_floats(scalar):
    counts = {"dim": np.int32(4), "num_units": jnp.int32(40)}
    numbers = {"l2_clip_norm": scalar(1.5), "epsilon": scalar(0.7), "radius": scalar(2.1), "sum_bound": scalar(12)}
    plain = {name: float(value) for name, value in numbers.items()}
    expected = pure.calibrate_ball(dim=4, num_units=40, relation=ZERO_OUT, **plain)
    found = pure.calibrate_ball(relation=ZERO_OUT, **counts, **numbers)
    assert found == expected and [type(x) for x in found] == [type(x) for x in expected]
    terms = ["l2_clip_norm", "epsilon"]
    excess = pure.knorm_expected_excess(np.int64(4), *map(numbers.get, terms), ZERO_OUT, np.int64(40))
    assert excess == pure.knorm_expected_excess(4, *map(plain.get, terms), ZERO_OUT, 40)
    quantile = pure.knorm_excess_quantile(scalar(0.5), np.int64(4), *map(numbers.get, terms), ZERO_OUT, np.int64(40))
    assert quantile == pure.knorm_excess_quantile(0.5, 4, *map(plain.get, terms), ZERO_OUT, 40)
    assert accuracy.expected_excess(np.int64(4), scalar(0.7), np.int64(40)) == accuracy.expected_excess(
        4, plain["epsilon"], 40
    )


BAD = {
    "dim": [0, 2.0, True, "4", None],
    "num_units": [0, 40.0, np.float32(40), False],
    "epsilon": [0.0, 1e-300, 1e300, np.nan, "1", None, 1j, np.ones(2)],
    "l2_clip_norm": [0.0, -1.0, np.inf, "1"],
    "radius": [0.0, np.nan, "1"],
    "sum_bound": [-1.0, np.inf, jnp.ones(1)],
    "relation": ["REPLACE_ONE", None],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_named(name):
    good = {"dim": 4, "num_units": 40, "l2_clip_norm": 1.5, "epsilon": 1.0, "relation": ZERO_OUT}
    for value in BAD[name]:
        with pytest.raises(ValueError, match=name):
            pure.calibrate_ball(**(good | {name: value}))
        if name in ("dim", "num_units", "epsilon", "l2_clip_norm", "relation"):
            with pytest.raises(ValueError, match=name):
                pure.knorm_expected_excess(**(good | {name: value}))


# --- The K-norm gradient mechanism ---


def knorm_noise(dim, epsilon, count=DRAWS):
    total = jnp.arange(1.0, dim + 1)
    quadratic = mechanism.Quadratic(precision.dense(jnp.eye(dim)), total, 50)
    draw = jax.jit(jax.vmap(lambda key: pure.knorm_draw(key, quadratic, 1.5, epsilon, ZERO_OUT)))
    return np.asarray(-50 * draw(jax.random.split(KEY, count)) - total, float)


@pytest.mark.parametrize("dim", [1, 400])
def test_knorm_noise_has_a_gamma_length_and_a_uniform_direction(dim):
    noise = knorm_noise(dim, 2.0)
    lengths = np.linalg.norm(noise, axis=1)
    assert stats.kstest(lengths, stats.gamma(dim, scale=0.75).cdf).pvalue > 1e-3
    assert stats.kstest(lengths, stats.gamma(dim + 1 + dim // 10, scale=0.75).cdf).pvalue < 1e-6
    cosine = noise[:, 0] / lengths
    if dim == 1:
        assert abs(np.mean(cosine)) < 4 / DRAWS**0.5
    else:
        assert stats.kstest(cosine**2, stats.beta(0.5, (dim - 1) / 2).cdf).pvalue > 1e-3
    excess = lengths**2 / (2 * 50**2)
    expected = pure.knorm_expected_excess(dim, 1.5, 2.0, ZERO_OUT, 50)
    assert abs(np.mean(excess) - expected) < 4 * np.std(excess) / DRAWS**0.5
    share = np.mean(excess < pure.knorm_excess_quantile(0.9, dim, 1.5, 2.0, ZERO_OUT, 50))
    assert abs(share - 0.9) < 4 * (0.09 / DRAWS) ** 0.5


def test_knorm_log_ratio_touches_epsilon_and_never_exceeds_it():
    quadratic = quadratic_from(MATRIX, jnp.array([3.0, -1.0, 2.0, 0.5]), 40)
    draw = jax.jit(lambda s: pure.knorm_draw(KEY, quadratic._replace(whitened_sum=s), 1.5, 0.7, ZERO_OUT))
    assert np.max(np.abs(draw(TOTALS[0]) - draw(TOTALS[1]))) > 1e-3  # a reused key, other data
    move = 1.5 * jnp.array([0.6, 0.0, -0.8, 0.0])
    other = quadratic._replace(whitened_sum=quadratic.whitened_sum + move)
    points = [-(quadratic.whitened_sum + a * move) / 40 for a in (-3.0, 5.0)]
    points += list(jax.random.normal(KEY, (200, 4)))

    def ratio(x):
        w = precision.color(FACTORED, x)
        a, b = (pure.knorm_log_density(q, w, 1.5, 0.7, ZERO_OUT) for q in (quadratic, other))
        return jnp.abs(a - b)

    ratios = jax.jit(jax.vmap(ratio))(jnp.stack(points))
    np.testing.assert_allclose(jnp.max(ratios), 0.7, rtol=1e-4)
