"""Where private records come from, memory or a stream, behind one interface: nobody else asks which it is.

checked         as JAX will hold them, refused where a loss or JAX cannot take them
num_records     how many there are, of a stream by one reading
batch_size      how many are held at a time, where that is public
record_shapes   of one record
has_shapes_of   whether its records look like the public ones
aligned_ids     ids of the records' units
grouped         units of several records
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import stream as streams
from qexp_jax.data.records import Record, group_by_unit, num_records
from qexp_jax.data.unit_ids import as_unit_ids


class Check(Protocol):
    """Records as JAX will hold them; raises ValueError for what it cannot hold, and says nothing private."""

    def __call__(self, records: Record, *, allow_empty: bool, hide_length: bool) -> Record:
        """Checks one batch, or all records."""
        ...


class InMemory(NamedTuple):
    """Records, or units, that are all held at once.

    Attributes:
      records: pytree with a leading axis.
      mask: bool, along the same axis, which of them count; None where all do.
    """

    records: Record
    mask: Any = None

    def checked(self, check: Check, *, private_n: bool) -> "InMemory":
        """The same as JAX will hold it."""
        return InMemory(check(self.records, allow_empty=private_n, hide_length=private_n))

    def num_records(self) -> int:
        """n."""
        return num_records(self.records)

    def batch_size(self, *, private_n: bool) -> None:
        """All are held: there is no batch."""
        return None

    def record_shapes(self, public: Record) -> Any:
        """Of one record; those of the public ones are not needed."""
        return _shapes_of_one(self.records)

    def has_shapes_of(self, public: Record) -> bool:
        """Whether a record has the shapes of a public one."""
        pairs = zip(jax.tree.leaves(public), jax.tree.leaves(self.records), strict=True)
        return all(np.shape(a)[1:] == np.shape(b)[1:] for a, b in pairs)

    def aligned_ids(self, name: str, unit_ids: Any) -> np.ndarray | None:
        """Unit ids as an array (n,), None where each record is a unit."""
        return None if unit_ids is None else as_unit_ids(unit_ids, self.num_records(), name)

    def grouped(self, unit_ids: np.ndarray, max_records_per_unit: int | None) -> "InMemory":
        """The units, `(records, mask)` of `group_by_unit`."""
        return InMemory(group_by_unit(self.records, unit_ids, max_records_per_unit=max_records_per_unit))


class Streamed(NamedTuple):
    """Batches of records, or of units, that are read once a pass.

    Attributes:
      batches: re-iterable, see `stream`.
    """

    batches: Iterable[Record]

    def checked(self, check: Check, *, private_n: bool) -> "Streamed":
        """The same, each batch checked when it is read; here only whether there is one."""

        def check_batch(batch: Record) -> Record:
            # The length of a batch is nobody's business, even where that of the stream is public.
            return check(batch, allow_empty=True, hide_length=True)

        batches = streams.each(self.batches, check_batch)
        if streams.first(batches) is None and not private_n:
            raise ValueError("Expected at least one private record, found none in the stream.")
        return Streamed(batches)

    def num_records(self) -> int:
        """n, by one reading."""
        return streams.count(self.batches)

    def batch_size(self, *, private_n: bool) -> int | None:
        """Units held at a time; the length of a batch is private where their number is."""
        first = None if private_n else streams.first(self.batches)
        return streams.batch_size(self.batches) or (None if first is None else num_records(first))

    def record_shapes(self, public: Record) -> Any:
        """Those of the public records: the width of a stream's units may follow from the data."""
        return _shapes_of_one(public)

    def has_shapes_of(self, public: Record) -> bool:
        """Nobody knows before it is read; it counts as yes."""
        return True

    def aligned_ids(self, name: str, unit_ids: Any) -> None:
        """None; raises ValueError where ids are given, which a stream of whole units does not need."""
        if unit_ids is not None:
            raise ValueError(
                "A stream yields whole units, (records, mask) of group_by_unit, for unit_loss; not unit_ids."
            )

    def grouped(self, unit_ids: np.ndarray, max_records_per_unit: int | None) -> "Streamed":
        """Never asked for: a stream has no ids."""
        raise ValueError("A stream yields whole units already.")


Source: TypeAlias = InMemory | Streamed


def source_of(records: Any) -> Source:
    """Records in memory, or the stream that they are.

    Raises:
      ValueError: for an iterator, which can be read once.
    """
    return Streamed(records) if streams.is_stream(records) else InMemory(records)


def _shapes_of_one(records: Record) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), records)
