"""The files of PhysioNet/CinC Challenge 2012, read strictly: a set is whole, or an error says which file and line.

What a lenient reader skips or guesses would be missing from a stay without a word. Blank lines, a byte order mark and
either kind of line end are harmless and pass. Errors name places, not what stands there.
"""

import functools
import gzip
import pathlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from experiments.data.splits import decode, read_bytes

SERIES = (
    "Albumin ALP ALT AST Bilirubin BUN Cholesterol Creatinine DiasABP FiO2 GCS Glucose HCO3 HCT HR K Lactate "
    "Mg MAP MechVent Na NIDiasABP NIMAP NISysABP PaCO2 PaO2 pH Platelets RespRate SaO2 SysABP Temp TroponinI "
    "TroponinT Urine WBC Weight"
).split()
ICU_TYPES = (1, 2, 3, 4)
MISSING = -1  # the publisher's code
AS_PUBLISHED = "get the file again from physionet.org/content/challenge-2012/1.0.0, or mend it"
_ONCE = ("RecordID", "Age", "Gender", "Height", "ICUType")  # a stay has one value of each, at 00:00
_PARAMETERS = frozenset(_ONCE) | frozenset(SERIES)
_STAY_HEADER = "Time,Parameter,Value"
_OUTCOME_HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"


class Row(NamedTuple):
    """One line of a stay's file: its number, the time in minutes, and what was measured."""

    line: int
    minutes: int
    parameter: str
    value: float


def read_outcomes(path: pathlib.Path) -> dict[int, int]:
    """Whether each stay ended in death, by RecordID."""
    died: dict[int, int] = {}
    for number, line in _body(str(path), decode(str(path), read_bytes(path)), _OUTCOME_HEADER):
        where = f"{path}, line {number}"
        stay, label = _outcome(where, line)
        if stay in died:
            raise ValueError(f"{where}: a second outcome of RecordID {stay}; expected one row a stay, remove one.")
        died[stay] = label
    if not died:
        raise ValueError(f"{path}: no outcome below the header; {AS_PUBLISHED}.")
    return died


def _outcome(where: str, line: str) -> tuple[int, int]:
    fields = line.split(",")
    if len(fields) != 6:
        raise ValueError(f"{where}: expected 6 fields, found {len(fields)}; {AS_PUBLISHED}.")
    stay = _number(fields[0])
    label = _number(fields[5])
    if not _is_record_id(stay):
        raise ValueError(f"{where}: expected a RecordID, a whole number; {AS_PUBLISHED}.")
    if label not in (0, 1):
        raise ValueError(f"{where}: expected an In-hospital_death of 0 or 1; {AS_PUBLISHED}.")
    return int(stay), int(label)


def _body(name: str, text: str, header: str) -> list[tuple[int, str]]:
    """The lines below the header with their numbers, without blank ones (of a spreadsheet: nothing but commas)."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip(" \t,")]
    first, found = lines[0] if lines else (1, "")
    if [field.strip() for field in found.split(",")] != header.split(","):
        raise ValueError(f"{name}, line {first}: expected the header {header!r}; {AS_PUBLISHED}.")
    return lines[1:]


def read_texts(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Name and content of each stay's file, from the folder or the archive."""
    if path.is_dir():
        for file in stay_files(path):
            yield str(file), decode(str(file), read_bytes(file))
        return
    try:
        for member, content in _members(path):
            name = f"{path}: {member}"
            yield name, decode(name, content)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not a gzipped tar ({error}); get the file again.") from None


def stay_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The stays' files in the folder and in folders within, which unpacking may add."""
    return [file for file in sorted(folder.rglob("*.txt")) if _is_stay(file.relative_to(folder))]


def _is_stay(path: pathlib.PurePath) -> bool:
    """Not a hidden file or folder, nor what macOS adds to archives."""
    return path.suffix == ".txt" and not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _members(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each stay's file in the archive, whose check sum has to fit in the end."""
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            if not _is_stay(pathlib.PurePosixPath(member.name)):
                continue
            if not member.isfile():
                raise ValueError(f"{path}: {member.name} is no file; {AS_PUBLISHED}.")
            yield member.name, archive.extractfile(member).read()
        # gzip compares it when it comes to its end, and tarfile stops earlier.
        while stream.read(1 << 20):
            pass


def read_rows(name: str, text: str) -> list[Row]:
    """The rows of a stay's file, in its order."""
    return [_row(name, number, line) for number, line in _body(name, text, _STAY_HEADER)]


def _row(name: str, number: int, line: str) -> Row:
    fields = line.split(",")
    if len(fields) != 3:
        raise ValueError(
            f"{name}, line {number}: expected the 3 fields {_STAY_HEADER}, found {len(fields)}; {AS_PUBLISHED}."
        )
    minutes = _minutes(fields[0].strip())
    parameter = fields[1].strip()
    value = _number(fields[2])
    if minutes is None:
        raise ValueError(f"{name}, line {number}: expected a time hh:mm; {AS_PUBLISHED}.")
    if parameter not in _PARAMETERS:
        raise ValueError(f"{name}, line {number}: expected a parameter of the Challenge; {AS_PUBLISHED}.")
    if value is None:
        raise ValueError(f"{name}, line {number}: expected a number as the value of {parameter}; {AS_PUBLISHED}.")
    return Row(number, minutes, parameter, value)


@functools.lru_cache(maxsize=10_000)
def _minutes(time: str) -> int | None:
    match = re.fullmatch(r"([0-9]{2,4}):([0-5][0-9])", time)
    return 60 * int(match[1]) + int(match[2]) if match else None


def _number(text: str) -> float | None:
    """The number, which may be infinite or NaN; Python alone would let underscores pass."""
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def stay_once(name: str, rows: list[Row]) -> dict[str, Row]:
    """The row of each parameter that a stay has once, at 00:00."""
    once: dict[str, Row] = {}
    for row in rows:
        if row.parameter not in _ONCE:
            continue
        first = once.setdefault(row.parameter, row)
        if row.minutes != 0:
            raise ValueError(f"{name}, line {row.line}: expected {row.parameter} at 00:00; {AS_PUBLISHED}.")
        if first is not row and first.value != row.value:
            raise ValueError(f"{name}, lines {first.line} and {row.line}: {row.parameter} twice; {AS_PUBLISHED}.")
    for parameter in ("RecordID", "ICUType"):
        if parameter not in once:
            raise ValueError(f"{name}: expected RecordID and ICUType at 00:00, found no {parameter}; {AS_PUBLISHED}.")
    return once


def _is_record_id(number: float | None) -> bool:
    return number is not None and number.is_integer() and 0 <= number < 2**53


def record_id(name: str, row: Row) -> int:
    """The stay's number, which is its file's name, too, where that is a number."""
    if not _is_record_id(row.value):
        raise ValueError(f"{name}, line {row.line}: expected a RecordID, a whole number; {AS_PUBLISHED}.")
    number = int(row.value)
    stem = pathlib.PurePath(name).stem
    # Another number as the file's name: one of the two stays was saved in the place of the other.
    if stem.isdecimal() and int(stem) != number:
        raise ValueError(f"{name}, line {row.line}: RecordID {number} in a file of another number; {AS_PUBLISHED}.")
    return number


def icu_type(name: str, row: Row) -> int:
    """The stay's unit, -1 if unknown."""
    if row.value not in (*ICU_TYPES, MISSING):
        raise ValueError(f"{name}, line {row.line}: expected an ICUType of 1 to 4, or -1 if unknown; {AS_PUBLISHED}.")
    return int(row.value)
