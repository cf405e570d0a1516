"""The tilt at work: its draw against a dense sum, an adversary and the stated law; releases that begin with it."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import fine_tune, tilt_weights
from scipy import stats

import qexp_jax
from qexp_jax import NeighboringRelation, clipping, features, hardened, privacy, records, tilt, weighting
from qexp_jax import ledger as ledgers
from qexp_jax.data.source import source_of
from qexp_jax.fine_tuning import inputs, one_pass, rounds, tilting
from qexp_jax.fine_tuning.progress import announcer
from qexp_jax.numerics import integers
from qexp_jax.private_pass import noise
from qexp_jax.private_pass.noise import DISCRETE, GAUSSIAN

KEY, BUDGET = jax.random.key(23), {"epsilon": 4.0, "delta": 1e-5}
ADD_OR_REMOVE, REPLACE_ONE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
N, SLOT = 480, 17


def population(n, seed, shift=0.0):
    """Three inputs of two classes, whose line bends: where inputs move, another line is best."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 3)) + shift * np.array([1.0, 0.5, 0.0])
    y = x @ np.ones(3) + x[:, 0] ** 2 + label + 0.1 * rng.normal(size=n)
    return {"x": x.astype(np.float32), "label": label.astype(np.int32), "y": y.astype(np.float32)}


PUBLIC, PRIVATE, ALIKE = population(600, 0), population(N, 1, 0.5), population(N, 2)


def loss(params, record):
    guess = record["x"] @ params["w"] + params["b"] + params["c"] * record["label"]
    return (guess - record["y"]) ** 2 / 2


def fitted_params():
    """Least squares of the public records."""
    columns = np.column_stack([PUBLIC["x"], np.ones(600), PUBLIC["label"]])
    found = np.linalg.lstsq(columns, PUBLIC["y"], rcond=None)[0].astype(np.float32)
    return {"w": jnp.asarray(found[:3]), "b": jnp.asarray(found[3]), "c": jnp.asarray(found[4])}


PARAMS = fitted_params()
PREPARED = tilting.prepare(jax.random.key(tilt._SEED), (), jax.tree.map(jnp.asarray, PUBLIC))


def weighted(key=KEY, private=PRIVATE, **options):
    return tilt_weights(key, PUBLIC, private, **BUDGET | options)


def tune(key=KEY, private=PRIVATE, public=PUBLIC, **options):
    return fine_tune(key, loss, PARAMS, public=public, private=private, **BUDGET | {"rounds": 2} | options)


def streamed(data, size=100):
    return qexp_jax.Stream(lambda: (records.take(data, slice(i, i + size)) for i in range(0, len(data["y"]), size)))


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="module")
def tilted():
    return weighted()


@pytest.fixture(scope="module")
def release():
    return tune()


def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# --- weights alone ---


def test_weights_move_the_public_records(tilted):
    """Towards the private mean, by one draw of the whole budget; the certificate says so."""
    moved = np.average(PUBLIC["x"], axis=0, weights=tilted.weights)
    before, after = (np.linalg.norm(m - PRIVATE["x"].mean(axis=0)) for m in (PUBLIC["x"].mean(axis=0), moved))
    assert tilted.tilt.accepted and after < 0.6 * before
    certificate = json.loads(json.dumps(tilted.certificate))
    qexp_jax.verify(certificate)
    (part,) = certificate["budget"]
    assert part["purpose"] == "tilt" and part["mu"] == certificate["mu"]
    np.testing.assert_allclose(privacy.epsilon_from_mu(certificate["mu"], 1e-5), 4.0, rtol=1e-9)
    assert certificate["tilt"]["accepted"] and certificate["tilt"]["training_steps"] == 0
    assert certificate["num_units"] == N and certificate["tilt"]["num_axes"] == tilted.features.axes.shape[1]


def test_no_shift_gives_ones():
    found = weighted(private=ALIKE)
    np.testing.assert_array_equal(found.weights, np.ones(600))
    qexp_jax.verify(found.certificate)
    assert not found.certificate["tilt"]["accepted"] and found.certificate["tilt"]["effective_sample_size"] == 1


