"""What comes in at the door: records, ids, counts and options of any kind, refused without a word of their content."""

import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_finetune import regression, tune

import qexp_jax
from qexp_jax import NeighboringRelation, ledger, preflight, records, subspace
from qexp_jax.data import stream, validation

DATA = jax.tree.map(np.asarray, regression())
PRIVATE, PUBLIC = DATA["private"], DATA["public"]
ONE = {"rounds": 1, "microbatch_size": 16}
ADD_OR_REMOVE = {"neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE, "public_count": 400}
SECRET = "424242"


class Quoting:
    """An array of another library, whose conversion fails with a value."""

    shape = (2, 3)
    dtype = np.dtype(np.float32)

    def __array__(self, *args, **kwargs):
        raise RuntimeError(f"cannot convert {SECRET}")

    def __repr__(self):
        return SECRET


class Opaque:
    def __repr__(self):
        return SECRET


def table():
    return pytest.importorskip("pandas").DataFrame({"a": [424242.5, 1.0]})


def sparse():
    return pytest.importorskip("scipy.sparse").csr_matrix(np.full((2, 3), 424242.0))


NOT_HELD = {
    "object": lambda: np.array([[424242.5, 1.0]] * 2, object),
    "text": lambda: np.array([SECRET, "longest of all"]),
    "bytes": lambda: np.array([SECRET.encode(), b""]),
    "new text": lambda: np.array([SECRET, ""], np.dtypes.StringDType()),
    "time": lambda: np.array([424242, 0], "M8[s]"),
    "duration": lambda: np.array([424242, 0], "m8[s]"),
    "structure": lambda: np.array([(424242.0,), (1.0,)], [("secret_field", "f4")]),
    "void": lambda: np.array([SECRET.encode()] * 2, "V8"),
    "float128": lambda: np.array([424242.5, 1.0], np.longdouble),
    "complex256": lambda: np.array([424242.5, 1.0], np.clongdouble),
    "masked": lambda: np.ma.array([424242.5, 1.0], mask=[True, False]),
    "table": table,
    "column": lambda: table()["a"],
    "sparse": sparse,
    "a text": lambda: SECRET,
    "object itself": Opaque,
    "other library": Quoting,
}


def refusal(call, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET not in text and "secret_field" not in text
    return str(caught.value)


@pytest.mark.parametrize("kind", NOT_HELD)
def test_unheld_leaves_stay_unquoted(kind):
    """At every entrance, whatever a conversion would say."""
    bad = NOT_HELD[kind]()
    broken = PRIVATE | {"x": bad}
    batches = qexp_jax.Stream(lambda: iter([broken]))
    later = qexp_jax.Stream(lambda: iter([PRIVATE, broken]))
    space = subspace.full({"w": jnp.ones(3)})
    for call in (
        lambda: tune(private=broken, **ONE),
        lambda: tune(private=bad, **ONE),
        lambda: tune(public=PUBLIC | {"x": bad}, **ONE),
        lambda: tune(params={"w": bad}, **ONE),
        lambda: tune(params={"w": bad}, subspace=space, **ONE),
        lambda: tune(private=batches, public_count=400, **ONE),
        lambda: tune(private=later, public_count=400, **ONE),
        lambda: tune(private=later, **ONE),
        lambda: tune(public=later, **ONE),
        lambda: records.group_by_unit({"x": bad}, ["a", "b"]),
        lambda: records.num_records({"x": bad, "y": np.ones(3)}),
        lambda: records.pad({"x": bad}, 4),
        lambda: records.microbatches({"x": bad}, 4),
        lambda: list(stream.batches(later, 1)),
        lambda: preflight.estimate(lambda p, r: p["w"][0], {"w": jnp.ones(3)}, broken, num_units=4, num_public=4),
    ):
        refusal(call)


def test_refused_leaf_is_described():
    private = PRIVATE | {"x": np.full((400, 2), float(SECRET), object)}
    text = refusal(lambda: tune(private=private))
    assert "private records" in text and "['x']" in text
    assert "object_" in text and "(400, 2)" in text


@pytest.mark.parametrize("leaf", [np.array([SECRET] * 5), np.ones((5, 2), object), np.ones(())])
def test_refusals_hide_private_lengths(leaf):
    """Where the number of units is private, and of batches always."""

    def refused(n):
        private = PRIVATE | {"x": leaf[:n] if leaf.ndim else leaf, "y": np.ones(n)}
        batches = qexp_jax.Stream(lambda: iter([private]))
        return [refusal(lambda x=x: tune(private=x, **ADD_OR_REMOVE, **ONE)) for x in (private, batches)]

    assert refused(2) == refused(5)
    uneven = [PRIVATE | {"y": np.ones(n)} for n in (7, 9)]
    assert len({refusal(lambda x=x: tune(private=x, **ADD_OR_REMOVE, **ONE)) for x in uneven}) == 1


@pytest.mark.parametrize(
    "private",
    [
        {"x": PRIVATE["x"], SECRET: PRIVATE["y"]},
        {"x": PRIVATE["x"], 3: PRIVATE["y"]},
        [PRIVATE["x"]] * 5,
        {"x": PRIVATE["x"].tolist(), "y": PRIVATE["y"].tolist()},
        {"x": [[1.0], [1.0, 2.0]], "y": PRIVATE["y"]},
        {"x": None, "y": PRIVATE["y"]},
    ],
)
def test_other_structures_are_not_shown(private):
    """A private key may be a name, and a list is as long as there are records."""
    text = refusal(lambda: tune(private=private, **ONE), "structure")
    assert len(text) < 300


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint64, bool, ">f4", ">i8", np.complex64, jnp.bfloat16])
def test_numbers_of_other_types_are_held(dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    found = records.held({"x": x})["x"]
    assert found.dtype == jnp.asarray(found).dtype
    np.testing.assert_array_equal(found, x)


def test_held_arrays_are_not_copied():
    data = {"x": np.ones(3, np.float32), "y": jnp.ones(3), "key": jax.random.split(jax.random.key(0), 3), "i": 1.0}
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (data, records.held(data))), strict=True))


