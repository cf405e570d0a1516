"""Which datasets are neighbours, so that none of them can be told from another.

The names and their meaning are dp_accounting's, whose members are taken as well; its own functions take no others. They
stand here too, since all of dp_accounting takes longer to import than the rest of this library.
"""

import enum
from typing import Any


class NeighboringRelation(enum.Enum):
    """Datasets that differ in one unit: one more or less, another in its place, or an empty one (arXiv:2103.00039)."""

    ADD_OR_REMOVE_ONE = 1
    REPLACE_ONE = 2
    REPLACE_SPECIAL = 3


def checked_relation(value: Any) -> NeighboringRelation:
    """A member of the enumeration: its name as a text would pass for any relation but REPLACE_ONE.

    Raises:
      ValueError: for anything but a member of this enumeration or of dp_accounting's.
    """
    if isinstance(value, NeighboringRelation):
        return value
    kind = type(value)
    is_dp_accountings = kind.__name__ == "NeighboringRelation" and kind.__module__.startswith("dp_accounting.")
    if not is_dp_accountings:
        raise ValueError(f"Expected a neighboring_relation, a member of NeighboringRelation, found {value!r}.")
    return NeighboringRelation[value.name]
