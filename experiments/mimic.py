"""A public -> private task from raw MIMIC-III or MIMIC-IV files: death in, or a long stay in, intensive care.

    split = mimic.load(pathlib.Path("mimiciii/1.4"), outcome="mortality", cache_dir=pathlib.Path("cache"))

The cohort follows MIMIC-Extract (arXiv:1907.08322) as used by arXiv:2311.09200: each patient's first ICU stay, age over
15, stay over 36 hours. Inputs are the first 24 hours; the next 6 are a gap of which nothing is used. Values that a
stay's last hours could leak (its length, its last unit, discharge) are no inputs.

The files are streamed by duckdb, CHARTEVENTS once, within `memory_limit`; what does not fit spills to `cache_dir`.
"""

import contextlib
import csv
import glob
import gzip
import hashlib
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import duckdb
import numpy as np

from experiments import data

INPUT_HOURS, GAP_HOURS, LEAST_HOURS = 24, 6, 36
LONG_STAY_HOURS = 72
STATISTICS = ("last", "mean", "min", "max", "count")

HOW_TO_GET = (
    "MIMIC is open to credentialed users of PhysioNet: https://physionet.org/content/mimiciii/1.4/ or "
    "https://physionet.org/content/mimiciv/ (2.2 or later, 3.x). Give the directory that holds, for MIMIC-III, "
    "ICUSTAYS, PATIENTS, ADMISSIONS, CHARTEVENTS and LABEVENTS as TABLE.csv[.gz]; for MIMIC-IV, icu/icustays, "
    "icu/chartevents, hosp/patients, hosp/admissions and hosp/labevents as table.csv[.gz]."
)


class Variable(NamedTuple):
    """What is measured, the least and greatest plausible value, and the items under which it is recorded."""

    name: str
    low: float
    high: float
    carevue: tuple[int, ...]
    metavision: tuple[int, ...]
    labs: tuple[int, ...]


# CareVue and MetaVision are MIMIC-III's two charting systems; MIMIC-IV has MetaVision's, and both have LABEVENTS.
# CHARTEVENTS repeats laboratory results under items of its own, which are left out: they would count twice. Bounds hold
# after conversion; a value outside them counts as missing.
VARIABLES = (
    #        name                low   high  CareVue, MetaVision and LABEVENTS items
    Variable("heart_rate",       10,   300,  (211,), (220045,), ()),
    Variable("systolic_bp",      30,   300,  (51, 442, 455, 6701), (220050, 220179, 225309, 224167, 227243), ()),
    Variable("diastolic_bp",     10,   200,  (8368, 8440, 8441, 8555), (220051, 220180, 225310, 224643, 227242), ()),
    Variable("mean_bp",          15,   250,  (52, 443, 456, 6702), (220052, 220181, 225312), ()),
    Variable("respiratory_rate", 1,    80,   (615, 618), (220210, 224690), ()),
    Variable("temperature",      25,   45,   (676, 678), (223761, 223762), ()),
    Variable("spo2",             30,   100,  (646,), (220277,), ()),
    Variable("fio2",             20,   100,  (190, 3420, 3422), (223835,), (50816,)),
    Variable("gcs_eye",          1,    4,    (184,), (220739,), ()),
    Variable("gcs_verbal",       1,    5,    (723,), (223900,), ()),
    Variable("gcs_motor",        1,    6,    (454,), (223901,), ()),
    Variable("weight",           25,   350,  (762, 763, 3580, 3581, 3693), (224639, 226512, 226531), ()),
    Variable("glucose",          10,   2000, (807,), (225664,), (50809, 50931)),
    Variable("creatinine",       0.05, 40,   (), (), (50912,)),
    Variable("urea_nitrogen",    1,    300,  (), (), (51006,)),
    Variable("sodium",           90,   200,  (), (), (50824, 50983)),
    Variable("potassium",        1,    12,   (), (), (50822, 50971)),
    Variable("chloride",         50,   175,  (), (), (50806, 50902)),
    Variable("bicarbonate",      2,    70,   (), (), (50882,)),
    Variable("anion_gap",        -5,   60,   (), (), (50868,)),
    Variable("lactate",          0.1,  40,   (), (), (50813,)),
    Variable("white_cells",      0,    1000, (), (), (51300, 51301)),
    Variable("hemoglobin",       1.5,  25,   (), (), (50811, 51222)),
    Variable("hematocrit",       5,    75,   (), (), (50810, 51221)),
    Variable("platelets",        1,    2500, (), (), (51265,)),
    Variable("bilirubin",        0.05, 80,   (), (), (50885,)),
    Variable("inr",              0.4,  30,   (), (), (51237,)),
    Variable("ptt",              10,   250,  (), (), (51275,)),
    Variable("ph",               6.5,  8,    (), (), (50820,)),
    Variable("po2",              10,   750,  (), (), (50821,)),
    Variable("pco2",             5,    200,  (), (), (50818,)),
    Variable("albumin",          0.5,  8,    (), (), (50862,)),
    Variable("calcium",          2,    20,   (), (), (50893,)),
    Variable("free_calcium",     0.2,  4,    (), (), (50808,)),
    Variable("magnesium",        0.2,  15,   (), (), (50960,)),
    Variable("phosphate",        0.2,  25,   (), (), (50970,)),
)  # fmt: skip