def test_the_certificate_knows_released_values_only(tilted):
    """Of other private records nothing else changes."""
    other = weighted(private=ALIKE).certificate
    released = ("accepted", "effective_sample_size")
    for certificate in (other, expected := copy.deepcopy(tilted.certificate)):
        certificate["tilt"] = {k: v for k, v in certificate["tilt"].items() if k not in released}
    assert other == expected


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE, REPLACE_ONE])
def test_weights_under_other_relations(relation, tilted):
    """Twice the noise where a record is replaced; a number that is private enters nothing."""
    options = {"neighboring_relation": relation, "public_count": N}
    found = weighted(**options)
    qexp_jax.verify(found.certificate)
    factor = 2 if relation is REPLACE_ONE else 1
    z, usual = (c["budget"][0]["noise_multiplier"] for c in (found.certificate, tilted.certificate))
    np.testing.assert_allclose(z, factor * usual, rtol=1e-9)
    if relation is ADD_OR_REMOVE:
        none = weighted(private=jax.tree.map(lambda a: a[:0], PRIVATE), **options).certificate
        assert none["budget"] == found.certificate["budget"] and none["num_units"] == N


def test_a_stream_and_a_mesh_give_the_same_weights(tilted):
    for options in ({"private": streamed(PRIVATE)}, {"mesh": mesh()}):
        np.testing.assert_allclose(weighted(**options).weights, tilted.weights, rtol=1e-4)


def test_the_ledger_is_debited_once(tmp_path):
    """And refuses the second use of a key."""
    ledger = ledgers.create(tmp_path / "ledger.json", epsilon=9.0, delta=1e-5)
    certificate = weighted(ledger=ledger.path).certificate
    spent = ledgers.spent(ledger)
    assert spent.releases == 1 and spent.mu == pytest.approx(certificate["mu"], rel=1e-12)
    with pytest.raises(ValueError, match="key was used"):
        weighted(ledger=ledger)
    assert ledgers.spent(ledger).releases == 1
    with pytest.raises(qexp_jax.BudgetExceeded):
        weighted(jax.random.key(1), ledger=ledger, epsilon=9.0)


def test_features_may_be_given():
    """Of the record, or of parameters and record."""
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    for function in (lambda record: record["x"], lambda params, record: record["x"] * params["w"]):
        found = weighted(features=function, params=params)
        assert found.tilt.accepted and found.certificate["tilt"]["features"] == "given"
        assert found.certificate["tilt"]["num_axes"] == 3
        qexp_jax.verify(found.certificate)


