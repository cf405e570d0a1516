"""Records and privacy units: the vocabulary of everything below.

A record is any pytree of arrays; a batch of records carries a leading record axis on each leaf. A *unit* is what the
guarantee protects: one record by default, or all records of one writer or patient, whose loss is then the mean over
its records and which is clipped as one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments
from qexp_jax.data.unit_ids import as_unit_ids

__all__ = [
    "LossFn",
    "Params",
    "Record",
    "absorb",
    "as_unit_ids",
    "chunks",
    "group_by_unit",
    "held",
    "is_key",
    "microbatches",
    "num_records",
    "pad",
    "take",
    "unit_loss",
    "vary",
]

Params: TypeAlias = chex.ArrayTree
Record: TypeAlias = chex.ArrayTree
LossFn = Callable[[Any, Any], jax.Array]

# Of NumPy's numbers, among which it counts durations.
_NOT_HELD = (np.longdouble, np.clongdouble, np.timedelta64)


def num_records(records: Record, *, hide_length: bool = False) -> int:
    """The length of the leading record axis.

    Args:
      records: pytree with a leading axis.
      hide_length: leave lengths out of the error, where the number of records is private.

    Raises:
      ValueError: if there is no array, a leaf has no leading axis, or the leading axes differ.
    """
    shapes = [_shape(leaf) for leaf in jax.tree.leaves(records)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        found = ", ".join(_shape_text(shape, hide_length) for shape in shapes)
        raise ValueError(f"Expected records with one common leading axis, found leaf shapes [{found}].")
    return shapes[0][0]


def held(tree: Any, name: str = "records", *, hide_length: bool = True) -> Any:
    """The same pytree with its leaves as JAX will hold them; all records pass through here before JAX sees them.

    NumPy arrays stay on the host, and those that JAX holds as they are stay the same objects. Without JAX's 64-bit mode
    others become 32-bit arrays, quietly, since a warning would tell of a private value: a number beyond float32 becomes
    infinite, and its unit then contributes nothing; an integer beyond 32 bits wraps around, as everywhere in JAX.
    Arrays of the other byte order are turned.

    Args:
      tree: pytree of NumPy and JAX arrays, typed keys among them, and of Python numbers.
      name: for the error.
      hide_length: leave the length of the leading axis out of the error, where the number of records is private.

    Raises:
      ValueError: for a leaf that JAX cannot hold (objects, texts, times, structures, numbers of more than 64 bits,
        masked arrays, tables of other libraries), with its path, type, dtype and shape; nothing of its content.

    >>> held({"x": np.array([1.0, 1e300])})["x"]
    array([ 1., inf], dtype=float32)
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _held(leaf, name, path, hide_length), tree)


def _held(leaf: Any, name: str, path: tuple[Any, ...], hide_length: bool) -> Any:
    """The leaf as JAX will hold it; `name`, `path` and `hide_length` are for the error."""
    # A masked array is a NumPy array too, but none that JAX takes.
    is_array = isinstance(leaf, np.ndarray | np.generic) and not isinstance(leaf, np.ma.MaskedArray)
    # NumPy's float64 is a Python float too, and a Python float is held as it is.
    is_python_number = isinstance(leaf, bool | int | float | complex) and not is_array
    if isinstance(leaf, jax.Array) or is_python_number:
        return leaf
    if not (is_array and _is_holdable(leaf.dtype)):
        found = _described(leaf, hide_length)
        raise ValueError(
            f"Expected {name} of arrays that JAX can hold, found {found} in leaf {jax.tree_util.keystr(path)!r}."
        )
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype.newbyteorder("="))
    if leaf.dtype == dtype:
        return leaf
    with np.errstate(all="ignore"):  # a warning would tell of a private value
        return leaf.astype(dtype)


def _is_holdable(dtype: np.dtype) -> bool:
    is_number = jnp.issubdtype(dtype, jnp.number) and dtype.type not in _NOT_HELD
    return dtype.kind == "b" or is_number


def _described(leaf: Any, hide_length: bool) -> str:
    """Not the dtype's own text: that of texts has the length of the longest, that of structures their fields."""
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    if not isinstance(leaf, np.ndarray | np.generic):
        return kind
    return f"{kind} of dtype {leaf.dtype.type.__name__} and shape {_shape_text(leaf.shape, hide_length)}"


def _shape(leaf: Any) -> tuple[int, ...]:
    """Without converting anything: the error of a conversion has values in it."""
    if hasattr(leaf, "shape"):
        return tuple(leaf.shape)
    if isinstance(leaf, bool | int | float | complex):
        return ()
    raise ValueError(f"Expected records of arrays, found a leaf of type {_described(leaf, True)}.")


