"""Negative controls: every broken mechanism is caught from its outputs or its exact curve, and the sound one is not."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, spd
from scipy import stats

from qexp_jax import NeighboringRelation, audit, clipping, mechanism, precision, privacy, records, subspace

KEY = jax.random.key(31)
K, CLIP, MU, DELTA = 4, 1.5, 0.8, 1e-5
ZERO_OUT, REPLACE = NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.REPLACE_ONE
MATRIX = spd(KEY, K, condition=50.0) / 10
H = precision.dense(MATRIX)
PARAMS = {"w": jnp.zeros(K)}
SOFT = jnp.linalg.eigh(MATRIX)[1][:, 0]  # the direction that whitening stretches most
BASE = jax.random.normal(KEY, (6, K))
N = 7
STD = CLIP * privacy.noise_multiplier(MU, ZERO_OUT)
CLAIMED_EPSILON = privacy.epsilon_from_mu(MU, DELTA)


def clipped_sum(gradients, loss_fn=linear_loss, factored=H, **options):
    total, _ = clipping.clipped_sum(
        loss_fn, PARAMS, subspace.full(PARAMS), factored, gradients, l2_clip_norm=CLIP, **options
    )  # fmt: skip
    return total


@jax.jit
def library_sum(gradients):
    return clipped_sum({"g": gradients})


def with_record(*rows):
    return jnp.concatenate([BASE, jnp.stack(rows)])


def draw(key, law):
    factored, total, count, noise_std = law
    return mechanism.draw(key, mechanism.Quadratic(factored, total, count), noise_std)


def proved(total, other_total, *, noise_std=STD, counts=(N, N), factors=(H, H)):
    """Audit of the library's draw, given what each neighbour's data made of S, N and H."""
    laws = [
        (factored, jnp.asarray(s), jnp.float32(count), jnp.float32(noise_std))
        for factored, s, count in zip(factors, (total, other_total), counts, strict=True)
    ]
    return proved_of(draw, *laws)


def proved_of(release, dataset, neighbour, num_draws=40_000):
    return audit.falsify(KEY, release, dataset, neighbour, delta=DELTA, num_draws=num_draws)


def caught(bound):
    return bound.mu > MU


PAIR = library_sum(with_record(1e3 * SOFT)), library_sum(with_record(0 * SOFT))


# --- Black box ---


@pytest.mark.parametrize("relation", [ZERO_OUT, REPLACE])
def test_the_sound_mechanism_is_not_caught_and_the_bound_is_near_the_claim(relation):
    std = CLIP * privacy.noise_multiplier(MU, relation)
    other = PAIR[1] if relation is ZERO_OUT else library_sum(with_record(-1e3 * SOFT))
    bound = proved(PAIR[0], other, noise_std=std)
    assert 0.88 * MU < bound.mu < MU
    assert 0.2 * CLAIMED_EPSILON < bound.epsilon < CLAIMED_EPSILON
    assert bound.confidence == 0.999


def test_equal_datasets_prove_nothing():
    bound = proved(PAIR[0], PAIR[0])
    assert bound.mu < 0.05 and bound.epsilon < 0.05


def test_half_the_noise_is_caught():
    bound = proved(*PAIR, noise_std=STD / 2)
    assert caught(bound) and bound.mu > 1.7 * MU


def test_an_l2_clip_accounted_as_whitened_is_caught():
    def l2_sum(gradients):
        clipped = jax.vmap(lambda g: clipping.clip(g, jnp.linalg.norm(g), CLIP)[0])(gradients)
        return precision.whiten(H, jnp.sum(clipped, axis=0))

    assert caught(proved(l2_sum(with_record(1e3 * SOFT)), l2_sum(with_record(0 * SOFT))))


def test_a_private_number_of_units_is_caught():
    assert caught(proved(library_sum(BASE[:3]), library_sum(BASE[:2]), counts=(3, 2)))


def test_curvature_from_the_private_records_is_caught():
    def private_law(gradients):
        factored = precision.dense(gradients.T @ gradients / len(gradients) + 0.1 * jnp.eye(K))
        return factored, clipped_sum({"g": gradients}, factored=factored)

    factors, totals = zip(*(private_law(with_record(scale * SOFT)) for scale in (30, 0)), strict=True)
    assert caught(proved(*totals, factors=factors))


def test_replace_one_accounted_as_zero_out_is_caught():
    assert caught(proved(PAIR[0], library_sum(with_record(-1e3 * SOFT))))


def test_a_nan_record_that_survives_is_caught_and_one_that_is_zeroed_is_not():
    poisoned = with_record(jnp.full(K, jnp.nan))
    norms = jnp.linalg.norm(poisoned, axis=1, keepdims=True)
    surviving = precision.whiten(H, jnp.sum(poisoned * jnp.minimum(1, CLIP / norms), axis=0))
    bound = proved(surviving, PAIR[1])
    assert caught(bound) and bound.epsilon > CLAIMED_EPSILON
    sound = proved(library_sum(poisoned), PAIR[1])
    assert sound.mu < 0.05


def test_clipping_before_projection_is_caught():
    columns = jnp.concatenate([jnp.eye(K), 3 * jnp.eye(K)])  # P is not orthonormal, d = 8

    def clipped_then_projected(gradients):
        clipped = jax.vmap(lambda g: clipping.clip(g, jnp.linalg.norm(g), CLIP)[0])(gradients)
        return precision.whiten(H, columns.T @ jnp.sum(clipped, axis=0))

    rows = jnp.ones((3, 2 * K))
    pair = (clipped_then_projected(rows.at[0].set(scale * columns @ SOFT)) for scale in (1e3, 0.0))
    assert caught(proved(*pair))


def test_gradients_summed_over_devices_before_clipping_are_caught():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def naive(units):
        gradients = jax.vmap(jax.grad(linear_loss), in_axes=(None, 0))(PARAMS, units)["w"]
        norms = precision.whitened_norms(H, [gradients])
        clipped = jax.vmap(clipping.clip, in_axes=(0, 0, None))(gradients, norms, CLIP)[0]
        total = precision.whiten(H, jnp.sum(clipped, axis=0))
        return jax.lax.psum(jax.lax.pcast(total, "data", to="varying"), "data")

    def library(units):
        return clipped_sum(units, axis_name="data")

    def sums(function):
        run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec("data"), out_specs=spec()))
        rows = jnp.zeros((8, K))
        totals = (run({"g": rows.at[5].set(scale * SOFT)}) for scale in (1e3, 0.0))
        return [jnp.asarray(np.asarray(total)) for total in totals]

    assert caught(proved(*sums(naive)))
    assert not caught(proved(*sums(library)))


def test_a_unit_split_over_two_microbatches_is_caught_and_a_whole_one_is_not():
    ids = np.array([0, 1, 2, 3, 4, 5, 9, 9])  # the last two records are one person's

    @jax.jit
    def whole(gradients):
        units = records.group_by_unit({"g": gradients}, ids)
        return clipped_sum(units, loss_fn=records.unit_loss(linear_loss), microbatch_size=1)

    @jax.jit
    def split(gradients):
        return clipped_sum({"g": gradients}, microbatch_size=1)

    present, absent = with_record(1e3 * SOFT, 1e3 * SOFT), with_record(0 * SOFT, 0 * SOFT)
    assert caught(proved(split(present), split(absent)))
    assert not caught(proved(whole(present), whole(absent)))


def test_one_key_for_two_releases_is_caught_and_the_protected_key_is_not():
    """Two rounds at mu/sqrt(2); their difference reveals that of the two sums if the noise is the same."""
    std = STD * 2**0.5
    rounds = [jnp.stack([s, 0.5 * s]) for s in PAIR]  # the second round's clip was half active

    def reusing(key, sums):
        return sums + std * jax.random.normal(key, (K,))

    def protected(key, sums):
        return jnp.stack([mechanism.noisy_sum(key, s, std) for s in sums])

    assert caught(proved_of(reusing, *rounds))
    assert not caught(proved_of(protected, *rounds))


def test_a_released_measured_excess_is_caught():
    def release(key, total):
        quadratic = mechanism.Quadratic(H, total, N)
        w = mechanism.draw(key, quadratic, STD)
        return jnp.append(precision.uncolor(H, w), mechanism.excess_utility(quadratic, w))

    bound = proved_of(release, *PAIR)
    assert caught(bound) and bound.score == "products"


def test_bounds_hold_at_the_stated_confidence():
    """At a confidence of 60 % a true claim is refuted in less than 40 % of audits; a claim 5 % lower in most."""
    sums = jnp.array([1.0]), jnp.array([0.0])
    release = jax.jit(lambda key, total: total + jax.random.normal(key, (1,)))
    bounds = [audit.falsify(k, release, *sums, num_draws=8000, confidence=0.6).mu for k in jax.random.split(KEY, 20)]
    assert stats.binom.sf(sum(b > 1 for b in bounds) - 1, 20, 0.4) > 0.01
    assert 0.9 < np.median(bounds) < 1


def shown(key, data):
    return data + 0 * jax.random.normal(key, (1,))


@pytest.mark.parametrize(("confidence", "delta"), [(0.999, 1e-5), (0.6, 0.3), (0.01, 1e-5), (1 - 1e-9, 0.5)])
def test_the_fewest_draws_find_the_plainest(confidence, delta):
    """A mechanism that shows its data is found by the least number of draws, and no bound passes 0 with fewer."""
    least = audit.least_draws(confidence, delta)
    options = {"confidence": confidence, "delta": delta}
    bound = audit.falsify(KEY, shown, jnp.zeros(1), jnp.ones(1), num_draws=least, **options)
    assert bound.mu > 0 and bound.epsilon > 0
    tested = least // 2 - 1
    level = (1 - confidence) / 4
    error = 1 - level ** (1 / tested)
    assert least == 8 or audit.epsilon_bound(error, error, delta) <= 0
    with pytest.raises(ValueError, match=f"num_draws >= {least}"):
        audit.falsify(KEY, shown, jnp.zeros(1), jnp.ones(1), num_draws=least - 1, **options)


BAD_AUDITS = [
    *(("confidence", value) for value in (95, 0.0, 1.0, -1, float("nan"), "0.9", None)),
    *(("delta", value) for value in (0.0, 1.0, -1e-5, float("nan"), "1e-5")),
    *(("num_draws", value) for value in (0, 1, 7, 23, -1, 1e5, True, "many")),
    *(("batch_size", value) for value in (0, -1, 2.0, True, None)),
]


@pytest.mark.parametrize(("name", "value"), BAD_AUDITS)
def test_audits_that_find_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        audit.falsify(KEY, shown, jnp.zeros(1), jnp.ones(1), **{name: value})


def test_audits_take_scalars():
    """Of NumPy and JAX, as their Python numbers."""
    options = {"confidence": np.float32(0.9), "delta": jnp.bfloat16(0.01)}
    found = audit.falsify(
        KEY, shown, jnp.zeros(1), jnp.ones(1), num_draws=np.int64(80), batch_size=jnp.int32(7), **options
    )
    plain = {name: float(value) for name, value in options.items()}
    assert found == audit.falsify(KEY, shown, jnp.zeros(1), jnp.ones(1), num_draws=80, batch_size=7, **plain)
    assert found.confidence == float(np.float32(0.9))


# --- Exact ---


BAD_SEARCHES = {
    "noise_std": {"noise_std": 0.0},
    "noise_std ": {"noise_std": "1"},
    "ascent_steps": {"ascent_steps": -1},
    "ascent_steps ": {"ascent_steps": 2.0},
    "candidates": {"candidates": {"g": jnp.zeros((0, K))}},
    "neighboring_relation": {"relation": "REPLACE_ONE"},
}


@pytest.mark.parametrize("name", BAD_SEARCHES)
def test_searches_for_nothing_are_refused(name):
    arguments = {"candidates": {"g": BASE}, "noise_std": 1.0, "relation": ZERO_OUT} | BAD_SEARCHES[name]
    with pytest.raises(ValueError, match=name.strip()):
        audit.worst_neighbour(lambda data: library_sum(data["g"]), {"g": BASE}, **arguments)


def test_exact_curves_check_their_numbers():
    for mu, epsilon, name in ((np.nan, 1.0, "mu"), (-1.0, 1.0, "mu"), ("1", 1.0, "mu"), (0.0, np.nan, "epsilon")):
        with pytest.raises(ValueError, match=name):
            audit.attained_delta(mu, epsilon)
    with pytest.raises(ValueError, match="noise_std"):
        audit.attained_mu(jnp.ones(2), jnp.zeros(2), 0.0)
    assert audit.attained_delta(jnp.float32(np.inf), np.float32(1)) == 1.0


def test_the_worst_neighbour_attains_the_claim_and_no_more():
    candidates = {"g": jnp.stack([0.1 * SOFT, 1e3 * BASE[0], -1e3 * SOFT, jnp.full(K, jnp.inf), 1e3 * SOFT])}
    sum_fn = lambda data: library_sum(data["g"])
    for relation in (ZERO_OUT, REPLACE):
        std = CLIP * privacy.noise_multiplier(MU, relation)
        worst = audit.worst_neighbour(sum_fn, {"g": BASE}, candidates, std, relation=relation)
        np.testing.assert_allclose(worst.mu, MU, rtol=1e-5)
        assert (worst.replacement is not None) == (relation is REPLACE)
    np.testing.assert_allclose(audit.attained_delta(worst.mu, 1.0), privacy.delta_from_mu(MU, 1.0), rtol=1e-4)


def test_gradient_ascent_finds_the_record_that_an_l2_clip_does_not_bound():
    def l2_sum(data):
        clipped = jax.vmap(lambda g: clipping.clip(g, jnp.linalg.norm(g), CLIP)[0])(data["g"])
        return precision.whiten(H, jnp.sum(clipped, axis=0))

    start, true = {"g": 5 * BASE[:3]}, CLIP / float(jnp.linalg.eigvalsh(MATRIX)[0]) ** 0.5 / STD
    for steps, low, high in ((0, 0, 0.95), (200, 0.98, 1.0001)):
        worst = audit.worst_neighbour(l2_sum, {"g": BASE}, start, STD, relation=ZERO_OUT, ascent_steps=steps)
        assert low * true < worst.mu < high * true
    sound = audit.worst_neighbour(
        lambda data: library_sum(data["g"]), {"g": BASE}, start, STD, relation=ZERO_OUT, ascent_steps=200
    )
    assert 0.999 * MU < sound.mu < 1.0001 * MU


def test_a_sum_that_is_not_finite_is_told_apart_with_certainty():
    assert audit.attained_mu(jnp.array([jnp.nan, 0.0]), jnp.zeros(2), 1.0) == np.inf
    naive = lambda data: jnp.sum(data["g"], axis=0)
    worst = audit.worst_neighbour(
        naive, {"g": BASE}, {"g": jnp.stack([SOFT, jnp.full(K, jnp.nan)])}, STD, relation=ZERO_OUT
    )
    assert worst.mu == np.inf and audit.attained_delta(worst.mu, 5.0) == 1.0


# --- One run ---


def one_run(noise_std, num_canaries=4000):
    canaries = audit.make_canaries(KEY, num_canaries, num_canaries, CLIP)
    np.testing.assert_allclose(canaries[:9] @ canaries[:9].T, CLIP**2 * np.eye(9), atol=1e-4)
    return audit.one_run_epsilon(
        KEY, lambda k, included: mechanism.noisy_sum(k, included @ canaries, noise_std), canaries, delta=DELTA
    )


def test_one_run_catches_half_the_noise_and_not_the_sound_mechanism():
    mu, noise_std = 0.5, 2 * CLIP
    claimed = privacy.epsilon_from_mu(mu, DELTA)
    assert 0 < one_run(noise_std) < claimed < one_run(noise_std / 2)


def test_canaries_beyond_the_dimension_keep_their_norm_and_jax_privacy_is_asked_for_by_name(monkeypatch):
    canaries = audit.make_canaries(KEY, 9, 4, CLIP)
    np.testing.assert_allclose(jnp.linalg.norm(canaries, axis=1), CLIP, rtol=1e-5)
    absent = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("jax_privacy"):
            raise ImportError(name)
        return absent(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install 'jax_privacy"):
        audit.one_run_epsilon(KEY, lambda k, included: canaries[0], canaries)


@pytest.mark.parametrize(
    ("name", "value"),
    [("guessed", 0.0), ("guessed", 1.0), ("guessed", 10), ("confidence", 95), ("delta", 0.0), ("delta", "1e-5")],
)
def test_one_run_takes_shares(name, value):
    with pytest.raises(ValueError, match=name):
        audit.one_run_epsilon(KEY, lambda k, included: included @ jnp.eye(90), jnp.eye(90), **{name: value})


def test_too_few_guesses_are_refused():
    """Five right guesses of coins have a chance of 1/32: at a confidence of .95 four could never refute anything."""
    pytest.importorskip("jax_privacy")
    canaries = 100 * jnp.eye(50)
    release = lambda key, included: included @ canaries[:, :50]
    assert audit.one_run_epsilon(KEY, release, canaries) > 0
    for few in (canaries[:40], canaries[:1], canaries[:0]):
        with pytest.raises(ValueError, match="at least 5 canaries"):
            audit.one_run_epsilon(KEY, lambda key, included, few=few: included @ few, few)
    with pytest.raises(ValueError, match="canaries of shape"):
        audit.one_run_epsilon(KEY, release, canaries[0])
    for bad in ({"num_canaries": 0}, {"dim": 2.0}, {"l2_clip_norm": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            audit.make_canaries(KEY, **({"num_canaries": 3, "dim": 4, "l2_clip_norm": 1.0} | bad))
