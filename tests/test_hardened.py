"""The integers are bounded and added exactly, the noise is the discrete Gaussian, and zCDP covers it; twins are not."""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import fine_tune, linear_loss, network, network_loss, spd
from scipy import stats

import qexp_jax
from qexp_jax import NeighboringRelation, clipping, hardened, ledger, precision, privacy, records, subspace
from qexp_jax.private_pass import exact_clipping, noise

pytest.importorskip("opendp")
KEY = jax.random.key(23)
C = hardened.INTEGER_CLIP_NORM
# The noise is the system's, so that these tests draw anew each time; a true law fails one in a billion runs.
NEVER = 1e-9


def square(row):
    """Exactly, in Python's integers."""
    return sum(int(x) ** 2 for x in row)


def hard_rows():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(300, 40)) * np.geomspace(1e-3, 1, 40) ** rng.uniform(0, 2, (300, 1))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = np.round(directions * C * np.exp(rng.normal(size=(300, 1)) * 1e-5)).clip(-C, C)
    extremes = np.array([np.full(40, C), np.full(40, -C), C * np.eye(40)[0], np.zeros(40), C * np.eye(40)[1] + 1])
    return np.concatenate([rows, extremes.clip(-C, C)]).astype(np.int64)


def rescaled_in_floats(rows):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.round(rows * np.minimum(1, C / norms.clip(1))).astype(np.int64)


def test_shrunk_rows_are_within_the_norm_exactly_and_rows_rescaled_in_floats_are_not():
    rows = hard_rows()
    shrunk = exact_clipping.within_norm(rows.copy())
    assert max(map(square, shrunk)) <= C**2
    kept = np.array([square(row) <= C**2 for row in rows])
    assert 50 < kept.sum() < 250
    np.testing.assert_array_equal(shrunk[kept], rows[kept])
    norms = np.array([math.isqrt(square(row)) for row in rows[~kept]])
    assert np.all(np.abs(shrunk[~kept] - rows[~kept] * C / norms[:, None]) <= 2)
    assert max(map(square, rescaled_in_floats(rows))) > C**2  # the twin


@functools.cache
def setting(low_rank=False):
    params, data = network(KEY, 21)
    data = data | {"y": data["y"].at[4].set(1e4)}  # clipped hard
    space = subspace.full(params)
    if low_rank:
        basis = jnp.linalg.qr(jax.random.normal(KEY, (space.dim, 5)))[0].T
        return params, data, space, precision.low_rank(0.3, basis, jnp.arange(1.0, 6.0))
    return params, data, space, precision.dense(spd(KEY, space.dim))


@functools.cache
def whole_sum(low_rank=False, mode="reverse"):
    params, data, space, factored = setting(low_rank)
    return exact_clipping.integer_sum(network_loss, params, space, factored, data, l2_clip_norm=0.5, mode=mode)


@pytest.mark.parametrize(("low_rank", "mode"), [(False, "reverse"), (True, "reverse"), (False, "forward")])
def test_the_integer_sum_is_the_clipped_sum_to_the_grid(low_rank, mode):
    params, data, space, factored = setting(low_rank)
    total, info = whole_sum(low_rank, mode)
    expected, plain = clipping.clipped_sum(network_loss, params, space, factored, data, l2_clip_norm=0.5)
    assert total.dtype == np.int64
    np.testing.assert_allclose(total * (0.5 / C), expected, atol=2e-4)
    assert jax.tree.map(int, info) == jax.tree.map(int, plain) and 5 < int(info.num_clipped) < 21


def test_any_order_batching_or_split_gives_the_same_bits_and_floats_do_not():
    params, data, space, factored = setting()
    rest = {"l2_clip_norm": 0.5}
    integer = lambda data, **changes: exact_clipping.integer_sum(
        network_loss, params, space, factored, data, **rest | changes
    )[0]
    order = np.random.default_rng(1).permutation(21)
    parts = [records.take(data, order[:4]), records.take(data, order[4:5]), records.take(data, order[5:])]
    shuffled = [integer(records.take(data, order), microbatch_size=size) for size in (1, 8, 100)]
    for total in (*shuffled, sum(integer(part) for part in parts)):
        np.testing.assert_array_equal(total, whole_sum()[0])
    floats = [
        clipping.clipped_sum(network_loss, params, space, factored, d, microbatch_size=size, **rest)[0]
        for d, size in ((data, 8), (records.take(data, order), 3))
    ]
    assert np.any(np.asarray(floats[0]) != np.asarray(floats[1]))  # the twin


