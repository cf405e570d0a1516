"""Records, and which of them belong to one privacy unit."""

import dataclasses
from typing import Any

from qexp_jax.data import arguments
from qexp_jax.data.records import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Records whose units are not simply single records, or whose number is not simply public.

    Attributes:
      records: pytree with a leading axis n, or a stream of batches of units (`stream`).
      unit_ids: (n,) ids of the records' units (writers, patients), which are clipped together: integers or strings,
        none missing (`records.as_unit_ids`). By default each record is a unit.
      max_records_per_unit: public cap on the records that a private unit contributes, and the length that units are
        padded to; by default the size of the largest.
      public_count: public N, where it is not the number of private units here; required for ADD_OR_REMOVE_ONE, under
        which the true number is private, and where several processes hold the units.

    >>> Dataset(records={"x": [[1.0], [2.0], [3.0]]}, unit_ids=["a", "b", "a"]).max_records_per_unit is None
    True
    """

    records: Record
    unit_ids: Any = None
    max_records_per_unit: int | None = None
    public_count: int | None = None


def as_dataset(name: str, records: Any) -> Dataset:
    """Records of which each is a unit, or a `Dataset` as it is, its numbers checked.

    Raises:
      ValueError: for public data that has a cap or a count, which are private data's.
    """
    if not isinstance(records, Dataset):
        return Dataset(records=records)
    if name == "public" and not (records.max_records_per_unit is None and records.public_count is None):
        raise ValueError("Public data has neither max_records_per_unit nor public_count: give them with private data.")
    cap = records.max_records_per_unit
    if cap is None:
        return records
    return dataclasses.replace(records, max_records_per_unit=arguments.count("max_records_per_unit", cap))
