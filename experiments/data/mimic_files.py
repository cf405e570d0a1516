"""MIMIC's files: which version a directory holds, where its tables are, and whether a file is whole and readable.

Everything that can happen to a file ends in a FileNotFoundError or a ValueError that names it and says what to do.
"""

import contextlib
import csv
import glob
import gzip
import io
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import duckdb
from tqdm import tqdm

HOW_TO_GET = (
    "MIMIC is open to credentialed users of PhysioNet: https://physionet.org/content/mimiciii/1.4/ or "
    "https://physionet.org/content/mimiciv/ (2.2 or later, 3.x). Give the directory that holds, for MIMIC-III, "
    "ICUSTAYS, PATIENTS, ADMISSIONS, CHARTEVENTS and LABEVENTS as TABLE.csv[.gz]; for MIMIC-IV, icu/icustays, "
    "icu/chartevents, hosp/patients, hosp/admissions and hosp/labevents as table.csv[.gz]."
)


class Layout(NamedTuple):
    """How one version of MIMIC names things.

    Attributes:
      name: of the version.
      tables: for each table its folder and the columns read.
      stay: column that identifies a stay.
      age: in years at admission, as SQL.
      era: as SQL; NULL where unknown. Eras sort in order of time.
      valid: SQL condition on a row of CHARTEVENTS.
    """

    name: str
    tables: dict[str, tuple[str, str]]
    stay: str
    age: str
    era: str
    valid: str


MIMIC_III = Layout(
    name="mimic-iii",
    tables={
        "icustays": ("", "subject_id hadm_id icustay_id dbsource first_careunit intime outtime"),
        "patients": ("", "subject_id gender dob dod"),
        "admissions": ("", "hadm_id admittime dischtime deathtime hospital_expire_flag"),
        "chartevents": ("", "subject_id itemid charttime valuenum error"),
        "labevents": ("", "subject_id itemid charttime valuenum"),
    },
    stay="icustay_id",
    age="date_diff('day', dob, admittime) / 365.2425",
    era="nullif(lower(dbsource), 'both')",  # 'carevue' until 2008, 'metavision' after
    valid="coalesce(error, 0) = 0",
)
MIMIC_IV = Layout(
    name="mimic-iv",
    tables={
        "icustays": ("icu", "subject_id hadm_id stay_id first_careunit intime outtime"),
        "patients": ("hosp", "subject_id gender anchor_age anchor_year anchor_year_group dod"),
        "admissions": ("hosp", "hadm_id admittime dischtime deathtime hospital_expire_flag"),
        "chartevents": ("icu", "subject_id itemid charttime valuenum"),
        "labevents": ("hosp", "subject_id itemid charttime valuenum"),
    },
    stay="stay_id",
    age="anchor_age + year(admittime) - anchor_year",
    era="anchor_year_group",  # '2008 - 2010', ...
    valid="true",
)
EVENT_TABLES = ("chartevents", "labevents")


