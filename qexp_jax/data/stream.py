"""Records that do not fit in memory: a *stream* is a re-iterable of batches, each a pytree with a leading record axis.

A grain `DataLoader`, a list wrapped in an object with `__iter__`, `Stream(function)`: whatever gives the same batches
each time it is iterated. Batches have any lengths, 0 among them, and one structure and dtypes. Where the shapes of
their records differ, such as the width of units that were grouped without a public cap, each shape is compiled.

Where a unit has several records, a stream yields whole units, `(records, mask)` of `records.group_by_unit`, for the
loss `records.unit_loss(loss_fn)`: a unit never spans two batches.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from qexp_jax.data import arguments
from qexp_jax.data.records import Record, absorb, held, is_key, num_records


@dataclasses.dataclass(frozen=True)
class Stream:
    """A re-iterable from a function that begins anew: `Stream(lambda: read_batches(path))`.

    Attributes:
      begin: gives the batches from the first.
      batch_size: public; at most so many units are held at a time, longer batches are cut. By default as many as the
        first batch has, whatever its length tells of the data.
    """

    begin: Callable[[], Iterable[Record]]
    batch_size: int | None = None

    def __iter__(self) -> Iterator[Record]:
        """The batches, from the first."""
        return iter(self.begin())


def is_stream(data: Any) -> bool:
    """Whether `data` is a re-iterable of batches, in place of a pytree of arrays.

    Lists, tuples and dictionaries are pytrees.

    Raises:
      ValueError: for an iterator, which can be read once.
    """
    if hasattr(data, "__next__"):
        raise ValueError(f"Expected a re-iterable of batches, found the iterator {type(data).__name__}: see Stream.")
    is_leaf = jax.tree_util.all_leaves([data])
    return is_leaf and hasattr(data, "__iter__") and not hasattr(data, "shape")


def batch_size(stream: Iterable[Record]) -> int | None:
    """The public number of units held at a time, None where the stream does not say."""
    size = stream.batch_size if isinstance(stream, Stream) else None
    return None if size is None else arguments.count("batch_size", size)


def each(stream: Iterable[Record], function: Callable[[Record], Record]) -> Stream:
    """The stream of what a function makes of each batch."""
    return Stream(lambda: map(function, stream), batch_size(stream))


def first(stream: Iterable[Record]) -> Record | None:
    """The first batch that has a record, None where there is none."""
    return next((batch for batch in stream if num_records(batch, hide_length=True)), None)


def count(stream: Iterable[Record]) -> int:
    """The number of records, by one reading."""
    return sum(num_records(batch, hide_length=True) for batch in stream)


def sample(generator: np.random.Generator, stream: Iterable[Record], size: int) -> Record:
    """A uniform sample of at most `size` records without replacement.

    Holds the sample and one batch (Vitter's reservoir, algorithm R).

    Raises:
      ValueError: if there is no record.
    """
    kept: list[Record] = []
    seen = 0
    for batch, n in _alike(stream):
        positions = seen + np.arange(n)
        # The first fill the sample; a later one at position p takes a slot in [0, p], if there is one.
        slots = np.where(positions < size, positions, generator.integers(positions + 1))
        rows = jax.tree.map(_on_host, batch)
        for i in np.flatnonzero(slots < size):
            record = jax.tree.map(lambda x, i=i: np.array(x[i]), rows)  # a copy, or it would hold the whole batch
            slot = slots[i]
            kept[slot : slot + 1] = [record]  # replaces, or appends at the end
        seen += n
        last = batch
    if not seen:
        raise ValueError("Expected at least one record in the public stream, found none.")
    return jax.tree.map(lambda like, *x: _like(like, np.stack(x)), last, *kept)


def batches(stream: Iterable[Record], multiple: int) -> Iterator[tuple[Record, np.ndarray]]:
    """Pieces of one length, with the bool mask of their records.

    The length is the stream's `batch_size`, or that of the first batch with a record, rounded up to a multiple: no
    other batch is too long or too short, nor does an error depend on lengths. Batches are cut, and not joined.

    Raises:
      ValueError: if a batch has another structure or other dtypes than the first, or leaves that JAX cannot hold.
    """
    length = batch_size(stream)
    for batch, n in _alike(stream):
        length = -(-(length or n) // multiple) * multiple
        rows = jax.tree.map(_on_host, batch)
        for start in range(0, n, length):
            slots = start + np.arange(length)
            # Padding repeats the piece's first record, so that it brings in no value that is not there.
            index = np.where(slots < n, slots, start)
            piece = jax.tree.map(lambda like, x, i=index: _like(like, x[i]), batch, rows)
            yield piece, slots < n


def _alike(stream: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """The batches that have a record, as JAX will hold them, with their lengths."""
    expected: Any = None
    for batch in stream:
        batch = held(batch, "a batch")
        n = num_records(batch, hide_length=True)
        if not n:
            continue
        structure: Any = jax.tree.structure(batch)
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(batch)]
        expected = expected or (structure, dtypes)
        first_structure, first_dtypes = expected
        # The structure is not shown: keys of a dictionary may be names.
        if structure != first_structure:
            raise ValueError("Expected batches of one structure, found a batch of another one than the first.")
        if dtypes != first_dtypes:
            raise ValueError(f"Expected batches of the first one's dtypes {first_dtypes}, found {dtypes}.")
        yield batch, n


def _on_host(leaf: Any) -> np.ndarray:
    """A NumPy array; of typed keys their words."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _like(leaf: Any, rows: Any) -> Any:
    """Typed keys again where they were; on no device in particular."""
    if not is_key(leaf):
        return rows
    return jax.random.wrap_key_data(rows, impl=jax.random.key_impl(leaf))


def digest(previous: bytes, batch: Record) -> bytes:
    """A running digest of the batches read so far: **not private**."""
    state = hashlib.blake2b(previous, digest_size=32)
    absorb(state, batch)
    return state.digest()
