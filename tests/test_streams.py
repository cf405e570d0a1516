"""Streams, checkpoints and meshes give the release that memory and one device give, or refuse."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_finetune import regression, tune

import qexp_jax
from qexp_jax import NeighboringRelation, records
from qexp_jax.data import stream
from qexp_jax.numerics import integers
from qexp_jax.private_pass import passes

DATA = regression()
ROUNDS = {"rounds": 3, "microbatch_size": 16}


class Stopped(Exception):
    pass


def split(data, size=64, stop_after=None):
    """A stream of batches; with `stop_after` it fails once, after so many batches in all."""
    left = None if stop_after is None else itertools.repeat(None, stop_after)

    def begin():
        for start in range(0, records.num_records(data), size):
            if left is not None and next(left, Stopped) is Stopped:
                raise Stopped
            yield jax.tree.map(np.asarray, records.take(data, slice(start, start + size)))

    return qexp_jax.Stream(begin)


def same(a, b, **tolerance):
    np.testing.assert_allclose(a.params["w"], b.params["w"], **tolerance)


@pytest.fixture(scope="module")
def in_memory():
    return tune(**ROUNDS)


def test_a_stream_gives_the_sum_that_memory_gives():
    quadratics = [
        tune(private=private, diagnostics=True, **ROUNDS)[1][0].quadratic
        for private in (DATA["private"], split(DATA["private"]))
    ]
    one, other = (q.whitened_sum for q in quadratics)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert [q.num_units for q in quadratics] == [400, 400]


def test_a_public_stream_is_sampled_without_replacement(in_memory):
    same(tune(public=split(DATA["public"], 7), **ROUNDS), in_memory, rtol=0.2)
    numbers = {"i": np.arange(1000)}
    kept = stream.sample(np.random.default_rng(0), split(numbers, 7), 300)
    assert len(set(kept["i"].tolist())) == 300
    draws = [stream.sample(np.random.default_rng(i), split(numbers, 100), 50)["i"] for i in range(100)]
    counts = np.bincount(np.concatenate(draws) // 100, minlength=10)  # 500 expected each, standard deviation 21
    assert np.all(np.abs(counts - 500) < 90)


def test_batches_add_up_exactly():
    """A float32 sum stays at 2^24."""
    partial, plain = passes.empty(integers.zeros(1)), np.float32(2**24)
    for number in [2.0**24] + 100 * [1.0]:
        partial = passes.add(partial, integers.from_float(jnp.array([number])), partial.info)
        plain += np.float32(number == 1)
    assert integers.to_int64(partial.total) == 2**24 + 100 and plain == 2**24


@pytest.mark.parametrize("stop_after", [2, 5, 10, 18])
def test_a_preempted_release_goes_on_with_the_same_bits(tmp_path, stop_after):
    """Three rounds of seven batches, and one batch that is read for its shapes; saved every second batch."""
    arguments = ROUNDS | {"public_count": 400}
    whole = tune(private=split(DATA["private"]), **arguments)
    arguments["checkpoint"] = qexp_jax.Checkpoint(directory=tmp_path, every=2)
    with pytest.raises(Stopped):
        tune(private=split(DATA["private"], stop_after=stop_after), **arguments)
    seen = []
    resumed = tune(private=split(DATA["private"]), progress=seen.append, **arguments)
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])
    assert resumed.certificate == whole.certificate
    assert seen.count("private pass") == 3 - (stop_after - 1) // 7
    again = tune(private=split(DATA["private"]), progress=seen.append, **arguments)  # it ended: nothing is drawn again
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])


def test_a_checkpoint_says_that_it_is_not_private_and_holds_no_key_and_no_sum_at_the_end(tmp_path):
    key = jax.random.key(20240607)
    tune(key=key, private=split(DATA["private"]), checkpoint=qexp_jax.Checkpoint(directory=tmp_path), **ROUNDS)
    folder = tmp_path / "process_0"
    assert "NOT PRIVATE" in (folder / "NOT_PRIVATE.txt").read_text() and folder.stat().st_mode & 0o077 == 0
    word = np.asarray(jax.random.key_data(key)).tobytes()
    assert not any(
        word in path.read_bytes() or b"20240607" in path.read_bytes() for path in folder.rglob("*") if path.is_file()
    )


def test_going_on_with_other_data_or_settings_is_refused(tmp_path):
    arguments = ROUNDS | {"public_count": 400, "checkpoint": qexp_jax.Checkpoint(directory=tmp_path, every=2)}
    with pytest.raises(Stopped):
        tune(private=split(DATA["private"], stop_after=6), **arguments)
    changed = DATA["private"] | {"y": DATA["private"]["y"].at[3].add(1.0)}  # in a batch that the sum holds
    with pytest.raises(ValueError, match="not the one that the checkpoint"):
        tune(private=split(changed), **arguments)
    with pytest.raises(ValueError, match="other .*num_units"):
        tune(private=split(DATA["private"]), **arguments | {"public_count": 300})
    with pytest.raises(ValueError, match="other .*microbatch_size"):
        tune(private=split(DATA["private"]), **arguments | {"microbatch_size": 8})
    with pytest.raises(ValueError, match="changed its length"):
        tune(private=split(jax.tree.map(lambda x: x[:100], DATA["private"])), **arguments)
    tune(private=split(DATA["private"]), **arguments)  # the refusals have spoilt nothing


def test_other_data_after_the_sum_draws_other_noise(tmp_path):
    """The last batch changes: the sum is another one, and so is its noise (the draw's key is folded with the sum)."""
    arguments = {"rounds": 1, "microbatch_size": 16, "public_count": 400}
    changed = DATA["private"] | {"y": DATA["private"]["y"].at[-1].add(1e-3)}
    noises = []
    for data in (DATA["private"], changed):
        _, (info,) = tune(private=split(data), diagnostics=True, **arguments)
        quadratic = info.quadratic
        exact = -qexp_jax.precision.color(quadratic.precision, quadratic.whitened_sum) / quadratic.num_units
        noises.append(np.asarray(info.w - exact))
    assert np.linalg.norm(noises[0] - noises[1]) > 0.1 * np.linalg.norm(noises[0])


def test_a_stream_that_changes_its_length_between_rounds_is_refused():
    lengths = iter([400, 400, 400, 336])  # shapes, count, first round, second round

    def begin():
        n = next(lengths)
        return iter(split(jax.tree.map(lambda x: x[:n], DATA["private"])))

    changing = qexp_jax.Stream(begin)
    with pytest.raises(ValueError, match="changed its length"):
        tune(private=changing, tilt=False, **ROUNDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"private": iter(split(DATA["private"]))}, "iterator"),
        ({"private": split(DATA["private"]), "unit_ids": np.arange(400)}, "whole units"),
        ({"private": qexp_jax.Stream(lambda: iter([])), "public_count": 9}, "leading axis|at least one"),
        ({"public": qexp_jax.Stream(lambda: iter([]))}, "at least one"),
        ({"mesh": jax.make_mesh((8,), ("model",))}, "axis 'data'"),
        ({"private": split(DATA["private"]), "checkpoint": qexp_jax.Checkpoint(directory="x", every=0)}, "every >= 1"),
    ],
)
def test_bad_streams_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tune(**ROUNDS | changes)