@pytest.mark.parametrize("value", [1e4, -1e4, 1e-3, 1e30, np.nan, np.inf, 0.0])
def test_one_unit_moves_the_sum_by_at_most_the_integer_clip_norm_exactly(value):
    params, data, space, factored = setting()
    changed = data | {"y": data["y"].at[7].set(value)}
    absent = jax.tree.map(lambda x: np.delete(x, 7, axis=0), data)
    with_unit, without = (
        exact_clipping.integer_sum(network_loss, params, space, factored, d, l2_clip_norm=0.5)[0]
        for d in (changed, absent)
    )
    moved = square(with_unit - without)
    assert moved <= C**2
    if np.isfinite(value) and abs(value) > 1:
        assert moved > (C - 20) ** 2
    if not np.isfinite(value):
        assert moved == 0


@pytest.mark.parametrize("clip_norm", [1e-30, 1e-10, 1e10, 1e30])
def test_steps_of_any_clip_norm_are_bounded(clip_norm):
    params = {"w": jnp.zeros(3)}
    units = {"g": jnp.array([[1e30, 1, 0], [1e-30, -1e-30, 0], [1, 2, 3], [-1e15, 1e15, 1e15], [0, 0, 0]])}
    args = linear_loss, params, subspace.full(params), precision.dense(jnp.eye(3))
    for i in range(5):
        steps = exact_clipping.unit_steps(*args, jax.tree.map(lambda x, i=i: x[i], units), clip_norm)[0]
        assert np.abs(steps).max() <= C and square(exact_clipping.within_norm(steps[None])[0]) <= C**2


def pmf(scale, reach):
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2 * scale**2))
    return x, weights / weights.sum()


def fit_pvalue(draws, scale):
    """Chi-square test of integers against the discrete Gaussian."""
    x, p = pmf(scale, 12 * scale)
    kept = p * len(draws) > 10
    counts = np.array([np.sum(draws == value) for value in x[kept]])
    observed, expected = np.append(counts, len(draws) - counts.sum()), np.append(p[kept], 1 - p[kept].sum())
    return stats.chisquare(observed, expected * len(draws) + 1e-300).pvalue


def test_the_noise_is_the_discrete_gaussian_and_a_rounded_one_is_rejected():
    draws = hardened.discrete_gaussian(np.zeros(60_000, np.int64), 1)
    assert fit_pvalue(draws, 1) > NEVER
    rounded = np.round(np.random.default_rng(0).normal(size=60_000)).astype(int)
    assert fit_pvalue(rounded, 1) < NEVER


def spread_pvalue(draws, scale):
    squares = np.sum((draws / scale) ** 2)
    return 2 * min(stats.chi2.cdf(squares, len(draws)), stats.chi2.sf(squares, len(draws)))


def test_large_noise_has_its_scale_shifts_by_the_sum_and_fills_every_integer():
    scale, shift = 2**30, 10**12
    draws = hardened.discrete_gaussian(np.full(30_000, shift), scale) - shift
    assert spread_pvalue(draws, scale) > NEVER and spread_pvalue(draws * 1.1, scale) < NEVER
    assert stats.kstest(draws / scale, "norm").pvalue > NEVER
    low_bits = lambda values: stats.chisquare(np.bincount(values % 32, minlength=32)).pvalue
    assert low_bits(draws) > NEVER
    in_floats = np.asarray(jax.random.normal(KEY, (30_000,)) * jnp.float32(scale)).astype(np.int64)
    assert low_bits(in_floats) < NEVER  # the gaps of float32 noise
    assert not np.array_equal(draws, hardened.discrete_gaussian(np.zeros(30_000, np.int64), scale))


def exact_delta(scale, distance, epsilon):
    """Of one discrete Gaussian against another that is moved by an integer."""
    x, p = pmf(scale, 400)
    q = np.exp(-((x - distance) ** 2) / (2 * scale**2)) / np.sum(np.exp(-(x**2) / (2 * scale**2)))
    return np.sum(np.maximum(0, p - np.exp(epsilon) * q))


def test_zcdp_covers_the_discrete_gaussian_and_the_mu_of_its_continuous_twin_does_not():
    cases = [(s, d, e) for s in (0.5, 1.0, 2.0, 5.0) for d in (1, 2, 5) for e in (0.0, 0.5, 1.0, 2.0, 4.0)]
    exact = np.array([exact_delta(*case) for case in cases])
    zcdp = np.array([privacy.delta_from_rho((d / s) ** 2 / 2, e) for s, d, e in cases])
    gaussian = np.array([privacy.delta_from_mu(d / s, e) for s, d, e in cases])
    assert np.all(exact <= zcdp)
    assert np.sum(exact > 1.02 * gaussian) > 10


