"""From MIMIC's tables to one derived table: the stays judged, the events read in one pass each, a report of both."""

import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import duckdb
import numpy as np

from experiments.data import mimic_files, mimic_sql, mimic_tables, splits
from experiments.data.mimic_files import file, text
from experiments.data.mimic_sql import LEAST_HOURS


class Study(NamedTuple):
    """What is derived.

    Attributes:
      name: of the derived table, after the database's.
      items: (itemid, variable, least, greatest plausible value) of what is measured.
      conversions: SQL for a `value` in its variable's unit, and the items that it is for.
      features: makes the SQL of the derived table, from the tables `cohort` and `events`.
      definition: all else that the derived table depends on.
      most_hours: of a stay, or None.
    """

    name: str
    items: tuple[tuple[int, str, float, float], ...]
    conversions: dict[str, tuple[int, ...]]
    features: Callable[[], str]
    definition: tuple
    most_hours: int | None = None


def derive(
    directory: pathlib.Path, cache_dir: pathlib.Path, study: Study, memory_limit: str, progress: bool
) -> pathlib.Path:
    """The path of the derived table, made if it is not there."""
    layout, paths = mimic_files.locate(directory)
    cached = cache_dir / f"{layout.name}{study.name}-{_digest(layout, paths, study)}.parquet"
    if not cached.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".spill-") as spill, duckdb.connect() as connection:
            _configure(connection, spill, memory_limit, progress)
            try:
                _build(connection, layout, paths, study, cached, progress)
            except duckdb.OutOfMemoryException:
                raise ValueError(f"{directory} cannot be read with {memory_limit=}: give more memory.") from None
    return cached


def read(path: pathlib.Path) -> splits.Records:
    """The columns of a derived table, in order of `subject_id`."""
    query = f"SELECT * FROM read_parquet({file(path)}) ORDER BY subject_id"
    with duckdb.connect() as connection:
        return {name: np.asarray(values) for name, values in connection.execute(query).fetchnumpy().items()}


def _digest(layout, paths, study):
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths.values()]
    queries = (mimic_sql.STAYS, mimic_sql.COHORT, mimic_sql.EVENTS)
    columns = (mimic_tables.KINDS, mimic_tables.COLUMN_KINDS, mimic_tables.EMPTY_CELLS)
    derived = (study.items, study.conversions, study.definition, study.most_hours)
    return hashlib.sha256(repr((stats, layout, queries, columns, derived)).encode()).hexdigest()[:16]


def _configure(connection, spill, memory_limit, progress):
    connection.execute(f"SET memory_limit = {text(memory_limit)}")
    connection.execute(f"SET temp_directory = {text(spill)}")
    connection.execute("SET preserve_insertion_order = false")  # rows may then be dropped as soon as they are filtered
    connection.execute(f"SET enable_progress_bar = {progress}")


def _build(connection, layout, paths, study, target, progress):
    """Derive the table and write it, with the report, to `target`."""

    def say(message):
        if progress:
            print(f"{layout.name}: {message}", flush=True)

    tables = {}
    for name in ("icustays", "patients", "admissions"):
        say(f"reading {name}")
        tables[name] = _read_table(connection, layout, name, paths[name], progress)
    _require_matches(connection, paths, tables)
    stays = _build_cohort(connection, layout, study.most_hours)
    say(f"{stays['used']} patients in the cohort")
    events = {}
    _prepare_events(connection, study)
    for name in [name for name in paths if name not in tables]:
        say(f"reading {name}, {paths[name].stat().st_size / 1e6:.0f} MB")
        events[name], tables[name] = _read_events(connection, layout, study, name, paths[name], progress)
    _require_values(events, paths)
    found = {"database": layout.name, "patients": stays["used"], "tables": tables, "stays": stays, "events": events}
    say(f"features, to {target}")
    _write(connection, study.features(), found, target)


def _read_table(connection, layout, name, path, progress):
    """Reads a table of one row a stay, patient or admission; returns its part of the report."""
    mimic_files.check_compression(path, progress)
    _, columns = layout.tables[name]
    query = f"CREATE TEMP TABLE {name} AS {mimic_tables.scan(path, columns.split())}"
    with mimic_files.reading(path):
        connection.execute(query)
    counts = connection.execute(f"SELECT states, count(*) FROM {name} GROUP BY states").fetchall()
    key = {"icustays": layout.stay, "patients": "subject_id", "admissions": "hadm_id"}[name]
    entry = _checked_entry(path, name, columns, counts)
    mimic_tables.check_unique(connection, path, name, key)
    return entry


def _checked_entry(path, name, columns, counts):
    """A CSV table's part of the report, from its pairs (states, rows), once it is known to be of use."""
    rows = sum(number for _, number in counts)
    mimic_tables.check_rows(path, rows, name)
    cells = mimic_tables.cells(columns.split(), counts)
    mimic_tables.check_cells(path, cells)
    return {"file": str(path), "rows": rows, "cells": cells}


