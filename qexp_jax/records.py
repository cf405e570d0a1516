"""Records and privacy units: the vocabulary of everything below.

A record is any pytree of arrays; a batch of records carries a leading record axis on each leaf. A *unit* is what the
guarantee protects: one record by default, or all records of one writer or patient, whose loss is then the mean over
its records and which is clipped as one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = chex.ArrayTree
Record: TypeAlias = chex.ArrayTree
LossFn = Callable[[Any, Any], jax.Array]


def num_records(records: Record) -> int:
    """The length of the leading record axis.

    Raises:
      ValueError: if there is no array, a leaf has no leading axis, or the leading axes differ.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(records)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"Expected records with one common leading axis, found leaf shapes {shapes}.")
    return shapes[0][0]


def pad(records: Record, multiple: int, mask: jax.Array | None = None) -> tuple[Record, jax.Array]:
    """Pads the record axis with copies of the first record to a positive multiple of `multiple`.

    Args:
      records: pytree with leading axis n.
      multiple: for instance the number of devices, or the microbatch size.
      mask: optional bool (n,), True where a record counts.

    Returns:
      `(records, mask)` with leading axis `max(1, ceil(n / multiple)) * multiple`; the mask is False on padding.
    """
    n = num_records(records)
    extra = max(1, _ceil(n, multiple)) * multiple - n
    mask = jnp.ones(n, bool) if mask is None else jnp.asarray(mask, bool)
    if not extra:
        return records, mask

    def extend(leaf):
        leaf = jnp.asarray(leaf)
        filler = leaf[:1] if n else jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
        return jnp.concatenate([leaf, jnp.repeat(filler, extra, axis=0)])

    return jax.tree.map(extend, records), jnp.concatenate([mask, jnp.zeros_like(mask, shape=extra)])


def microbatches(records: Record, size: int, mask: jax.Array | None = None) -> tuple[Record, jax.Array]:
    """Reshapes records (n, ...) to (batches, m, ...) for `lax.scan`, padded, with the mask (batches, m).

    There are as few batches as m <= min(size, n) allows, and m is as small as they allow, rounded up to a multiple of
    8: little is padding, and no product has the odd shapes that take a CPU half as long again.
    """
    n = num_records(records)
    size = min(size, n) if n else size
    even = _ceil(n, _ceil(n, size)) if n else size
    m = min(size, 8 * _ceil(even, 8))
    records, mask = pad(records, m, mask)
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, m, *jnp.shape(x)[1:])), (records, mask))


def _ceil(a, b):
    return -(-a // b)


def group_by_unit(
    records: Record, unit_ids: Any, *, max_records_per_unit: int | None = None
) -> tuple[Record, jax.Array]:
    """Groups records into units, to be clipped together; runs on the host.

    Args:
      records: pytree with leading axis n.
      unit_ids: (n,) integers or strings; equal ids form a unit.
      max_records_per_unit: public cap; of a larger unit only its first records are used. Without a cap the padded
        length follows the data, which moves memory and time but no released number.

    Returns:
      `(records, mask)`: leaves (units, m, ...) and a bool mask (units, m), one record for `unit_loss`. Padding repeats
      the unit's own first record, so that it can introduce no non-finite value that the unit did not have.

    >>> unit, mask = group_by_unit({"x": np.array([1.0, 2.0, 3.0])}, ["ann", "bob", "ann"])
    >>> unit["x"].tolist(), mask.tolist()
    ([[1.0, 3.0], [2.0, 2.0]], [[True, True], [True, False]])
    """
    unit_ids = np.asarray(unit_ids)
    if unit_ids.shape != (num_records(records),):
        raise ValueError(
            f"Expected one unit id per record, found {unit_ids.shape=} for {num_records(records)} records."
        )
    if max_records_per_unit is not None and max_records_per_unit < 1:
        raise ValueError(f"Expected max_records_per_unit >= 1, found {max_records_per_unit}.")
    _, unit, counts = np.unique(unit_ids, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(unit, kind="stable"), np.cumsum(counts)[:-1])
    width = min(counts.max(initial=1), max_records_per_unit or counts.max(initial=1))
    slots = np.arange(width)
    rows = [ids[np.where(slots < len(ids), slots, 0)] for ids in members] if len(counts) else []
    index = np.stack(rows) if rows else np.zeros((0, width), int)
    return jax.tree.map(lambda x: jnp.asarray(x)[index], records), jnp.asarray(slots < counts[:, None])


@functools.lru_cache(maxsize=64)
def unit_loss(loss_fn: LossFn) -> LossFn:
    """The mean loss over one unit `(records, mask)` of `group_by_unit`, as a loss of one record.

    Cached, so that equal losses give the identical function and compile once.
    """

    def mean_loss(params: Params, unit: tuple[Record, jax.Array]) -> jax.Array:
        records, mask = unit
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, records)
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.maximum(1, jnp.sum(mask))

    return mean_loss


def absorb(digest: Any, tree: Any) -> None:
    """Feeds a pytree of arrays to a hashlib object: paths, dtypes, shapes and bytes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # the bytes, not a copy of them


def take(records: Record, index: Any) -> Record:
    """The records at `index`, an integer array or a slice; of NumPy arrays they alone go to the device."""

    def rows(x):
        on_host = isinstance(x, np.ndarray) and not isinstance(index, jax.core.Tracer)
        return jnp.asarray(x[index]) if on_host else jnp.asarray(x)[index]

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
