"""A public -> private task from raw MIMIC-III or MIMIC-IV files: death in, or a long stay in, intensive care.

    split = mimic.load(pathlib.Path("mimiciii/1.4"), outcome="mortality", cache_dir=pathlib.Path("cache"))

The cohort follows MIMIC-Extract (arXiv:1907.08322) as used by arXiv:2311.09200: each patient's first ICU stay, age over
15, stay over 36 hours. Inputs are the first 24 hours; the next 6 are a gap of which nothing is used. Values that a
stay's last hours could leak (its length, its last unit, discharge) are no inputs.

The files are streamed by duckdb, CHARTEVENTS once, within `memory_limit`; what does not fit spills to `cache_dir`. A
compressed file is read once more before, against its check sums. What was read and what was not is in `report`.
"""

import json
import pathlib
from typing import Any, Literal, NamedTuple

import duckdb
import numpy as np

from experiments.data import mimic_build, mimic_sql, splits
from experiments.data.clinical import BOUNDS
from experiments.data.mimic_files import file
from experiments.data.mimic_sql import INPUT_HOURS

STATISTICS = ("last", "mean", "min", "max", "count")


class Variable(NamedTuple):
    """What is measured, the least and greatest plausible value, and the items under which it is recorded."""

    name: str
    low: float
    high: float
    carevue: tuple[int, ...]
    metavision: tuple[int, ...]
    labs: tuple[int, ...]


def _variable(name, carevue, metavision, labs):
    bounds = BOUNDS[name]
    return Variable(name, bounds.low, bounds.high, carevue, metavision, labs)