def _require_matches(connection, paths, tables):
    """Refuses stays without their patient or admission, unless an unreadable key explains them: a table is cut off."""
    for name, key in (("patients", "subject_id"), ("admissions", "hadm_id")):
        query = f"SELECT count(*) FROM icustays ANTI JOIN {name} USING ({key}) WHERE {key} IS NOT NULL"
        (unmatched,) = connection.execute(query).fetchone()
        cells = tables[name]["cells"][key]
        if unmatched > sum(cells.values()) - cells["read"]:
            raise ValueError(
                f"{paths['icustays']} has {unmatched} stays whose {key} is not in {paths[name]}: one of the two is "
                "incomplete. Fetch both again."
            )


def _build_cohort(connection, layout, most_hours):
    """Judges every stay and keeps the cohort; numbers of stays by fate."""
    too_long = f"outtime > intime + INTERVAL {most_hours} HOUR" if most_hours else "false"
    connection.execute(mimic_sql.STAYS.format(stay=layout.stay, age=layout.age, era=layout.era, too_long=too_long))
    connection.execute(mimic_sql.COHORT)
    fates = dict(connection.execute("SELECT fate, count(*) FROM stays GROUP BY fate ORDER BY fate").fetchall())
    if "used" not in fates:
        stays = sum(fates.values())
        raise ValueError(
            f"None of {stays} ICU stays is a first stay over {LEAST_HOURS} h of a patient over 15 years: {fates}."
        )
    return fates


def _prepare_events(connection, study):
    rows = [
        f"({item}::BIGINT, {text(name)}, '{low}'::DOUBLE, '{high}'::DOUBLE)" for item, name, low, high in study.items
    ]
    connection.execute(f"CREATE TEMP TABLE items AS FROM (VALUES {', '.join(rows)}) AS t(itemid, variable, low, high)")
    connection.execute(f"CREATE TEMP TABLE events ({mimic_sql.EVENT_COLUMNS})")


def _read_events(connection, layout, study, name, path, progress):
    """Reads a table of events; returns its numbers of rows by fate, and its part of the report."""
    mimic_files.check_compression(path, progress)
    source = _event_source(connection, layout, name, path)
    query = mimic_sql.EVENTS.format(source=source, converted=_converted(study.conversions), name=text(name))
    with mimic_files.reading(path):
        connection.execute(query)
    grouped = f"SELECT {{}}, sum(number)::BIGINT FROM events WHERE name = {text(name)} GROUP BY 1 ORDER BY 1"
    fates = dict(connection.execute(grouped.format("fate")).fetchall())
    if name not in mimic_files.EVENT_TABLES:
        return fates, {"file": str(path), "rows": sum(fates.values()), "cells": {}}
    counts = connection.execute(grouped.format("states")).fetchall()
    return fates, _checked_entry(path, name, layout.tables[name][1], counts)


def _require_values(events, paths):
    """Refuses a table of events without a value for the cohort; of a MEDS data set's files, only all of them."""
    if any("used" in fates for name, fates in events.items() if name not in mimic_files.EVENT_TABLES):
        return
    for name, fates in events.items():
        if "used" not in fates:
            raise ValueError(
                f"{paths[name]}: {name.upper()} gives no value for the cohort; its rows are: {fates}. Fetch it again, "
                "and the tables that belong to it."
            )


def _event_source(connection, layout, name, path):
    """SQL for subject_id, itemid, time, value, valid and states of the events in a file."""
    if name in mimic_files.EVENT_TABLES:
        valid = layout.valid if name == "chartevents" else "true"
        rows = mimic_tables.scan(path, layout.tables[name][1].split())
        return (
            f"SELECT subject_id, itemid, charttime AS time, valuenum AS value, {valid} AS valid, states FROM ({rows})"
        )
    number = f"try_cast({mimic_files.meds_value(connection, path)} AS DOUBLE)"
    itemid = "CASE WHEN code LIKE 'LAB//%' THEN try_cast(split_part(code, '//', 2) AS BIGINT) END"  # LAB//220045//bpm
    value = f"CASE WHEN isfinite({number}) THEN {number} END"
    columns = f"subject_id, {itemid} AS itemid, time::TIMESTAMP AS time, {value} AS value, true AS valid, 0 AS states"
    return f"SELECT {columns} FROM read_parquet({file(path)})"


def _write(connection, query, found, target):
    with splits.atomic(target) as temporary:
        options = f"FORMAT parquet, USE_TMP_FILE false, KV_METADATA {{report: {text(json.dumps(found))}}}"
        connection.execute(f"COPY ({query}) TO {text(temporary)} ({options})")


def _converted(conversions):
    """SQL for a value in its variable's unit."""
    cases = " ".join(f"WHEN itemid IN {items} THEN {formula}" for formula, items in conversions.items())
    return f"CASE {cases} ELSE value END"