@pytest.mark.parametrize("place", ["memory", "units", "stream", "mesh", "hardened"])
def test_float64_overflow_is_quiet(place):
    """Warnings are errors in these tests: one would tell of a private value."""
    private = jax.tree.map(lambda x: x.astype(np.float64), PRIVATE)
    private["x"][7, 0] = 1e300
    private["y"][8] = -1e300
    changes = {
        "memory": {},
        "units": {"unit_ids": np.arange(400) // 2},
        "stream": {"private": qexp_jax.Stream(lambda: iter([private]))},
        "mesh": {"mesh": jax.make_mesh((8,), ("data",))},
        "hardened": {"hardened": True},
    }[place]
    release = tune(**{"private": private, "public": jax.tree.map(np.float64, PUBLIC)} | ONE | changes)
    assert np.all(np.isfinite(release.params["w"]))
    with np.errstate(all="raise"):
        assert np.isinf(records.held(private)["x"][7, 0])
        records.group_by_unit(private, np.arange(400))
        records.microbatches(private, 8)
        records.take(private, slice(0, 9))


# --- streams of any lengths ---


def in_lengths(data, lengths):
    """A stream of batches of these lengths, the rest in the last."""
    ends = np.cumsum(lengths)
    parts = zip([0, *ends], [*ends, records.num_records(data)], strict=True)
    batches = [jax.tree.map(lambda x, a=a, b=b: x[a:b], data) for a, b in parts]
    return qexp_jax.Stream(lambda: iter(batches))


def summed(**changes):
    _, (info, *_) = tune(diagnostics=True, **ONE | changes)
    return info.quadratic.whitened_sum, info.clip_info.num_units


@pytest.mark.parametrize("lengths", [[0, 3, 0, 50, 1, 0], [0, 0], [300], [1], [400]], ids=str)
@pytest.mark.parametrize("mesh", [None, "eight"])
def test_batches_have_any_length(lengths, mesh):
    mesh = None if mesh is None else jax.make_mesh((8,), ("data",))
    private = in_lengths(PRIVATE, lengths)
    total, counted = summed(private=private, mesh=mesh, **ADD_OR_REMOVE)
    expected, _ = summed(**ADD_OR_REMOVE)
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-4)
    assert counted == 400