def _shape_text(shape: tuple[int, ...], hide_length: bool) -> str:
    """With a star in place of the length of the leading axis, where that may be private."""
    shown = ("*", *shape[1:]) if shape and hide_length else shape
    return str(shown).replace("'", "")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def pad(records: Record, multiple: int, mask: jax.Array | None = None) -> tuple[Record, jax.Array]:
    """Pads the record axis with copies of the first record to a positive multiple of `multiple`.

    Args:
      records: pytree with leading axis n.
      multiple: for instance the number of devices, or the microbatch size.
      mask: optional bool (n,), True where a record counts.

    Returns:
      `(records, mask)` with leading axis `max(1, ceil(n / multiple)) * multiple`; the mask is False on padding.
    """
    records = held(records)
    n = num_records(records)
    extra = max(1, _ceil(n, multiple)) * multiple - n
    mask = jnp.ones(n, bool) if mask is None else jnp.asarray(mask, bool)
    if not extra:
        return records, mask

    def extend(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        # Copies of a record that is there: the gradient of a made-up one may be NaN where all others are finite.
        filler = leaf[:1] if n else jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
        return jnp.concatenate([leaf, jnp.repeat(filler, extra, axis=0)])

    return jax.tree.map(extend, records), jnp.concatenate([mask, jnp.zeros_like(mask, shape=extra)])


def microbatches(records: Record, size: int, mask: jax.Array | None = None) -> tuple[Record, jax.Array]:
    """Reshapes records (n, ...) to (batches, m, ...) for `lax.scan`, padded, with the mask (batches, m).

    There are as few batches as m <= min(size, n) allows, and m is as small as they allow, rounded up to a multiple of
    8: little is padding, and no product has the odd shapes that take a CPU half as long again.

    Args:
      records: pytree with leading axis n.
      size: the most records of a batch.
      mask: optional bool (n,), True where a record counts.
    """
    n = num_records(records)
    even = size
    if n:
        size = min(size, n)
        num_batches = _ceil(n, size)
        even = _ceil(n, num_batches)
    m = min(size, 8 * _ceil(even, 8))
    records, mask = pad(records, m, mask)
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, m, *jnp.shape(x)[1:])), (records, mask))


def chunks(records: Record, size: int) -> Iterator[tuple[Record, int]]:
    """Records of one length after the other, so that one program takes them all, and how many of each count."""
    n = num_records(records)
    size = min(size, n)
    for begin in range(0, n, size):
        # The last one is filled up with the last record.
        index = np.minimum(np.arange(begin, begin + size), n - 1)
        yield take(records, index), min(size, n - begin)


def _ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def group_by_unit(
    records: Record, unit_ids: Any, *, max_records_per_unit: int | None = None
) -> tuple[Record, jax.Array]:
    """Groups records into units, to be clipped together; runs on the host.

    Args:
      records: pytree with leading axis n.
      unit_ids: (n,) integers or strings; equal ids form a unit. See `as_unit_ids`.
      max_records_per_unit: public cap, and the padded length m; of a larger unit only its first records are used.
        Without a cap m follows the data, which moves memory and time but no released number.

    Returns:
      `(records, mask)`: leaves (units, m, ...) and a bool mask (units, m), one record for `unit_loss`. Padding repeats
      the unit's own first record, so that it can introduce no non-finite value that the unit did not have.

    Raises:
      ValueError: for records that JAX cannot hold, and for ids that are missing or of several types.

    >>> unit, mask = group_by_unit({"x": np.array([1.0, 2.0, 3.0])}, ["ann", "bob", "ann"])
    >>> unit["x"].tolist(), mask.tolist()
    ([[1.0, 3.0], [2.0, 2.0]], [[True, True], [True, False]])
    """
    records = held(records)
    ids = as_unit_ids(unit_ids, num_records(records, hide_length=True))
    _, unit, counts = np.unique(ids, return_inverse=True, return_counts=True)
    if max_records_per_unit is None:
        width = counts.max(initial=1)
    else:
        width = arguments.count("max_records_per_unit", max_records_per_unit)
    slots = np.arange(width)
    is_there = slots < counts[:, None]
    begins = np.cumsum(counts) - counts
    # Stable: which records of a large unit are used must not depend on the records of others.
    order = np.argsort(unit, kind="stable")
    index = order[begins[:, None] + np.where(is_there, slots, 0)]
    return take(records, index), jnp.asarray(is_there)


@functools.lru_cache(maxsize=64)
def unit_loss(loss_fn: LossFn) -> LossFn:
    """The mean loss over one unit `(records, mask)` of `group_by_unit`, as a loss of one record.

    Cached, so that equal losses give the identical function and compile once.
    """

    def mean_loss(params: Params, unit: tuple[Record, jax.Array]) -> jax.Array:
        records, mask = unit
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, records)
        # A unit without a record, which padding can bring, has loss zero rather than 0/0.
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.maximum(1, jnp.sum(mask))

    return mean_loss


def absorb(digest: Any, tree: Any) -> None:
    """Feeds a pytree of arrays to a hashlib object: paths, dtypes, shapes and bytes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # the bytes, not a copy of them


def take(records: Record, index: Any) -> Record:
    """The records at `index`, an integer array or a slice; of NumPy arrays they alone go to the device."""

    def rows(x: Any) -> jax.Array:
        # NumPy cannot be indexed by a traced array.
        on_host = isinstance(x, np.ndarray) and not isinstance(index, jax.core.Tracer)
        return jnp.asarray(held(x[index])) if on_host else jnp.asarray(held(x))[index]

    return jax.tree.map(rows, records)


def vary(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated arrays as varying over `axis_name`, so that a gradient stays on its own device.

    Under `jax.shard_map` with its default `check_vma=True` the gradient of a *replicated* value is summed over the
    devices where it is formed, that is before any clipping: one record would then move the clipped sum by more than its
    clip norm. Every value that is differentiated, and every scan carry, passes through here first.
    """
    if axis_name is None:
        return tree
    # A zero that varies, rather than `pcast`, which refuses values that vary already.
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