def locate(directory: pathlib.Path) -> tuple[Layout, dict[str, pathlib.Path]]:
    """The version found in a directory, and its tables' paths.

    Raises:
      FileNotFoundError: the directory or a table is missing.
      ValueError: two files for one table, or a directory that may not be read.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory. {HOW_TO_GET}")
    for layout in (MIMIC_III, MIMIC_IV):
        folder, _ = layout.tables["icustays"]
        if _table_path(directory / folder, "icustays"):
            return layout, _table_paths(directory, layout)
    raise FileNotFoundError(f"No ICUSTAYS.csv[.gz] in {directory} or in {directory / 'icu'}. {_deeper(directory)}")


def _deeper(directory):
    """Where the tables may be instead: an archive often unpacks into a folder of its own."""
    for folder in _listing(directory):
        if folder.is_dir() and (_table_path(folder, "icustays") or _table_path(folder / "icu", "icustays")):
            return f"There is one in {folder}: give that directory."
    return HOW_TO_GET


def _table_paths(directory, layout):
    paths = {name: _table_path(directory / folder, name) for name, (folder, _) in layout.tables.items()}
    missing = [name for name, path in paths.items() if path is None]
    meds = [path for path in _listing(directory / "meds") if path.suffix == ".parquet" and path.name[0] != "."]
    if meds and missing and set(missing) <= set(EVENT_TABLES):
        # The open MIMIC-IV demo has its events as one MEDS table in place of the raw ones.
        paths = {name: path for name, path in paths.items() if name not in EVENT_TABLES}
        return paths | {f"meds/{path.name}": path for path in meds}
    if missing:
        similar = _similar(directory, layout, missing)
        raise FileNotFoundError(f"{layout.name} in {directory} lacks the tables {missing}. {similar}{HOW_TO_GET}")
    return paths


def _similar(directory, layout, missing):
    """Files that are tables in a form that is not read, such as ICUSTAYS.csv.zip."""
    files = [
        str(path)
        for name in missing
        for path in _listing(directory / layout.tables[name][0])
        if path.name.lower().startswith(f"{name}.")
    ]
    return f"Found {', '.join(files)}: unpack or convert it to .csv or .csv.gz. " if files else ""


def _listing(folder):
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:
        raise ValueError(f"{folder} may not be read ({error.strerror}): ask for the right to read it.") from None


def _table_path(folder, name):
    """TABLE.csv or TABLE.csv.gz in upper or lower case, or that file within a folder of this name, or None."""
    names = (f"{name}.csv", f"{name}.csv.gz")
    found = [path for path in _listing(folder) if path.name.lower() in names]
    files = [file for path in found for file in ([path] if not path.is_dir() else _within(path, names))]
    if len(files) > 1:
        both = " and ".join(map(str, files))
        raise ValueError(f"{both} are two files for one table: remove the one that is old or cut off.")
    if files and not files[0].is_file():
        raise FileNotFoundError(f"{files[0]} is no file, or a link to nothing. {HOW_TO_GET}")
    return files[0] if files else None


def _within(folder, names):
    """The table in a folder that has its name, as some archives unpack."""
    files = [path for path in _listing(folder) if path.name.lower() in names and path.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder} is a folder, without a {names[0]}[.gz] in it; expected the file. {HOW_TO_GET}"
        )
    return files


def check_compression(path: pathlib.Path, progress: bool) -> None:
    """Reads a .gz once against its check sums, which duckdb ignores: a damaged table may otherwise parse."""
    if path.suffix != ".gz":
        return
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {path.name}", disable=not progress)
    with bar, _opening(path), path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as stream:
        while stream.read(1 << 20):
            bar.update(raw.tell() - bar.n)


def header(path):
    """The column names of a CSV file, in lower case."""
    with _opening(path):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
            start = stream.read(1 << 16)
    if not start:
        raise ValueError(f"{path} is empty. Fetch it again.")
    if "\0" in start:
        raise ValueError(f"{path} is damaged or incomplete, or UTF-16: it holds zero bytes. Save it as UTF-8 text.")
    return [name.strip().lower() for name in next(csv.reader(io.StringIO(start, newline="")), [])]


@contextlib.contextmanager
def _opening(path) -> Iterator[None]:
    """Names the file in Python's complaints about it."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{path} may not be read ({error.strerror}): ask for the right to read it.") from None
    except UnicodeDecodeError as error:
        # The error itself holds the bytes that were read.
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is damaged or incomplete, or no text in UTF-8: {reason}. Save it as UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{path} is damaged or incomplete, or no CSV: {error}. Fetch it again.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}. Fetch it again.") from None


def require_columns(path, found, expected):
    missing = [name for name in expected if name not in found]
    if missing:
        # What was found is not shown: without a header it is the first patient's row.
        separators = [
            name for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")) if mark in "".join(found)
        ]
        hint = f"Separated by {separators[0]}? Write it with commas. " if len(found) == 1 and separators else ""
        raise ValueError(f"{path} lacks {missing} among the {len(found)} columns of its first line. {hint}{HOW_TO_GET}")
    twice = [name for name in expected if found.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has the columns {twice} twice in its first line: remove one of each.")


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Names the file in duckdb's complaints about it."""
    try:
        yield
    except (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException) as error:
        message = str(error)
        if isinstance(error, duckdb.IOException) and not ("GZIP" in message or str(path) in message):
            raise
        raise ValueError(f"{path} is damaged or incomplete: {_reason(message)}. Fetch it again.") from None


def _reason(message):
    """What duckdb says without the row that it quotes, which is a patient's."""
    first = message.partition("\n")[0]
    known = r"Expected Number of Columns: \d+ Found: \d+|not utf-8 encoded|unterminated quote"
    return "; ".join(dict.fromkeys([first, *re.findall(known, message)]))


def meds_value(connection: duckdb.DuckDBPyConnection, path: pathlib.Path) -> str:
    """The name of a MEDS table's numbers, which is not the standard's in the open demo."""
    with reading(path):
        columns = [row[0] for row in connection.execute(f"DESCRIBE FROM read_parquet({file(path)})").fetchall()]
    require_columns(path, columns, ("subject_id", "time", "code"))
    if not {"numeric_value", "value"} & set(columns):
        raise ValueError(f"{path} lacks the column 'numeric_value'; its columns are {columns}.")
    return "numeric_value" if "numeric_value" in columns else "value"


def text(value: object) -> str:
    """A string as SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def file(path: pathlib.Path) -> str:
    """A path as SQL, without wild cards."""
    return text(glob.escape(str(path)))