def test_under_add_or_remove_an_empty_stream_is_a_release_like_any_other():
    relation = {"neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE, "public_count": 400}
    release = tune(private=qexp_jax.Stream(lambda: iter([])), **relation, **ROUNDS)
    assert np.all(np.isfinite(release.params["w"]))


def test_a_stream_of_whole_units_is_clipped_by_unit():
    ids = np.arange(400) // 4
    units = records.group_by_unit(DATA["private"], ids)
    unit_loss = records.unit_loss(squared_loss)
    streamed = tune(
        loss=unit_loss, private=split(units, 30), public=records.group_by_unit(DATA["public"], np.arange(200)), **ROUNDS
    )
    assert streamed.certificate["num_units"] == 100


def squared_loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_mesh_gives_the_release_of_one_device(in_memory, axis_type, streamed):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))
    private = split(DATA["private"], 60) if streamed else DATA["private"]
    _, (one, *_) = tune(diagnostics=True, **ROUNDS)
    _, (many, *_) = tune(private=private, mesh=mesh, diagnostics=True, **ROUNDS)
    np.testing.assert_allclose(many.quadratic.whitened_sum, one.quadratic.whitened_sum, rtol=1e-5, atol=1e-5)
    assert many.clip_info.num_units == 400 and many.clip_info.num_clipped == one.clip_info.num_clipped


def test_repeated_releases_from_a_stream_trace_the_loss_once():
    traces = []

    def loss(params, record):
        traces.append(0)
        return squared_loss(params, record)

    for i in range(3):
        tune(loss=loss, key=jax.random.key(i), private=split(DATA["private"]), **ROUNDS)
        if i == 0:
            before = len(traces)
    assert len(traces) == before


