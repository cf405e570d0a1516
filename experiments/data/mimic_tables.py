"""MIMIC's tables with types: a cell that does not parse is missing and counted; a table that gives nothing is refused.

Hospitals, databases and spreadsheets write the same table in many ways. What makes one useless, or a part of itself,
is a ValueError that names the file and the column: not one cell parses, a key is not unique, a spreadsheet cut it.
"""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import duckdb

from experiments.data import mimic_files
from experiments.data.mimic_files import file, text


class Kind(NamedTuple):
    """A type of column: what a cell must look like, and the value of such a cell as SQL."""

    pattern: str
    value: str


# The patterns are strict because a cast is not: duckdb takes 1:00 PM for 1:00, 10006.4 for 10006 and 1_000 for 1000.
# Databases and pandas write whole numbers as 10006.0 and flags as True.
KINDS = {
    "id": Kind(r"\s*\+?\d+(\.0*)?([eE]\+?\d+)?\s*", "try_cast({cell} AS BIGINT)"),
    "number": Kind(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", "try_cast({cell} AS DOUBLE)"),
    "flag": Kind(
        r"\s*(\d+\.?0*|(?i:t|f|true|false))\s*",
        "coalesce(try_cast({cell} AS DOUBLE), (lower(trim({cell})) LIKE 't%')::DOUBLE)",
    ),
    "time": Kind(
        r"\s*\d{4}[-/]\d{1,2}[-/]\d{1,2}([ T]\d{1,2}:\d{2}(:\d{2}(\.\d*)?)?Z?)?\s*", "try_cast({cell} AS TIMESTAMP)"
    ),
    "sex": Kind(r"\s*(?i:f|female|m|male)\s*", "(upper(trim({cell})) LIKE 'F%')::INTEGER"),
}
COLUMN_KINDS = (
    dict.fromkeys(("subject_id", "hadm_id", "icustay_id", "stay_id", "itemid"), "id")
    | dict.fromkeys(("valuenum", "anchor_age", "anchor_year"), "number")
    | dict.fromkeys(("error", "hospital_expire_flag"), "flag")
    | dict.fromkeys(("intime", "outtime", "dob", "dod", "admittime", "dischtime", "deathtime", "charttime"), "time")
    | dict.fromkeys(("dbsource", "first_careunit", "anchor_year_group"), "text")
    | {"gender": "sex"}
)
# How databases, spreadsheets, pandas, R and the removal of names write that there is nothing.
EMPTY_CELLS = ("", "null", r"\n", "na", "n/a", "<na>", "nan", "nat", "none", "___", "-", ".", "?")
MAY_BE_EMPTY = ("deathtime", "dod", "error", "gender", "dbsource", "first_careunit", "anchor_year_group")
STATES = ("read", "empty", "unreadable", "other date")  # such as month/day/year
_EXPECTED = {
    "id": "a whole number",
    "number": "a number, with a decimal point",
    "flag": "0 or 1",
    "time": "a time YYYY-MM-DD HH:MM:SS",
    "sex": "F or M",
}
# Data rows of a sheet that is full but for its header: of Excel until 2003, and since.
FULL_SHEETS = (65_535, 1_048_575)


def scan(path: pathlib.Path, columns: Iterable[str]) -> str:
    """SQL for the typed columns of a CSV file, which is checked to have them, and `states` for `cells`.

    Everything about the format is told: of CHARTEVENTS' first rows duckdb guesses wrongly that nothing is quoted.
    """
    columns = list(columns)
    header = mimic_files.header(path)
    mimic_files.require_columns(path, header, columns)
    # A column without a name, such as pandas' index, and one that is not read may be called anything.
    names = [f"{name}_cell" if name in columns else f"unread_{place}" for place, name in enumerate(header)]
    types = ", ".join(f"{text(name)}: 'VARCHAR'" for name in names)
    options = f"columns = {{{types}}}, header = true, auto_detect = false, delim = ',', quote = '\"', escape = '\"'"
    parsed = ", ".join(f"{name}_cell, {_parsed(name)} AS {name}" for name in columns)
    states = " + ".join(f"{len(STATES) ** place} * {_state(name)}" for place, name in enumerate(columns))
    return (
        f"SELECT {', '.join(columns)}, {states} AS states FROM (SELECT {parsed} FROM read_csv({file(path)}, {options}))"
    )


def _parsed(column):
    """SQL for a cell's value; NULL where it does not parse.

    The test before the cast is needed for one more reason: a bare cast would be done by the reader, which raises.
    """
    cell, kind = f"{column}_cell", COLUMN_KINDS[column]
    if kind == "text":
        return f"CASE WHEN NOT {_is_empty(column)} THEN trim({cell}) END"
    pattern, value = KINDS[kind]
    typed = f"CASE WHEN regexp_full_match({cell}, {text(pattern)}) THEN {value.format(cell=cell)} END"
    if kind == "number":
        return f"CASE WHEN isfinite({typed}) THEN {typed} END"  # 1e999 is infinite
    return typed


def _state(column):
    """SQL for the place in STATES."""
    date = f"regexp_matches({column}_cell, '\\d+[-/.]\\d+[-/.]\\d')" if COLUMN_KINDS[column] == "time" else "false"
    return f"CASE WHEN {column} IS NOT NULL THEN 0 WHEN {_is_empty(column)} THEN 1 WHEN {date} THEN 3 ELSE 2 END"


def _is_empty(column):
    tokens = ", ".join(map(text, EMPTY_CELLS))
    return f"coalesce(lower(trim({column}_cell)) IN ({tokens}), true)"


def cells(columns: Iterable[str], counts: Iterable[tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Numbers of cells of each state in each column, from pairs (states, number of rows)."""
    counts = list(counts)
    return {
        name: {
            state: sum(rows for states, rows in counts if states // len(STATES) ** place % len(STATES) == code)
            for code, state in enumerate(STATES)
        }
        for place, name in enumerate(columns)
    }


def check_rows(path: pathlib.Path, rows: int, name: str) -> None:
    """Refuses a table without rows, and one that fills a sheet."""
    if not rows:
        raise ValueError(f"{path} has a header alone: {name.upper()} gives no value for the cohort. Fetch it again.")
    if rows in FULL_SHEETS:
        raise ValueError(
            f"{path} has exactly {rows:,} rows, as many as a spreadsheet holds, which cut off the rest. Fetch it "
            "again, and do not save it from a spreadsheet."
        )


def check_cells(path: pathlib.Path, found: dict[str, dict[str, int]]) -> None:
    """Refuses a column of which nothing parses, and one that may not be empty and is.

    A column that may be empty may hold one cell that means nothing; a date in another form does mean something.
    """
    for column, counts in found.items():
        if counts["read"]:
            continue
        tolerated = 1 if column in MAY_BE_EMPTY else 0
        if counts["other date"] or counts["unreadable"] > tolerated:
            expected = _EXPECTED[COLUMN_KINDS[column]]
            raise ValueError(f"{path}: not one cell of the column {column!r} parses as {expected}. Write it so.")
        if column not in MAY_BE_EMPTY and column != "valuenum":
            raise ValueError(f"{path}: every cell of the column {column!r} is empty. Fetch the file again.")


def check_unique(connection: duckdb.DuckDBPyConnection, path: pathlib.Path, name: str, key: str) -> None:
    """Refuses a table, read into `name`, of which several rows have one key."""
    query = f"SELECT count(*) FROM (SELECT {key} FROM {name} WHERE {key} IS NOT NULL GROUP BY ALL HAVING count(*) > 1)"
    (repeated,) = connection.execute(query).fetchone()
    if repeated:
        raise ValueError(
            f"{path}: {key} is not unique in {name.upper()}; {repeated} of its values have several rows. Leave one row "
            f"for each {key}."
        )