BAD = {
    "constant": ({"features": lambda record: jnp.ones(2)}, "features that vary"),
    "seed": ({"key": 3}, "typed key"),
    "epsilon": ({"epsilon": 0.0}, "epsilon"),
    "public count": ({"neighboring_relation": ADD_OR_REMOVE}, "public_count"),
    "no records": ({"private": jax.tree.map(lambda a: a[:0], PRIVATE)}, "at least one private record"),
    "structure": ({"private": {"x": PRIVATE["x"]}}, "structure"),
    "the public records": ({"private": PUBLIC}, "public"),
    "features": ({"features": 3}, "features"),
    "mesh": ({"mesh": 3}, "mesh"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_private_data_is_read(name, monkeypatch):
    options, message = BAD[name]

    def never(*args, **kwargs):
        raise AssertionError("private data was read")

    monkeypatch.setattr("qexp_jax.fine_tuning.one_pass.exact_sum", never)
    with pytest.raises(ValueError, match=message):
        weighted(**options)


# --- the draw ---


def options_of(prepared=PREPARED, loss_fn=None, hardened=False):
    return one_pass.PassOptions(
        loss_fn=tilting.loss(prepared.features) if loss_fn is None else loss_fn,
        microbatch_size=None,
        mode="reverse",
        mesh=None,
        noise=DISCRETE if hardened else GAUSSIAN,
        exact=False,
        diagnostics=True,
        store=None,
        announce=announcer(None),
    )


def exact_sum(private, options=None, prepared=PREPARED):
    """Of the pass before noise, in units of the clip norm, as the integers say it."""
    options = options_of(prepared) if options is None else options
    linearisation = tilting.linearisation(prepared)
    blank = one_pass.beginning(0, None, one_pass.empty(options, linearisation.subspace.dim))
    units = one_pass.place(options, source_of(private))
    total, _, _ = one_pass.exact_sum(options, linearisation, units, blank, None)
    if options.noise.hardened:
        return np.asarray(total, np.float64) / hardened.INTEGER_CLIP_NORM
    return integers.to_int64(total) / clipping.STEPS


def raw_rows(private, prepared=PREPARED):
    """Features that are not clipped."""
    unclipped = prepared.features._replace(l2_clip_norm=jnp.inf)
    return np.asarray(features.apply_each(unclipped, jax.tree.map(jnp.asarray, private)), np.float64)


def oracle_rows(private, prepared=PREPARED):
    """Clipped features in NumPy."""
    rows = raw_rows(private, prepared)
    return weighting.clipped(rows, prepared.l2_clip_norm) / prepared.l2_clip_norm


def test_the_pass_sums_clipped_features():
    found, rows = exact_sum(PRIVATE), oracle_rows(PRIVATE)
    np.testing.assert_allclose(found, rows.sum(axis=0), atol=2e-3)
    np.testing.assert_allclose(exact_sum(streamed(PRIVATE)), found, atol=1e-4)
    assert np.max(np.linalg.norm(rows, axis=1)) <= 1 + 1e-6 and np.sum(np.linalg.norm(rows, axis=1) > 0.999) > 30


def test_units_are_means_of_their_records():
    """Each of which is clipped; of as many records as the cap allows."""
    ids = np.arange(N) // 4
    loss_fn, units = inputs.grouped(tilting.loss(PREPARED.features), source_of(PRIVATE), ids, None)
    rows, c = raw_rows(PRIVATE), PREPARED.l2_clip_norm
    found = exact_sum(units.records, options_of(loss_fn=loss_fn)) * c
    np.testing.assert_allclose(found, weighting.clipped(rows, c).sum(axis=0) / 4, atol=2e-3)
    as_one = weighting.clipped(rows.reshape(N // 4, 4, -1).mean(axis=1), c)
    assert np.linalg.norm(found - as_one.sum(axis=0)) > 0.1
    certificate = weighted(unit_ids=ids, max_records_per_unit=2).certificate
    qexp_jax.verify(certificate)
    assert certificate["num_units"] == N // 4 and certificate["privacy_unit"] == "all records with one unit id"


def with_record(x, label=1, y=0.0):
    changed = {name: a.copy() for name, a in PRIVATE.items()}
    changed["x"][SLOT], changed["label"][SLOT], changed["y"][SLOT] = x, label, y
    return changed


HUGE = float(np.finfo(np.float32).max)
RECORDS = {
    "NaN": ([np.nan, 0, 0], 0, 0.0),
    "inf": ([np.inf, -np.inf, 1], 1, 0.0),
    "1e30": ([1e30, -1e30, 1e30], 1, 1e30),
    "huge": ([HUGE, HUGE, -HUGE], 0, -HUGE),
    "2^40": ([2.0**40, -(2.0**40), 2.0**40], 1, 0.0),
    "ordinary": ([0.3, -1.0, 2.0], 0, 0.5),
    "large": ([50.0, -60.0, 40.0], 1, 9.0),
    "another label": ([1.0, 1.0, 1.0], 9, 0.0),
    "NaN target": ([1.0, 1.0, 1.0], 0, np.nan),
    "tiny": ([1e-45, -1e-45, 0.0], 1, 1e-45),
}


def distances(**options):
    """Of every pair of releases that differ in one record; an empty slot is one of NaN."""
    options = options_of(**options)
    sums = {name: exact_sum(with_record(*record), options) for name, record in RECORDS.items()}
    from_empty = max(np.linalg.norm(x - sums["NaN"]) for x in sums.values())
    return from_empty, max(np.linalg.norm(x - y) for x in sums.values() for y in sums.values())


@pytest.mark.parametrize("discrete", [False, True])
def test_no_record_moves_the_sum_by_more(discrete):
    """Than C from an empty slot, and 2 C from another record, exactly; some move it as far."""
    if discrete:
        pytest.importorskip("opendp")
    from_empty, replaced = distances(hardened=discrete)
    assert 0.99 < from_empty <= 1 + 1e-12
    assert 1.2 < replaced <= 2 + 1e-12


def test_a_pass_without_clipping_is_caught(monkeypatch):
    finite = jnp.isfinite
    monkeypatch.setattr(clipping, "_share", lambda norm, c: (jnp.where(finite(norm), 1.0, 0), norm > c, finite(norm)))
    unclipped = PREPARED.features._replace(l2_clip_norm=jnp.inf)

    def loss_fn(params, record):  # compiled by itself
        return jnp.vdot(params["axes"], features.apply(unclipped, record))

    options = options_of(loss_fn=loss_fn)
    moved = exact_sum(with_record([5.0, -6.0, 4.0]), options) - exact_sum(with_record(*RECORDS["NaN"]), options)
    assert np.linalg.norm(moved) > 1.5


def draws(number=40, noise_multiplier=3.0, **options):
    keys = jax.random.split(jax.random.key(4), number)
    return [
        tilting.draw(key, key, PREPARED, source_of(PRIVATE), options_of(**options), noise_multiplier=noise_multiplier)
        for key in keys
    ]


@pytest.mark.parametrize("discrete", [False, True])
def test_noise_has_its_scale(discrete, monkeypatch):
    """C z in each axis, by a Kolmogorov-Smirnov test that rejects 15 % more or less.

    Hardened noise has no seed: of two sets, each three times as large, one has to pass, and both reject.
    """
    if discrete:
        pytest.importorskip("opendp")
    real, seen = one_pass.exact_sum, []

    def once(*args):  # what is drawn many times is read once
        seen[:] = seen or [real(*args)]
        return seen[0]

    monkeypatch.setattr(one_pass, "exact_sum", once)
    number, norm = 800 if discrete else 240, PREPARED.l2_clip_norm
    found = draws(number, hardened=discrete)
    exact = exact_sum(PRIVATE, options_of(hardened=discrete)) * norm
    added = np.reshape([noisy - exact for noisy, _ in found], (number, -1))
    std = found[0][1]
    np.testing.assert_allclose(std, 3.0 * norm, rtol=1e-6)
    sets = [np.ravel(x) for x in np.array_split(added, 2 if discrete else 1)]
    assert max(stats.kstest(x / std, "norm").pvalue for x in sets) > 0.01
    for wrong in (0.85, 1.15):
        assert all(stats.kstest(x / (wrong * std), "norm").pvalue < 1e-3 for x in sets)
    assert abs(np.corrcoef(added.T) - np.eye(len(exact))).max() < 0.45


def test_a_draw_repeats_with_its_key():
    one, other = draws(2)
    np.testing.assert_array_equal(one[0], draws(1)[0][0])
    assert np.any(one[0] != other[0])


# --- before the rounds ---


def test_a_release_begins_with_a_tilt(release):
    """Its share is a tenth of mu^2, and all of it together the budget."""
    certificate = json.loads(json.dumps(release.certificate))
    qexp_jax.verify(certificate)
    assert [part["purpose"] for part in certificate["budget"]] == ["tilt", "gradient", "gradient"]
    mus = [part["mu"] for part in certificate["budget"]]
    np.testing.assert_allclose(mus[0] ** 2, certificate["mu"] ** 2 / 10, rtol=1e-9)
    np.testing.assert_allclose(privacy.compose(mus), privacy.mu_from_budget(4.0, 1e-5), rtol=1e-9)
    assert certificate["tilt"]["accepted"] and certificate["tilt"]["training_steps"] > 0
    assert certificate["mu_per_round"] == mus[1]


def test_progress_names_the_tilts_stages(release):
    stages = []
    same(tune(progress=stages.append).params, release.params)
    steps = release.certificate["tilt"]["training_steps"]
    assert stages == [
        "tilt, public features", "public curvature", "tilt, private pass", "tilt, training",
        *[f"tilt, step {i * steps // 10} of {steps}" for i in range(10)],
        "public curvature", *["private pass", "draw"] * 2, "done",
    ]  # fmt: skip


def test_a_release_without_it_has_no_tilt(release):
    """Whether it is turned off, too little is to be had of it, or private records have other shapes."""
    off = tune(tilt=False)
    qexp_jax.verify(off.certificate)
    assert off.certificate["tilt"] is None and off.certificate["mu"] == pytest.approx(release.certificate["mu"])
    assert np.any(off.params["w"] != release.params["w"])
    small = {"epsilon": 0.3, "rounds": 1}
    poor, poor_off = tune(**small), tune(**small, tilt=False)
    assert poor.certificate == poor_off.certificate and poor.certificate["tilt"] is None
    same(poor.params, poor_off.params)


def test_other_shapes_skip_the_tilt():
    """The public map knows nothing of another width: in memory nothing is spent, in a stream they are average."""

    def of_any_width(params, record):
        return (jnp.mean(record["x"]) * params["w"] - record["y"]) ** 2 / 2

    wide = {"x": np.repeat(PRIVATE["x"], 2, axis=1), "y": PRIVATE["y"]}
    public = {"x": PUBLIC["x"], "y": PUBLIC["y"]}
    options = {"public": public, "private": wide, "rounds": 1} | BUDGET
    found = fine_tune(KEY, of_any_width, {"w": jnp.ones(())}, **options)
    off = fine_tune(KEY, of_any_width, {"w": jnp.ones(())}, **options, tilt=False)
    assert found.certificate == off.certificate and found.certificate["tilt"] is None
    same(found.params, off.params)
    options["private"] = streamed(wide)
    found = fine_tune(KEY, of_any_width, {"w": jnp.ones(())}, **options)
    qexp_jax.verify(found.certificate)
    assert found.certificate["tilt"] is not None


def initial_parameters(monkeypatch, **options):
    """Where the rounds begin."""
    seen = []

    def watched(layout, params, *args):
        seen.append(params)
        return start(layout, params, *args)

    start = rounds.start
    monkeypatch.setattr(rounds, "start", watched)
    return tune(**options), seen[0]


def test_the_model_moves_with_a_shift_only(monkeypatch):
    """Without one it is the pretrained parameters, bit for bit; with one it is better where the private records are."""
    calm, params = initial_parameters(monkeypatch, private=ALIKE)
    same(params, PARAMS)
    qexp_jax.verify(calm.certificate)
    assert not calm.certificate["tilt"]["accepted"] and calm.certificate["tilt"]["training_steps"] == 0
    _, moved = initial_parameters(monkeypatch)

    def mean_loss(params):
        return float(jnp.mean(jax.vmap(loss, (None, 0))(params, PRIVATE)))

    assert mean_loss(moved) < mean_loss(PARAMS)


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE, REPLACE_ONE])
def test_releases_under_other_relations(relation):
    release = tune(neighboring_relation=relation, public_count=N, rounds=1)
    qexp_jax.verify(release.certificate)
    assert release.certificate["tilt"] is not None


def test_units_and_given_features_are_released():
    """Units of private and of public records; features of activations."""
    release = tune(
        unit_ids=np.arange(N) // 2, public_unit_ids=np.arange(600) // 2, max_records_per_unit=2, rounds=1,
        features=lambda params, record: record["x"] * params["w"],
    )  # fmt: skip
    qexp_jax.verify(release.certificate)
    assert release.certificate["tilt"]["features"] == "given" and release.certificate["tilt"]["num_axes"] == 3


def test_a_stream_and_a_mesh_make_the_same_release(release):
    for options in ({"private": streamed(PRIVATE, size=N)}, {"mesh": mesh()}):
        found = tune(**options)
        assert found.certificate["budget"] == release.certificate["budget"]
        for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(release.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_hardened_release_has_a_hardened_tilt(monkeypatch):
    """Its noise is what the certificate says, on the integers' grid."""
    pytest.importorskip("opendp")
    drawn = []

    def watched(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    draw = tilting.draw
    monkeypatch.setattr(tilting, "draw", watched)
    certificate = tune(hardened=True, rounds=1).certificate
    qexp_jax.verify(json.loads(json.dumps(certificate)))
    part = certificate["budget"][0]
    assert part["purpose"] == "tilt" and part["mu"] is None
    np.testing.assert_allclose(drawn[0][1] / certificate["tilt"]["l2_clip_norm"], part["noise_multiplier"], rtol=1e-6)
    steps = drawn[0][0] / certificate["tilt"]["l2_clip_norm"] * hardened.INTEGER_CLIP_NORM
    np.testing.assert_allclose(steps, np.round(steps), atol=abs(steps).max() * 1e-6)


def test_the_tilts_noise_is_not_a_rounds(monkeypatch):
    """Each draw of a release has a key of its own."""
    keys, noisy_sum = [], noise.noisy_sum

    def watched(key, *args):
        keys.append(tuple(np.asarray(jax.random.key_data(key))))
        return noisy_sum(key, *args)

    monkeypatch.setattr(noise, "noisy_sum", watched)
    tune()
    assert len(keys) == 3 == len(set(keys))
    assert tuple(np.asarray(jax.random.key_data(KEY))) not in keys


# --- interrupted ---


def test_units_alone_are_no_shift():
    """Units of ten records of the public population, whose inputs have long tails."""
    rng = np.random.default_rng(0)
    x = np.exp(1.2 * rng.normal(size=(43_000, 4))).astype(np.float32)
    options = {"unit_ids": np.arange(40_000) // 10, "max_records_per_unit": 10}
    found = tilt_weights(KEY, {"x": x[:3000]}, {"x": x[3000:]}, epsilon=8.0, delta=1e-5, **options)
    assert not found.tilt.accepted


class Stopped(Exception):
    """A preemption."""


def stop_at(stage):
    def progress(found):
        if found == stage:
            raise Stopped

    return progress


def forget(folder, name):
    """What a copy of a checkpoint may lack."""
    (folder / "run" / "process_0" / name).unlink()


@pytest.mark.parametrize("stage", ["tilt, private pass", "tilt, training", "private pass"])
def test_a_killed_release_goes_on_with_the_same_bits(tmp_path, stage, release):
    """Before the tilt's draw, after it, and in the first round; entered once."""
    ledger = ledgers.create(tmp_path / "ledger.json", epsilon=4.0, delta=1e-5)
    options = {"ledger": ledger, "checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "run")}
    with pytest.raises(Stopped):
        tune(**options, progress=stop_at(stage))
    found = tune(**options)
    same(found.params, release.params)
    assert found.certificate == release.certificate and ledgers.spent(ledger).releases == 1


def test_a_saved_draw_is_not_drawn_again(tmp_path, monkeypatch):
    options = {"checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "run")}
    with pytest.raises(Stopped):
        tune(**options, progress=stop_at("tilt, training"))
    monkeypatch.setattr(one_pass, "draw_of_pass", None)
    tune(**options)


@pytest.mark.parametrize("discrete", [False, True])
def test_one_debit_has_one_tilt(tmp_path, discrete):
    """A draw that was entered and not saved may come again with the same bits; a hardened one has none."""
    if discrete:
        pytest.importorskip("opendp")
    ledger = ledgers.create(tmp_path / "ledger.json", epsilon=4.0, delta=1e-5)
    options = {
        "ledger": ledger, "checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "run"), "hardened": discrete,
        "rounds": 1,
    }  # fmt: skip
    with pytest.raises(Stopped):
        tune(**options, progress=stop_at("tilt, training"))
    forget(tmp_path, "draw.json")
    if not discrete:
        tune(**options)
    else:
        with pytest.raises(ValueError, match="drawn before"):
            tune(**options)
    assert ledgers.spent(ledger).releases == 1


def test_other_features_draw_no_second_time(tmp_path):
    """For one entry of the ledger: neither from the checkpoint, nor without its draw and its settings."""
    ledger = ledgers.create(tmp_path / "ledger.json", epsilon=4.0, delta=1e-5)
    options = {"ledger": ledger, "checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "run"), "rounds": 1}
    with pytest.raises(Stopped):
        tune(**options, progress=stop_at("tilt, training"))
    other = {"features": lambda record: record["x"][:2]}
    with pytest.raises(ValueError, match="tilt"):
        tune(**options, **other)
    forget(tmp_path, "draw.json")
    forget(tmp_path, "settings.json")
    with pytest.raises(ValueError, match="drawn before|checkpoint"):
        tune(**options, **other)
    with pytest.raises(ValueError, match="key was used"):
        tune(ledger=ledger, rounds=1, **other)


# --- streams whose number or whose shapes are private ---


def test_an_empty_stream_has_the_certificate_of_one_record():
    """Under ADD_OR_REMOVE_ONE they are neighbours: whether there is a tilt must not tell them apart."""
    options = {"neighboring_relation": ADD_OR_REMOVE, "public_count": N, "rounds": 1}
    one = jax.tree.map(lambda a: a[:1], PRIVATE)
    found = [
        tune(private=qexp_jax.Stream(lambda batches=batches: iter(batches)), **options).certificate
        for batches in ([], [one])
    ]
    assert (found[0]["tilt"] is None) == (found[1]["tilt"] is None)
    assert found[0]["budget"] == found[1]["budget"]


def test_batches_of_other_widths_are_released():
    """Units that were grouped batch by batch, of which the first has the public width."""

    def part(a, b, each):
        return records.group_by_unit(jax.tree.map(lambda x: x[a:b], PRIVATE), np.arange(b - a) // each)

    batches = [part(0, 240, 1), part(240, N, 2)]
    public = records.group_by_unit(PUBLIC, np.arange(600))
    release = fine_tune(
        KEY, records.unit_loss(loss), PARAMS, public=public, private=qexp_jax.Stream(lambda: iter(batches)),
        rounds=1, **BUDGET,
    )  # fmt: skip
    qexp_jax.verify(release.certificate)


def test_records_of_numbers_alone_are_released():
    """One input and one target, each a number: both are labels, and no columns are left."""

    def line(params, record):
        return (record["x"] * params["w"] - record["y"]) ** 2 / 2

    public, private = ({"x": d["x"][:, 0], "y": d["y"]} for d in (PUBLIC, PRIVATE))
    release = fine_tune(KEY, line, {"w": jnp.ones(())}, public=public, private=private, rounds=1, **BUDGET)
    qexp_jax.verify(release.certificate)
