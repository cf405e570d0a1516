"""Records that do not fit in memory: a *stream* is a re-iterable of batches, each a pytree with a leading record axis.

A grain `DataLoader`, a list wrapped in an object with `__iter__`, `Stream(function)`: whatever gives the same batches
each time it is iterated. Where a unit has several records, a stream yields whole units, `(records, mask)` of
`records.group_by_unit`, for the loss `records.unit_loss(loss_fn)`: a unit never spans two batches.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from qexp_jax.records import Record, absorb, num_records


@dataclasses.dataclass(frozen=True)
class Stream:
    """A re-iterable from a function that begins anew: `Stream(lambda: read_batches(path))`."""

    begin: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        """The batches, from the first."""
        return self.begin()


def is_stream(data: Any) -> bool:
    """Whether `data` is a re-iterable of batches, in place of a pytree of arrays.

    Lists, tuples and dictionaries are pytrees.

    Raises:
      ValueError: for an iterator, which can be read once.
    """
    if hasattr(data, "__next__"):
        raise ValueError(f"Expected a re-iterable of batches, found the iterator {type(data).__name__}: see Stream.")
    leaves = jax.tree.leaves(data)
    return len(leaves) == 1 and leaves[0] is data and hasattr(data, "__iter__") and not hasattr(data, "shape")


def first(stream: Iterable[Record]) -> Record | None:
    """The first batch, None where there is none."""
    return next(iter(stream), None)


def count(stream: Iterable[Record]) -> int:
    """The number of records, by one reading."""
    return sum(num_records(batch) for batch in stream)


def sample(generator: np.random.Generator, stream: Iterable[Record], size: int) -> Record:
    """A uniform sample of at most `size` records without replacement.

    Holds the sample and one batch (Vitter's reservoir, algorithm R).

    Raises:
      ValueError: if there is no record.
    """
    kept: list[Record] = []
    seen = 0
    for batch in stream:
        positions = seen + np.arange(num_records(batch))
        slots = np.where(positions < size, positions, generator.integers(positions + 1))
        for i in np.flatnonzero(slots < size):
            kept[slots[i] : slots[i] + 1] = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), batch)]
        seen += len(positions)
    if not seen:
        raise ValueError("Expected at least one record in the public stream, found none.")
    return jax.tree.map(lambda *x: np.stack(x), *kept)


def batches(stream: Iterable[Record], multiple: int) -> Iterator[tuple[Record, np.ndarray]]:
    """Batches of one length, the first one's rounded up to a multiple, with the bool mask of their records.

    Raises:
      ValueError: if a batch is longer than the first.
    """
    length = None
    for batch in stream:
        n = num_records(batch)
        length = -(-n // multiple) * multiple if length is None else length
        if n > length:
            raise ValueError(f"Expected batches no longer than the first, {length}, found a longer one.")
        if n:
            # Padding repeats the first record, so that it brings in no value that is not there.
            index = np.where(np.arange(length) < n, np.arange(length), 0)
            yield jax.tree.map(lambda x, index=index: np.asarray(x)[index], batch), np.arange(length) < n


def digest(previous: bytes, batch: Record) -> bytes:
    """A running digest of the batches read so far: **not private**."""
    state = hashlib.blake2b(previous, digest_size=32)
    absorb(state, batch)
    return state.digest()