@pytest.mark.parametrize(("multiplier", "dim"), [(0.0, 3), (-1.0, 3), (2.0**33, 3), (1.0, 2**22 + 1)])
def test_what_64_bits_would_not_hold_is_refused(multiplier, dim):
    with pytest.raises(ValueError, match="hardened release, found"):
        hardened.discrete_noise(multiplier, dim)


def test_without_opendp_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opendp.prelude", None)
    hardened._sampler.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'qexp_jax\[hardened\]'"):
        tune()
    hardened._sampler.cache_clear()


def loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


X = jax.random.normal(jax.random.key(1), (90, 3))
DATA = {"x": X, "y": X @ jnp.arange(1.0, 4.0)}
PUBLIC, PRIVATE = jax.tree.map(lambda a: a[:30], DATA), jax.tree.map(lambda a: a[30:], DATA)


def tune(**changes):
    arguments = {"public": PUBLIC, "private": PRIVATE, "epsilon": 1.0, "delta": 1e-5, "rounds": 2, "hardened": True}
    return fine_tune(KEY, loss, {"w": jnp.ones(3)}, **arguments | changes)


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_a_hardened_release_verifies_and_holds_the_budget_that_the_exact_gaussian_would_break(relation):
    release = tune(neighboring_relation=relation, public_count=60, epsilon=2.0)
    certificate = json.loads(json.dumps(release.certificate))
    qexp_jax.verify(certificate)
    sensitivity = privacy.sensitivity(C, relation)
    rho = 2 * (sensitivity / certificate["discrete_noise"]["scale"]) ** 2 / 2
    assert 0.999e-5 < privacy.delta_from_rho(rho, 2.0) <= 1e-5
    plain = tune(neighboring_relation=relation, public_count=60, epsilon=2.0, hardened=False).certificate
    assert 1.03 < certificate["noise_multiplier"] / plain["noise_multiplier"] < 1.15
    too_little = 2 * (sensitivity / (plain["noise_multiplier"] * C)) ** 2 / 2  # not recalibrated
    assert privacy.delta_from_rho(too_little, 2.0) > 1.2e-5


def test_without_noise_the_hardened_and_the_plain_path_agree(monkeypatch):
    monkeypatch.setattr(hardened, "discrete_gaussian", lambda total, scale: total)
    monkeypatch.setattr(noise, "noisy_sum", lambda key, total, H, step, noise_std: precision.whiten_sum(H, total, step))
    found, expected = tune(), tune(hardened=False, epsilon=1.0)
    np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=0.02)  # the step knows the noise
    assert np.any(np.abs(found.params["w"] - 1) > 0.01)
    ids = np.arange(60) // 3
    for changes in ({"unit_ids": ids}, {"mode": "forward"}, {"microbatch_size": 7}):
        found, expected = tune(**changes), tune(hardened=False, **changes)
        np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=0.02)


def test_noise_is_drawn_anew_each_time_and_the_certificate_knows_no_private_value():
    broken = PRIVATE | {"y": PRIVATE["y"].at[::2].set(jnp.nan)}
    releases = [tune(), tune(), tune(private=broken)]
    assert np.any(releases[0].params["w"] != releases[1].params["w"])
    assert releases[0].certificate == releases[1].certificate == releases[2].certificate
    assert np.all(np.isfinite(releases[2].params["w"]))


def test_an_empty_dataset_is_released_where_its_size_is_private():
    empty = jax.tree.map(lambda a: a[:0], PRIVATE)
    release = tune(private=empty, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE, public_count=60)
    assert np.all(np.isfinite(release.params["w"]))


def test_diagnostics_hold_the_sum_without_noise():
    _, infos = tune(diagnostics=True)
    info = infos[0]
    expected, _ = clipping.clipped_sum(
        loss, {"w": jnp.ones(3)}, info.plan.subspace, info.quadratic.precision, PRIVATE,
        l2_clip_norm=info.preconditioner.l2_clip_norm,
    )  # fmt: skip
    np.testing.assert_allclose(info.quadratic.whitened_sum, expected, rtol=1e-3, atol=1e-3)


def test_the_ledger_takes_a_hardened_release_as_zcdp(tmp_path):
    book = ledger.create(tmp_path / "ledger.json", epsilon=1.0, delta=1e-5)
    tune(ledger=book)
    spent = ledger.spent(book)
    assert spent.mu is None and 0.999e-5 < spent.delta <= 1e-5