@pytest.mark.parametrize("lengths", [[0, 3, 0, 50], [400]])
def test_batches_of_any_length_without_a_count(lengths):
    total, _ = summed(private=in_lengths(PRIVATE, lengths))
    np.testing.assert_allclose(total, summed()[0], rtol=1e-4, atol=1e-4)


def test_empty_batches_need_no_shapes():
    """What a filter leaves of a batch, and all that there is where no record is."""
    empty = {"x": np.zeros(0), "y": np.zeros(0, int)}
    batches = [empty, PRIVATE, empty]
    total, _ = summed(private=qexp_jax.Stream(lambda: iter(batches)), **ADD_OR_REMOVE)
    np.testing.assert_allclose(total, summed(**ADD_OR_REMOVE)[0], rtol=1e-4, atol=1e-4)
    for nothing in (empty, qexp_jax.Stream(lambda: iter([empty, empty]))):
        assert np.all(np.isfinite(tune(private=nothing, **ADD_OR_REMOVE, **ONE).params["w"]))
    with pytest.raises(ValueError, match="at least one private record"):
        tune(private=qexp_jax.Stream(lambda: iter([empty, empty])), **ONE)


def test_pieces_keep_order_and_one_length():
    data = {"i": np.arange(100), "key": jax.random.split(jax.random.key(1), 100)}
    for size, length in ((None, 8), (5, 8), (20, 20)):
        batches = qexp_jax.Stream(in_lengths(data, [0, 5, 40, 0, 1]).begin, size)
        pieces = list(stream.batches(batches, 4))
        assert {len(mask) for _, mask in pieces} == {length}
        kept = [np.asarray(piece["i"])[mask] for piece, mask in pieces]
        np.testing.assert_array_equal(np.concatenate(kept), np.arange(100))
        words = [jax.random.key_data(piece["key"])[mask] for piece, mask in pieces]
        np.testing.assert_array_equal(np.concatenate(words), jax.random.key_data(data["key"]))


def test_a_longer_batch_is_resumed(tmp_path):
    """Between its pieces too: what was summed is passed over piece by piece."""

    class Stopped(Exception):
        pass

    def stop(stage):
        if stage.endswith("batch 5"):
            raise Stopped

    arguments = ONE | {"private": in_lengths(PRIVATE, [64, 0, 300]), "public_count": 400}
    whole = tune(**arguments)
    arguments["checkpoint"] = qexp_jax.Checkpoint(directory=tmp_path, every=2)
    with pytest.raises(Stopped):
        tune(progress=stop, **arguments)
    np.testing.assert_array_equal(tune(**arguments).params["w"], whole.params["w"])
    arguments["checkpoint"] = qexp_jax.Checkpoint(directory=tmp_path / "other", every=2)
    with pytest.raises(Stopped):
        tune(progress=stop, **arguments)
    changed = PRIVATE | {"y": PRIVATE["y"] + (np.arange(400) == 70)}
    with pytest.raises(ValueError, match="not the one that the checkpoint"):
        tune(**arguments | {"private": in_lengths(changed, [64, 0, 300])})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda batch: batch | {"z": batch["y"]}, "structure"),
        (lambda batch: (batch["x"], batch["y"]), "structure"),
        (lambda batch: batch | {"y": batch["y"].astype(int)}, "dtypes"),
        (lambda batch: batch | {"y": batch["y"][:-1]}, "leading axis"),
    ],
)
def test_unlike_batches_are_refused(change, match):
    batches = [PRIVATE, change(jax.tree.map(lambda x: x + 424242, PRIVATE))]
    unlike = qexp_jax.Stream(lambda: iter(batches))
    text = refusal(lambda: tune(private=unlike, public_count=400, **ONE), match)
    assert "400" not in text
    refusal(lambda: list(stream.batches(unlike, 1)), match)