FEATURES = ("age", "female", *(f"{variable.name}_{statistic}" for variable in VARIABLES for statistic in STATISTICS))

# FiO2 is charted now as a fraction, now in per cent, under one and the same item.
CONVERSIONS = {
    "(value - 32) / 1.8": (678, 223761),  # degrees Fahrenheit
    "value * 0.45359237": (3581, 226531),  # pounds
    "if(value <= 1, 100 * value, value)": (190, 3420, 3422, 223835, 50816),
}

# A unit that mixes medical and surgical patients is private, so that public patients are surgical without exception.
# Beds below intensive care that MIMIC-IV lists as ICU stays, such as "Neuro Stepdown", are neither, and left out.
SURGICAL_UNITS = (
    "CSRU",
    "SICU",
    "TSICU",
    "Cardiac Vascular Intensive Care Unit (CVICU)",
    "Neuro Surgical Intensive Care Unit (Neuro SICU)",
    "Surgical Intensive Care Unit (SICU)",
    "Trauma SICU (TSICU)",
)
MEDICAL_UNITS = (
    "MICU",
    "CCU",
    "Coronary Care Unit (CCU)",
    "Medical Intensive Care Unit (MICU)",
    "Medical/Surgical Intensive Care Unit (MICU/SICU)",
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
    era="nullif(dbsource, 'both')",  # 'carevue' until 2008, 'metavision' after
    valid="error IS DISTINCT FROM '1'",
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

# The type of every column that is not text. A cell that does not parse is missing.
TYPES = (
    dict.fromkeys(("subject_id", "hadm_id", "icustay_id", "stay_id"), "BIGINT")
    | dict.fromkeys(("itemid", "hospital_expire_flag", "anchor_age", "anchor_year"), "INTEGER")
    | dict.fromkeys(
        ("intime", "outtime", "dob", "dod", "admittime", "dischtime", "deathtime", "charttime"), "TIMESTAMP"
    )
    | {"valuenum": "DOUBLE"}
)

# The hospital's record of death decides. Only where it has none does `dod` count, which is a date: a patient is dead
# for certain when that day ends. MIMIC-III shifts ages over 89 to 300, hence the cap. A stay over 36 hours outlasts the
# gap; a death recorded before the gap ends contradicts it, and excludes the stay.
COHORT = f"""
CREATE TEMP TABLE cohort AS
WITH first_stays AS (
    SELECT * FROM icustays
    QUALIFY row_number() OVER (PARTITION BY subject_id ORDER BY intime NULLS LAST, {{stay}}) = 1
), candidates AS (
    SELECT subject_id, {{stay}} AS stay_id, intime, outtime,
        coalesce(first_careunit, '') AS unit, coalesce({{era}}, '') AS era,
        least({{age}}, 90) AS age, CASE gender WHEN 'F' THEN 1 WHEN 'M' THEN 0 END AS female,
        coalesce(
            least(deathtime, CASE WHEN hospital_expire_flag = 1 THEN dischtime END),
            date_trunc('day', dod) + INTERVAL 1 DAY
        ) AS death
    FROM first_stays JOIN patients USING (subject_id) JOIN admissions USING (hadm_id)
)
SELECT *, coalesce(death <= outtime, false)::INTEGER AS mortality,
    (outtime > intime + INTERVAL {LONG_STAY_HOURS} HOUR)::INTEGER AS long_stay
FROM candidates
WHERE age > 15 AND outtime > intime + INTERVAL {LEAST_HOURS} HOUR
    AND coalesce(death > intime + INTERVAL {INPUT_HOURS + GAP_HOURS} HOUR, true)
"""

EVENTS = f"""
INSERT INTO events
SELECT subject_id, variable, time, value FROM (
    SELECT subject_id, variable, time, {{converted}} AS value, low, high
    FROM ({{source}}) JOIN items USING (itemid) JOIN cohort USING (subject_id)
    WHERE time >= intime AND time < intime + INTERVAL {INPUT_HOURS} HOUR
) WHERE value BETWEEN low AND high
"""

# Entries of one moment (two cuffs, pounds beside kilograms) count once, at their mean, which also makes "last" unique.
FEATURE_TABLE = """
WITH moments AS (
    SELECT subject_id, variable, time, avg(value) AS value FROM events GROUP BY ALL
), summaries AS (
    SELECT subject_id, variable, {{
        "last": arg_max(value, time), "mean": avg(value), "min": min(value), "max": max(value), "count": count(*)
    }} AS summary
    FROM moments GROUP BY ALL
), wide AS (
    SELECT subject_id, {pivot} FROM summaries GROUP BY subject_id
)
SELECT subject_id, stay_id, unit, era, mortality, long_stay, {columns}
FROM cohort LEFT JOIN wide USING (subject_id) ORDER BY subject_id
"""


def load(
    directory: pathlib.Path,
    *,
    outcome: Literal["mortality", "long_stay"] = "mortality",
    split_by: Literal["care_unit", "era"] = "care_unit",
    cache_dir: pathlib.Path,
    memory_limit: str = "4GB",
    seed: int = 0,
    progress: bool = True,
) -> data.Split:
    """Early ICU data of one population as public, of another as private and test.

    Args:
      directory: a MIMIC-III or MIMIC-IV as PhysioNet distributes it; which one is detected.
      outcome: "mortality", death before the stay ends; or "long_stay", a stay over three days.
      split_by: "care_unit", surgical units public and medical units private; or "era", CareVue public and MetaVision
        private (MIMIC-III), or the earliest `anchor_year_group` public and the later ones private (MIMIC-IV).
      cache_dir: keeps the derived table, and what duckdb spills while it is derived.
      memory_limit: of duckdb.
      seed: which third of the private patients is the test part.
      progress: print the stages and duckdb's progress bar.

    Returns:
      Parts `{"x": (n, p) float32, "label": (n,) int32}`, one record a patient, standardised by public statistics.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: a file is damaged or lacks a column, or a part lacks one of the two classes.
    """
    if outcome not in ("mortality", "long_stay"):
        raise ValueError(f"Expected outcome 'mortality' or 'long_stay', found {outcome=}.")
    if split_by not in ("care_unit", "era"):
        raise ValueError(f"Expected split_by 'care_unit' or 'era', found {split_by=}.")
    table = cohort_table(directory, cache_dir, memory_limit=memory_limit, progress=progress)
    public, private = _populations(table, split_by)
    private = np.random.default_rng(seed).permutation(private)
    parts = [public, private[len(private) // 3 :], private[: len(private) // 3]]
    labels = [table[outcome][part].astype(np.int32) for part in parts]
    _require_both_classes(labels, outcome)
    raw = np.stack([table[name] for name in FEATURES], axis=1).astype(np.float64)
    inputs = data.standardise(raw[public], *(raw[part] for part in parts))
    public, private, test = ({"x": x, "label": label} for x, label in zip(inputs, labels, strict=True))
    return data.Split(public, private, test, _description(table, parts, outcome, split_by))


def cohort_table(
    directory: pathlib.Path, cache_dir: pathlib.Path, *, memory_limit: str = "4GB", progress: bool = True
) -> data.Records:
    """The cohort with raw features and both outcomes, derived once and then read from `cache_dir`.

    The cached file is named by the tables (their paths, sizes and times) and by the definitions above, so that neither
    another directory nor another definition reads it; it appears only once it is complete.

    Returns:
      Columns of one entry a patient, in order of `subject_id`: subject_id, stay_id, unit, era ('' if unknown),
      mortality, long_stay and `FEATURES`. A missing feature is NaN; a count is never missing. **Not private.**

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: a file is damaged or lacks a column, or no stay qualifies.
    """
    layout, tables = _locate(directory)
    cached = cache_dir / f"{layout.name}-{_digest(layout, tables)}.parquet"
    if not cached.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".spill-") as spill, duckdb.connect() as connection:
            _configure(connection, spill, memory_limit, progress)
            _build(connection, layout, tables, cached, progress)
    with duckdb.connect() as connection:
        query = f"SELECT * FROM read_parquet({_file(cached)}) ORDER BY subject_id"
        return {name: np.asarray(values) for name, values in connection.execute(query).fetchnumpy().items()}


def _locate(directory):
    """The version found in a directory, and its tables' paths."""
    for layout in (MIMIC_III, MIMIC_IV):
        folder, _ = layout.tables["icustays"]
        if _table_path(directory / folder, "icustays"):
            return layout, _table_paths(directory, layout)
    raise FileNotFoundError(f"No ICUSTAYS.csv[.gz] in {directory} or in {directory / 'icu'}. {HOW_TO_GET}")


def _table_paths(directory, layout):
    paths = {name: _table_path(directory / folder, name) for name, (folder, _) in layout.tables.items()}
    missing = [name for name, path in paths.items() if path is None]
    meds = sorted((directory / "meds").glob("*.parquet"))
    if meds and missing and set(missing) <= set(EVENT_TABLES):
        # The open MIMIC-IV demo has its events as one MEDS table in place of the raw ones.
        paths = {name: path for name, path in paths.items() if name not in EVENT_TABLES}
        return paths | {f"meds/{path.name}": path for path in meds}
    if missing:
        raise FileNotFoundError(f"{layout.name} in {directory} lacks the tables {missing}. {HOW_TO_GET}")
    return paths


def _table_path(folder, name):
    """TABLE.csv or TABLE.csv.gz in upper or lower case, or None."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((path for path in found if path.name.lower() in (f"{name}.csv", f"{name}.csv.gz")), None)


def _digest(layout, tables):
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in tables.values()]
    definition = (stats, layout, VARIABLES, CONVERSIONS, COHORT, EVENTS, FEATURE_TABLE, STATISTICS)
    return hashlib.sha256(repr(definition).encode()).hexdigest()[:16]


def _configure(connection, spill, memory_limit, progress):
    connection.execute(f"SET memory_limit = {_text(memory_limit)}")
    connection.execute(f"SET temp_directory = {_text(spill)}")
    connection.execute("SET preserve_insertion_order = false")  # rows may then be dropped as soon as they are filtered
    connection.execute(f"SET enable_progress_bar = {progress}")


def _build(connection, layout, tables, target, progress):
    """Derive the table and write it to `target`."""
    say = print if progress else lambda message: None
    for name in ("icustays", "patients", "admissions"):
        say(f"{layout.name}: reading {name}")
        _execute(connection, f"CREATE TEMP TABLE {name} AS {_scan(tables[name], layout.tables[name][1])}", tables[name])
    say(f"{layout.name}: {_build_cohort(connection, layout)} patients in the cohort")
    connection.execute(f"CREATE TEMP TABLE items AS FROM (VALUES {_items()}) AS t(itemid, variable, low, high)")
    connection.execute("CREATE TEMP TABLE events (subject_id BIGINT, variable VARCHAR, time TIMESTAMP, value DOUBLE)")
    for name in [name for name in tables if name in EVENT_TABLES or name.startswith("meds/")]:
        say(f"{layout.name}: reading {name}, {tables[name].stat().st_size / 1e6:.0f} MB")
        query = EVENTS.format(source=_event_source(connection, layout, name, tables[name]), converted=_converted())
        _execute(connection, query, tables[name])
    say(f"{layout.name}: features, to {target}")
    with data.atomic(target) as temporary:
        query = f"COPY ({_feature_query()}) TO {_text(temporary)} (FORMAT parquet, USE_TMP_FILE false)"
        connection.execute(query)


def _build_cohort(connection, layout):
    connection.execute(COHORT.format(stay=layout.stay, age=layout.age, era=layout.era))
    size, stays = connection.execute("SELECT (SELECT count(*) FROM cohort), (SELECT count(*) FROM icustays)").fetchone()
    if not size:
        raise ValueError(f"None of {stays} ICU stays is a first stay over {LEAST_HOURS} h of a patient over 15 years.")
    return size


def _event_source(connection, layout, name, path):
    """SQL for subject_id, itemid, time and value of the events in a file."""
    if name in EVENT_TABLES:
        valid = layout.valid if name == "chartevents" else "true"
        rows = _scan(path, layout.tables[name][1])
        return f"SELECT subject_id, itemid, charttime AS time, valuenum AS value FROM ({rows}) WHERE {valid}"
    value = _meds_value(connection, path)
    itemid = "try_cast(split_part(code, '//', 2) AS INTEGER)"  # of LAB//220045//bpm
    rows = (
        f"SELECT subject_id, {itemid} AS itemid, time, {value}::DOUBLE AS value, code FROM read_parquet({_file(path)})"
    )
    return f"SELECT * EXCLUDE code FROM ({rows}) WHERE code LIKE 'LAB//%'"


def _meds_value(connection, path):
    """The name of a MEDS table's numbers, which is not the standard's in the open demo."""
    with _reading(path):
        columns = [row[0] for row in connection.execute(f"DESCRIBE FROM read_parquet({_file(path)})").fetchall()]
    _require_columns(path, columns, ("subject_id", "time", "code"))
    if not {"numeric_value", "value"} & set(columns):
        raise ValueError(f"{path} lacks the column 'numeric_value'; its columns are {columns}.")
    return "numeric_value" if "numeric_value" in columns else "value"


def _scan(path, columns):
    """SQL for the typed columns of a CSV file, which is checked to have them.

    Everything about the format is told: of CHARTEVENTS' first rows duckdb guesses wrongly that nothing is quoted.
    """
    header = _header(path)
    _require_columns(path, header, columns.split())
    casts = ", ".join(f"try_cast({name} AS {TYPES.get(name, 'VARCHAR')}) AS {name}" for name in columns.split())
    types = ", ".join(f"{_text(name)}: 'VARCHAR'" for name in header)
    options = f"columns = {{{types}}}, header = true, auto_detect = false, delim = ',', quote = '\"', escape = '\"'"
    return f"SELECT {casts} FROM read_csv({_file(path)}, {options})"


def _header(path):
    """The column names of a CSV file, in lower case."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
            return [name.strip().lower() for name in next(csv.reader(stream), [])]
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}. Fetch it again.") from error


def _require_columns(path, found, expected):
    missing = [name for name in expected if name not in found]
    if missing:
        # What was found is not shown: without a header it is the first patient's row.
        raise ValueError(f"{path} lacks {missing} among the {len(found)} columns of its first line. {HOW_TO_GET}")


def _execute(connection, query, path):
    with _reading(path):
        connection.execute(query)


@contextlib.contextmanager
def _reading(path) -> Iterator[None]:
    """Names the file in duckdb's complaints about it."""
    try:
        yield
    except (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException) as error:
        if isinstance(error, duckdb.IOException) and "GZIP" not in str(error):
            raise
        # Only the first line: further ones, and the cause, quote a row of the file, which is a patient's.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or incomplete: {reason}. Fetch it again.") from None


def _items():
    """SQL values (itemid, variable, low, high)."""
    items = [(item, v) for v in VARIABLES for item in (*v.carevue, *v.metavision, *v.labs)]
    return ", ".join(f"({item}, '{v.name}', {v.low}::DOUBLE, {v.high}::DOUBLE)" for item, v in items)


def _converted():
    """SQL for a value in its variable's unit."""
    cases = " ".join(f"WHEN itemid IN {items} THEN {formula}" for formula, items in CONVERSIONS.items())
    return f"CASE {cases} ELSE value END"


def _feature_query():
    pivot = [f"any_value(summary) FILTER (variable = '{v.name}') AS {v.name}" for v in VARIABLES]
    absent = dict.fromkeys(STATISTICS, "'nan'::FLOAT") | {"count": "0"}
    columns = ["age::FLOAT AS age", "coalesce(female, 'nan'::FLOAT)::FLOAT AS female"] + [
        f"coalesce({v.name}.{name}, {absent[name]})::FLOAT AS {v.name}_{name}" for v in VARIABLES for name in STATISTICS
    ]
    return FEATURE_TABLE.format(pivot=", ".join(pivot), columns=", ".join(columns))


def _text(value):
    """A string as SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _file(path):
    return _text(glob.escape(str(path)))


def _populations(table, split_by):
    """Indices of the public and of the private patients."""
    if split_by == "care_unit":
        return tuple(np.flatnonzero(np.isin(table["unit"], units)) for units in (SURGICAL_UNITS, MEDICAL_UNITS))
    eras = np.array([str(era) for era in table["era"]])
    first = min(set(eras) - {""}, default="")
    return np.flatnonzero((eras == first) & (eras != "")), np.flatnonzero((eras != first) & (eras != ""))


def _require_both_classes(labels, outcome):
    counts = [np.bincount(label, minlength=2).tolist() for label in labels]
    if min(map(min, counts)) == 0:
        found = dict(zip(("public", "private", "test"), counts, strict=True))
        raise ValueError(f"Every part needs patients without and with {outcome}; found [without, with] {found}.")


def _description(table, parts, outcome, split_by):
    """The groups and sizes of the populations."""
    column = table["unit" if split_by == "care_unit" else "era"]
    public, private = (", ".join(sorted(set(column[np.concatenate(part)]))) for part in (parts[:1], parts[1:]))
    sizes = " + ".join(str(len(part)) for part in parts)
    return f"MIMIC {outcome} from the first {INPUT_HOURS} h: public {public}; private {private} ({sizes} patients)"
