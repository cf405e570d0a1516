"""Whose a record is: ids of privacy units, as they come from tables.

A wrong id breaks the promise without a sign: a missing one would join many persons to one unit or split one into
several. So ids are refused where some are missing or of several kinds, and no error shows one.
"""

from typing import Any

import numpy as np

# How NumPy, pandas and SQL write a missing value where it became a text.
_MISSING = ("", "nan", "NaN", "NaT", "None", "<NA>", "null", "NULL")


def as_unit_ids(unit_ids: Any, num_records: int, name: str = "unit_ids") -> np.ndarray:
    """Unit ids as an array without missing ones, so that equal persons have equal ids and no two share one.

    Args:
      unit_ids: (n,) integers, strings, bytes or NumPy times, all of one kind. Floats are refused: they hold missing
        ids as NaN, and large integers as their neighbours.
      num_records: n.
      name: for the error.

    Raises:
      ValueError: for another shape or kind, or for missing ids: None, NaN, NaT, pandas' NA, masked entries, the
        integer that NumPy makes of NaN, and texts that are empty or read as NumPy, pandas and SQL write a missing
        value. Shows no id and no number.

    >>> as_unit_ids([3, 1, 3], 3)
    array([3, 1, 3], dtype=object)
    """
    ids = _ids_array(unit_ids, name)
    if ids.shape != (num_records,):
        raise ValueError(f"Expected {name} along one axis, one for each record, found another shape.")
    if ids.dtype.kind not in "iuUSOM" and ids.size:
        raise _bad_ids(name, f"dtype {ids.dtype.type.__name__}")
    if _has_missing(ids):
        raise _bad_ids(name, "missing ids or several kinds")
    return ids


def _bad_ids(name: str, found: str) -> ValueError:
    return ValueError(
        f"Expected {name} to be integers or strings, all of one kind and without missing ids, found {found}."
    )


def _ids_array(unit_ids: Any, name: str) -> np.ndarray:
    if np.any(np.ma.getmask(unit_ids)):
        raise _bad_ids(name, "missing ids or several kinds")
    # NumPy would make one kind of a list of several, and a text of a missing value.
    is_list = isinstance(unit_ids, list | tuple)
    try:
        ids = np.asarray(unit_ids, object if is_list else None)
        is_text = ids.dtype.kind == "T"  # of variable width, with a missing value of its own
        return ids.astype(object) if is_text else ids
    except Exception:  # whatever a conversion raises quotes values
        raise _bad_ids(name, f"{type(unit_ids).__name__}") from None


def _has_missing(ids: np.ndarray) -> bool:
    """Or entries of several kinds, which a missing one is."""
    if ids.dtype.kind == "M":
        return bool(np.any(np.isnat(ids)))
    if ids.dtype.kind == "i" and ids.dtype.itemsize >= 4:
        return bool(np.any(ids == np.iinfo(ids.dtype).min))  # what NumPy makes of NaN
    if ids.dtype.kind not in "OUS":
        return False
    kinds = set(map(_id_kind, ids.tolist()))
    return len(kinds) > 1 or "missing" in kinds


def _id_kind(value: Any) -> str:
    if isinstance(value, bytes):
        return "missing" if value.strip().decode(errors="replace") in _MISSING else "bytes"
    if isinstance(value, str):
        return "missing" if value.strip() in _MISSING else "str"
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return "int" if is_integer else "missing"