# CareVue and MetaVision are MIMIC-III's two charting systems; MIMIC-IV has MetaVision's, and both have LABEVENTS.
# CHARTEVENTS repeats laboratory results under items of its own, which are left out: they would count twice. Bounds hold
# after conversion; a value outside them counts as missing.
VARIABLES = (
    #         name                CareVue, MetaVision and LABEVENTS items
    _variable("heart_rate",       (211,), (220045,), ()),
    _variable("systolic_bp",      (51, 442, 455, 6701), (220050, 220179, 225309, 224167, 227243), ()),
    _variable("diastolic_bp",     (8368, 8440, 8441, 8555), (220051, 220180, 225310, 224643, 227242), ()),
    _variable("mean_bp",          (52, 443, 456, 6702), (220052, 220181, 225312), ()),
    _variable("respiratory_rate", (615, 618), (220210, 224690), ()),
    _variable("temperature",      (676, 678), (223761, 223762), ()),
    _variable("spo2",             (646,), (220277,), ()),
    _variable("fio2",             (190, 3420, 3422), (223835,), (50816,)),
    _variable("gcs_eye",          (184,), (220739,), ()),
    _variable("gcs_verbal",       (723,), (223900,), ()),
    _variable("gcs_motor",        (454,), (223901,), ()),
    _variable("weight",           (762, 763, 3580, 3581, 3693), (224639, 226512, 226531), ()),
    _variable("glucose",          (807,), (225664,), (50809, 50931)),
    _variable("creatinine",       (), (), (50912,)),
    _variable("urea_nitrogen",    (), (), (51006,)),
    _variable("sodium",           (), (), (50824, 50983)),
    _variable("potassium",        (), (), (50822, 50971)),
    _variable("chloride",         (), (), (50806, 50902)),
    _variable("bicarbonate",      (), (), (50882,)),
    _variable("anion_gap",        (), (), (50868,)),
    _variable("lactate",          (), (), (50813,)),
    _variable("white_cells",      (), (), (51300, 51301)),
    _variable("hemoglobin",       (), (), (50811, 51222)),
    _variable("hematocrit",       (), (), (50810, 51221)),
    _variable("platelets",        (), (), (51265,)),
    _variable("bilirubin",        (), (), (50885,)),
    _variable("inr",              (), (), (51237,)),
    _variable("ptt",              (), (), (51275,)),
    _variable("ph",               (), (), (50820,)),
    _variable("po2",              (), (), (50821,)),
    _variable("pco2",             (), (), (50818,)),
    _variable("albumin",          (), (), (50862,)),
    _variable("calcium",          (), (), (50893,)),
    _variable("free_calcium",     (), (), (50808,)),
    _variable("magnesium",        (), (), (50960,)),
    _variable("phosphate",        (), (), (50970,)),
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


def load(
    directory: pathlib.Path,
    *,
    outcome: Literal["mortality", "long_stay"] = "mortality",
    split_by: Literal["care_unit", "era"] = "care_unit",
    cache_dir: pathlib.Path,
    memory_limit: str = "4GB",
    seed: int = 0,
    progress: bool = True,
) -> splits.Split:
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
    require_one_part_each(table, parts)
    labels = [table[outcome][part].astype(np.int32) for part in parts]
    require_both_classes(labels, outcome)
    raw = np.stack([table[name] for name in FEATURES], axis=1).astype(np.float64)
    inputs = splits.standardise(raw[public], *(raw[part] for part in parts))
    public, private, test = ({"x": x, "label": label} for x, label in zip(inputs, labels, strict=True))
    return splits.Split(public, private, test, _description(table, parts, outcome, split_by))


def cohort_table(
    directory: pathlib.Path, cache_dir: pathlib.Path, *, memory_limit: str = "4GB", progress: bool = True
) -> splits.Records:
    """The cohort with raw features and both outcomes, derived once and then read from `cache_dir`.

    The cached file is named by the tables (their paths, sizes and times) and by the definitions above, so that neither
    another directory nor another definition reads it; it appears only once it is complete.

    Returns:
      Columns of one entry a patient, in order of `subject_id`: subject_id, stay_id, unit, era ('' if unknown),
      mortality, long_stay and `FEATURES`. A missing feature is NaN; a count is never missing. **Not private.**

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: a file is damaged, lacks a column or gives nothing, a key is not unique, or no stay qualifies.
    """
    return mimic_build.read(mimic_build.derive(directory, cache_dir, _study(), memory_limit, progress))


def report(
    directory: pathlib.Path, cache_dir: pathlib.Path, *, memory_limit: str = "4GB", progress: bool = True
) -> dict[str, Any]:
    """What `cohort_table` read and what it dropped, for JSON; derives the table if need be. **Not private.**

    Returns:
      "database"; "tables", for each its file, its rows, and for each column its cells by state;
      "stays" and, for each of their tables, "events", numbers by fate; the cohort's number of "patients".
    """
    path = mimic_build.derive(directory, cache_dir, _study(), memory_limit, progress)
    query = f"SELECT decode(value) FROM parquet_kv_metadata({file(path)}) WHERE decode(key) = 'report'"
    with duckdb.connect() as connection:
        (found,) = connection.execute(query).fetchone()
    return json.loads(found)


def _study():
    items = tuple(
        (item, variable.name, variable.low, variable.high)
        for variable in VARIABLES
        for item in (*variable.carevue, *variable.metavision, *variable.labs)
    )
    definition = (mimic_sql.FEATURE_TABLE, STATISTICS, VARIABLES)
    return mimic_build.Study("", items, CONVERSIONS, lambda: _feature_query(), definition)


def _feature_query():
    pivot = [f"any_value(summary) FILTER (variable = '{v.name}') AS {v.name}" for v in VARIABLES]
    absent = dict.fromkeys(STATISTICS, "'nan'::FLOAT") | {"count": "0"}
    columns = ["age::FLOAT AS age", "coalesce(female, 'nan'::FLOAT)::FLOAT AS female"] + [
        f"coalesce({v.name}.{name}, {absent[name]})::FLOAT AS {v.name}_{name}" for v in VARIABLES for name in STATISTICS
    ]
    return mimic_sql.FEATURE_TABLE.format(pivot=", ".join(pivot), columns=", ".join(columns))


def _populations(table, split_by):
    """Indices of the public and of the private patients."""
    if split_by == "care_unit":
        return tuple(np.flatnonzero(np.isin(table["unit"], units)) for units in (SURGICAL_UNITS, MEDICAL_UNITS))
    eras = np.array([str(era) for era in table["era"]])
    first = min(set(eras) - {""}, default="")
    return np.flatnonzero((eras == first) & (eras != "")), np.flatnonzero((eras != first) & (eras != ""))


def require_one_part_each(table: splits.Records, parts: list[np.ndarray]) -> None:
    """Refuses parts, given by the rows of a cohort table, that share a patient, whatever the table holds."""
    subjects = table["subject_id"][np.concatenate(parts)]
    if len(np.unique(subjects)) < len(subjects):
        raise ValueError(f"Expected each patient once in one part, found subject_id repeated in {len(subjects)} rows.")


def require_both_classes(labels: list[np.ndarray], outcome: str) -> None:
    """Refuses public, private and test labels of which one has a single class."""
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