def test_a_hardened_stream_sums_the_very_integers_of_memory_and_goes_on_with_them(tmp_path):
    arguments = {"rounds": 1, "microbatch_size": 16, "public_count": 400, "hardened": True}
    sums = []
    for private in (DATA["private"], split(DATA["private"]), split(DATA["private"], 23)):
        _, (info,) = tune(private=private, diagnostics=True, **arguments)
        sums.append(info.quadratic.whitened_sum)
    arguments["checkpoint"] = qexp_jax.Checkpoint(directory=tmp_path, every=2)
    with pytest.raises(Stopped):
        tune(private=split(DATA["private"], stop_after=6), **arguments)
    _, (info,) = tune(private=split(DATA["private"]), diagnostics=True, **arguments)
    for other in (*sums[1:], info.quadratic.whitened_sum):
        np.testing.assert_array_equal(sums[0], other)


def test_a_release_that_goes_on_is_entered_once_and_its_key_serves_no_other(tmp_path):
    ledger = qexp_jax.ledger.create(tmp_path / "ledger.json", epsilon=1.0, delta=1e-5)
    arguments = ROUNDS | {"public_count": 400, "ledger": ledger}
    checkpoint = {"checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "run", every=2)}
    with pytest.raises(Stopped):
        tune(private=split(DATA["private"], stop_after=6), **arguments, **checkpoint)
    assert qexp_jax.ledger.spent(ledger).releases == 1
    tune(private=split(DATA["private"]), **arguments, **checkpoint)
    assert qexp_jax.ledger.spent(ledger).releases == 1
    with pytest.raises(ValueError, match="key was used"):
        tune(private=split(DATA["private"]), **arguments)
    elsewhere = {"checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "other")}
    with pytest.raises(ValueError, match="key was used"):
        tune(private=split(DATA["private"]), **arguments, **elsewhere)


def changing(*readings):
    """A stream that is another one from some reading on: `(data, after how many readings)`."""
    count = itertools.count()

    def begin():
        now = next(count)
        data = next(data for data, until in readings if now < until)
        return iter(split(data))

    return qexp_jax.Stream(begin)


def test_every_pass_reads_the_same_stream(tmp_path):
    """As many records, in another order, from the second pass on: refused before its draw, and nothing is entered."""
    turned = jax.tree.map(lambda x: x[::-1], DATA["private"])
    ledger = qexp_jax.ledger.create(tmp_path / "ledger.json", epsilon=1.0, delta=1e-5)
    arguments = ROUNDS | {"public_count": 400, "ledger": ledger, "checkpoint": qexp_jax.Checkpoint(directory=tmp_path)}
    arguments |= {"tilt": False}  # it would read the stream once more
    seen = []
    with pytest.raises(ValueError, match="private data are not those"):
        tune(private=changing((DATA["private"], 2), (turned, 99)), progress=seen.append, **arguments)
    assert seen.count("draw") == 1
    with pytest.raises(ValueError, match="private data are not those"):
        tune(private=split(turned), **arguments)
    tune(private=split(DATA["private"]), **arguments)  # the refusals have spoilt nothing
    assert qexp_jax.ledger.spent(ledger).releases == 1


def test_copies_of_a_first_pass_make_one_release(tmp_path):
    """Copied before the whole of the data was known, and gone on with in two orders: the ledger knows the draw."""
    ledger = qexp_jax.ledger.create(tmp_path / "ledger.json", epsilon=1.0, delta=1e-5)
    arguments = ROUNDS | {"public_count": 400, "ledger": ledger}
    folders = [tmp_path / "run", tmp_path / "copy"]
    places = [{"checkpoint": qexp_jax.Checkpoint(directory=folder, every=2)} for folder in folders]
    with pytest.raises(Stopped):
        tune(private=split(DATA["private"], stop_after=6), **arguments, **places[0])
    shutil.copytree(*folders)
    tune(private=split(DATA["private"]), **arguments, **places[0])
    later = DATA["private"] | {"y": DATA["private"]["y"].at[-1].add(1.0)}
    with pytest.raises(ValueError, match="Round 0 .* drawn before"):
        tune(private=split(later), **arguments, **places[1])
    assert qexp_jax.ledger.spent(ledger).releases == 1


def test_a_grain_loader_is_a_stream():
    grain = pytest.importorskip("grain.python")
    private = jax.tree.map(np.asarray, DATA["private"])

    class Source:
        def __len__(self):
            return 400

        def __getitem__(self, i):
            return jax.tree.map(lambda x: x[i], private)

    sampler = grain.IndexSampler(400, shard_options=grain.NoSharding(), num_epochs=1, seed=0)
    loader = grain.DataLoader(data_source=Source(), sampler=sampler, operations=[grain.Batch(64)])
    _, (loaded, *_) = tune(private=loader, public_count=400, diagnostics=True, **ROUNDS)
    _, (expected, *_) = tune(diagnostics=True, **ROUNDS)
    np.testing.assert_allclose(loaded.quadratic.whitened_sum, expected.quadratic.whitened_sum, rtol=1e-4, atol=1e-5)
    assert loaded.clip_info.num_units == 400