def test_wider_units_stream():
    """Units that were grouped batch by batch without a cap: each batch has its own width."""

    def loss(params, record):
        return (record["x"] @ params["w"] - record["y"]) ** 2 / 2

    def part(a, b, each):
        rows = jax.tree.map(lambda x: x[a:b], PRIVATE)
        return records.group_by_unit(rows, np.arange(b - a) // each)

    batches = [part(0, 100, 1), part(100, 160, 3), part(160, 400, 2)]
    ids = np.concatenate([np.arange(100), 100 + np.arange(60) // 3, 120 + np.arange(240) // 2])
    public = records.group_by_unit(PUBLIC, np.arange(200))
    units = qexp_jax.Stream(lambda: iter(batches))
    streamed = summed(loss=records.unit_loss(loss), private=units, public=public)
    grouped = summed(loss=records.unit_loss(loss), private=records.group_by_unit(PRIVATE, ids), public=public)
    np.testing.assert_allclose(streamed[0], grouped[0], rtol=1e-4, atol=1e-4)
    assert streamed[1] == grouped[1] == 240


def keyed_loss(params, record):
    noise = jax.random.normal(record["key"], (3,)) / 8
    return ((record["x"] + noise) @ params["w"] - record["y"]) ** 2 / 2


@pytest.mark.parametrize("place", ["stream", "mesh", "units", "hardened", "public stream", "checkpoint"])
def test_typed_keys_are_records(place, tmp_path):
    """Wherever they lie, as in memory."""

    def with_keys(data, seed):
        return data | {"key": jax.random.split(jax.random.key(seed), len(data["y"]))}

    private, public = with_keys(PRIVATE, 1), with_keys(PUBLIC, 2)
    changes = {
        "stream": {"private": in_lengths(private, [0, 30, 200])},
        "mesh": {"mesh": jax.make_mesh((8,), ("data",))},
        "units": {"unit_ids": np.arange(400), "max_records_per_unit": 1},
        "hardened": {"hardened": True},
        "public stream": {"public": in_lengths(public, [0, 30])},
        "checkpoint": {
            "private": in_lengths(private, [0, 30, 200]),
            "checkpoint": qexp_jax.Checkpoint(directory=tmp_path),
        },
    }[place]
    arguments = {"loss": keyed_loss, "private": private, "public": public}
    tolerance = 0.05 if place in ("hardened", "public stream") else 1e-4
    total, counted = summed(**arguments | changes)
    expected, _ = summed(**arguments)
    np.testing.assert_allclose(total, expected, rtol=tolerance, atol=tolerance * np.linalg.norm(expected))
    assert counted == 400


# --- ids ---

NAN, NAT = float("nan"), np.datetime64("NaT")
MISSING = {
    "NaN": np.array([1.0, NAN, 1.0]),
    "NaT": np.array(["2150-01-01", "NaT", "2150-01-01"], "M8[D]"),
    "None": ["a", None, "a"],
    "None in array": np.array(["a", None, "a"], object),
    "NaN in list": ["a", NAN, "a"],
    "NaN among integers": [1, NAN, 1],
    "NaT in list": ["a", NAT, "a"],
    "masked": np.ma.array([1, 2, 1], mask=[False, True, False]),
    "masked text": np.ma.array(["a", "b", "a"], mask=[False, True, False]),
    "empty": ["a", "", "a"],
    "blank": np.array(["a", " ", "a"]),
    "text of NaN": np.array(["a", "nan", "a"]),
    "text of NA": np.array(["a", "<NA>", "a"], object),
    "text of None": ["a", "None", "a"],
    "empty bytes": np.array([b"a", b"", b"a"]),
    "new text": np.array(["a", None, "a"], np.dtypes.StringDType(na_object=None)),
    "cast NaN": np.array([1, np.iinfo(np.int64).min, 1]),
    "floats": np.array([1.0, 2.0, 1.0]),
    "complex": np.array([1j, 2, 1j]),
    "truths": np.array([True, False, True]),
    "integer and text": [1, "1", 1],
    "integer and float": [1, 1.0, 1],
    "integer and truth": [1, True, 1],
    "mixed objects": np.array([1, "1", 1], object),
    "bytes and text": ["a", b"a", "a"],
    "structure": np.array([(424242,)] * 3, [("secret_field", int)]),
    "opaque": [Opaque()] * 3,
    "ragged": [[1, 2], [3], [4]],
    "columns": np.ones((3, 1), int),
    "number": 424242,
    "text": SECRET,
    "conversion": Quoting(),
    "shorter": ["a", "b"],
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_ids_are_refused(kind):
    """Of private and of public records; neither an id nor how many there are is shown."""
    ids, three = MISSING[kind], {"x": np.arange(3.0)}
    text = refusal(lambda: records.group_by_unit(three, ids), "unit_ids")
    assert not any(digit in text for digit in "0123456789") or "dtype" in text
    few = jax.tree.map(lambda x: x[:3], PRIVATE)
    assert refusal(lambda: tune(private=few, unit_ids=ids, **ONE)) == text
    public = jax.tree.map(lambda x: x[:3], PUBLIC)
    refusal(lambda: tune(public=public, public_unit_ids=ids, **ONE), "public_unit_ids")


def test_missing_ids_of_pandas_are_refused():
    pandas = pytest.importorskip("pandas")
    columns = [
        pandas.Series([1, None, 1]),
        pandas.Series([1, None, 1], dtype="Int64"),
        pandas.Series(["a", None, "a"]),
        pandas.Series(["a", pandas.NA, "a"], dtype="string"),
        pandas.Series(["a", None, "a"], dtype="category"),
        pandas.Series([1, None, 1], dtype="Int64").array,
        pandas.to_datetime(pandas.Series(["2150-01-01", None, "2150-01-01"])),
        ["a", pandas.NA, "a"],
        [pandas.Timestamp("2150-01-01"), pandas.NaT, pandas.NaT],
    ]
    for ids in columns:
        refusal(lambda ids=ids: records.group_by_unit({"x": np.arange(3.0)}, ids), "missing ids")
    for whole in (pandas.Series([3, 1, 3]), pandas.Series(["b", "a", "b"], dtype="category"), pandas.Index([3, 1, 3])):
        assert records.group_by_unit({"x": np.arange(3.0)}, whole)[1].shape == (2, 2)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 3],
        ["b", "a", "b"],
        (2**70, 1, 2**70),
        np.array([3, 1, 3], np.uint8),
        np.array([b"b", b"a", b"b"]),
        np.array(["b", "a", "b"], np.dtypes.StringDType()),
        np.array([np.int64(3), 1, 3], object),
        np.ma.array([3, 1, 3]),
        np.array(["2150-01-02", "2150-01-01", "2150-01-02"], "M8[D]"),
        jnp.array([3, 1, 3]),
        np.array(["nano", "Nat", "nano"]),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_whole_ids_make_units(ids):
    unit, mask = records.group_by_unit({"x": np.arange(3.0)}, ids)
    counts = sorted(mask.sum(axis=1).tolist())
    assert counts == [1, 2]
    both = np.asarray(unit["x"])[np.argmax(mask.sum(axis=1))]
    np.testing.assert_array_equal(both, [0.0, 2.0])


def test_a_cap_is_the_width():
    """Public, so that no shape tells of the largest unit."""
    for ids in ([7, 7, 7, 1], [1, 2, 3, 4]):
        unit, mask = records.group_by_unit({"x": np.arange(4.0)}, ids, max_records_per_unit=5)
        assert unit["x"].shape[1:] == mask.shape[1:] == (5,)


def test_memory_is_known_before_grouping(monkeypatch):
    """The refusal is the same whatever the ids are, and nothing is grouped for it."""
    monkeypatch.setattr("qexp_jax.data.source.group_by_unit", None)
    monkeypatch.setattr("qexp_jax.fine_tuning.job.group_by_unit", None)
    many, few = np.arange(400), np.where(np.arange(400) < 300, 0, np.arange(400))
    arguments = ONE | {"memory_budget": 1000, "public_count": 400}
    texts = {refusal(lambda ids=ids: tune(unit_ids=ids, **arguments), "max_records_per_unit") for ids in (many, few)}
    assert len(texts) == 1
    arguments["max_records_per_unit"] = 7
    texts = {refusal(lambda ids=ids: tune(unit_ids=ids, **arguments), "fit in 1,000") for ids in (many, few)}
    assert len(texts) == 1 and f"data_bytes {400 * 7 * (4 * 4 + 1):,}" in texts.pop()


def test_memory_of_grouped_units_is_allowed():
    release = tune(unit_ids=np.arange(400) // 2, max_records_per_unit=2, memory_budget=10**9, **ONE)
    assert release.certificate["num_units"] == 200


def test_memory_of_a_stream_hides_its_batches():
    """Where the number of units is private, a batch counts as long as its stream says, or as all units."""
    arguments = ADD_OR_REMOVE | ONE | {"memory_budget": 1000}

    def refused(n, size):
        few = jax.tree.map(lambda x: x[:n], PRIVATE)
        batches = qexp_jax.Stream(lambda: iter([few]), size)
        return refusal(lambda: tune(private=batches, **arguments), "fit in 1,000")

    assert refused(9, None) == refused(350, None) == refused(0, None)
    assert refused(9, 50) == refused(350, 50) != refused(9, None)


# --- the same data, other devices, other types ---


def test_private_data_apart_from_public():
    """No private unit may have contributed to the public records: the very arrays are refused, views among them."""
    stored = in_lengths(PRIVATE, [64])
    device = jax.tree.map(jnp.asarray, PRIVATE)
    for public, private in (
        (PRIVATE, PRIVATE),
        (dict(PRIVATE), PRIVATE),
        (device, dict(device)),
        (stored, stored),
        (stored, qexp_jax.Stream(stored.begin)),
        (jax.tree.map(lambda x: x[:300], PRIVATE), jax.tree.map(lambda x: x[200:], PRIVATE)),
        (jax.tree.map(lambda x: x[::3], PRIVATE), jax.tree.map(lambda x: x[::2], PRIVATE)),
        (PUBLIC, {"x": PRIVATE["x"][:200], "y": PUBLIC["y"]}),
    ):
        with pytest.raises(ValueError, match="apart"):
            tune(public=public, private=private, **ONE)


def test_parts_of_one_table_are_apart():
    """Slices of one array without a common row, in either order; and one row that all records share."""
    for order in "CF":
        table = np.array(np.c_[PRIVATE["x"], PRIVATE["y"]], order=order)
        for first, second in ((slice(0, 200), slice(200, 400)), (slice(0, 400, 2), slice(1, 400, 2))):
            public, private = ({"x": table[i, :3], "y": table[i, 3]} for i in (first, second))
            assert tune(public=public, private=private, **ONE).certificate["num_units"] == 200
    shared = np.ones(3, np.float32)
    validation.check_apart(*(np.broadcast_to(shared, (n, 3)) for n in (4, 5)))


def test_devices_are_the_same(tmp_path):
    """Refused before the ledger; what lies together elsewhere is released, and a key goes where it is used."""
    one, other = jax.devices()[1:3]
    at_one = jax.device_put((DATA, {"w": jnp.ones(3)}, jax.random.key(3)), one)
    data, params, key = at_one
    path = tmp_path / "ledger.json"
    book = ledger.create(path, epsilon=8.0, delta=1e-5)
    arguments = {"ledger": book, **ONE}
    for changes in (
        {"params": params, "private": jax.device_put(PRIVATE, other)},
        {"params": jax.device_put(params, other), **data},
        {"public": data["public"], "private": jax.device_put(PRIVATE, other)},
    ):
        with pytest.raises(ValueError, match=r"same devices, .*private on"):
            tune(**arguments | changes)
    assert ledger.spent(book).releases == 0
    expected = tune(key=jax.random.key(3), **ONE).params["w"]
    mesh = {"mesh": jax.make_mesh((8,), ("data",))}
    for changes in (
        {"params": params, **data, "key": jax.device_put(key, other)},
        {"private": data["private"], **mesh},
        {"private": in_lengths(data["private"], [30]), "params": jax.device_put(params, other)},
    ):
        found = tune(**{"key": key} | ONE | changes).params["w"]
        np.testing.assert_allclose(found, expected, rtol=1e-3)


COUNTS = ["public_count", "rounds", "precision_rank", "microbatch_size", "max_records_per_unit", "subspace_dim"]


@pytest.mark.parametrize("name", [*COUNTS, "memory_budget"])
def test_counts_of_any_integer_type(name):
    value = {"memory_budget": 10**9, "public_count": 400}.get(name, 3)
    arguments = ONE | {"unit_ids": np.arange(400) // 2, "max_records_per_unit": 3}
    expected = tune(**arguments | {name: value})
    for scalar in (np.int64(value), jnp.asarray(value)):
        found = tune(**arguments | {name: scalar})
        assert found.certificate == expected.certificate
        np.testing.assert_array_equal(found.params["w"], expected.params["w"])
    for bad in (True, np.True_, float(value), str(value), np.array([value]), -1, [value]):
        with pytest.raises(ValueError, match=name):
            tune(**arguments | {name: bad})


@pytest.mark.parametrize("name", ["damping", "l2_clip_norm"])
def test_positive_numbers_of_any_type(name):
    expected = tune(**ONE | {name: 0.5})
    for scalar in (np.float32(0.5), np.float64(0.5), jnp.asarray(0.5), np.array(0.5)):
        found = tune(**ONE | {name: scalar})
        assert found.certificate == expected.certificate
    for bad in (True, "0.5", np.array([0.5]), np.nan, np.inf, 0.0, -1, jnp.asarray(-1.0), 1j):
        with pytest.raises(ValueError, match=name):
            tune(**ONE | {name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("neighboring_relation", "REPLACE_ONE"),
        ("neighboring_relation", "ADD_OR_REMOVE_ONE"),
        ("neighboring_relation", None),
        ("neighboring_relation", 1),
        ("checkpoint", "folder"),
        ("checkpoint", types.SimpleNamespace(directory="folder", every=1)),
        ("mesh", "data"),
        ("mesh", jax.devices()),
        ("subspace", "count_sketch"),
        ("mode", "fast"),
        ("mode", None),
        ("progress", "print"),
    ],
)
def test_names_are_no_options(name, bad):
    with pytest.raises(ValueError, match=name if name != "checkpoint" else "Checkpoint"):
        tune(**ONE | {name: bad})


@pytest.mark.parametrize("name", ["jax_debug_nans", "jax_debug_infs"])
def test_debugging_modes_are_refused(name):
    """They raise where a private value is not finite."""
    jax.config.update(name, True)
    try:
        with pytest.raises(ValueError, match=name):
            tune(**ONE)
    finally:
        jax.config.update(name, False)


def test_a_public_stream_has_no_ids():
    with pytest.raises(ValueError, match="public_unit_ids"):
        tune(public=in_lengths(PUBLIC, [9]), public_unit_ids=np.arange(200), **ONE)
