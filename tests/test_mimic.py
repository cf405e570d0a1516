import collections
import csv
import datetime
import gzip
import os
import pathlib
import re

import numpy as np
import pytest

pytest.importorskip("duckdb", reason="duckdb is not installed; it comes with the extra 'experiments'")

from experiments.data import mimic, splits

QEXP_DATA = pathlib.Path(os.environ.get("QEXP_DATA", "absent"))
MIMIC_III, MIMIC_IV = QEXP_DATA / "mimic-iii-demo", QEXP_DATA / "mimic-iv-demo"
needs_iii = pytest.mark.skipif(not MIMIC_III.is_dir(), reason="the MIMIC-III demo is not present; set QEXP_DATA")
needs_iv = pytest.mark.skipif(not MIMIC_IV.is_dir(), reason="the MIMIC-IV demo is not present; set QEXP_DATA")

ADMITTED = datetime.datetime(2150, 3, 1, 9, 0)
HEADERS = {
    "ICUSTAYS": "row_id,subject_id,hadm_id,icustay_id,dbsource,first_careunit,last_careunit,intime,outtime,los",
    "PATIENTS": "row_id,subject_id,gender,dob,dod,expire_flag",
    "ADMISSIONS": "row_id,subject_id,hadm_id,admittime,dischtime,deathtime,hospital_expire_flag",
    "CHARTEVENTS": "row_id,subject_id,itemid,charttime,value,valuenum,valueuom,error",
    "LABEVENTS": "row_id,subject_id,itemid,charttime,value,valuenum,flag",
}


def hours(number):
    return ADMITTED + datetime.timedelta(hours=number)


def patient(subject_id, **changes):
    """A stay of four days from ADMITTED on, as one row for each of the three tables."""
    row = {"subject_id": subject_id, "hadm_id": 1000 + subject_id, "icustay_id": 2000 + subject_id} | {
        "dbsource": "carevue", "first_careunit": "MICU", "intime": hours(0), "outtime": hours(96),
        "gender": "F", "dob": "2100-01-01 00:00:00", "admittime": ADMITTED, "dischtime": hours(200),
        "hospital_expire_flag": 0,
    }  # fmt: skip
    return row | changes


def event(subject_id, itemid, hour, number, **more):
    return {"subject_id": subject_id, "itemid": itemid, "charttime": hours(hour), "valuenum": number} | more


def write(folder, patients, chart=(), labs=(), *, stays=(), upper=False, suffix=".csv.gz"):
    """A MIMIC-III directory, with the files' and columns' names in one case; of no events, one a patient."""
    folder.mkdir(exist_ok=True)
    chart = chart or [event(row["subject_id"], 211, 1, 80) for row in patients]
    labs = labs or [event(row["subject_id"], 50912, 1, 1) for row in patients]
    rows = {"ICUSTAYS": [*patients, *stays], "PATIENTS": patients, "ADMISSIONS": patients}
    for table, columns in HEADERS.items():
        lines = rows.get(table, chart if table == "CHARTEVENTS" else labs)
        name = table if upper else table.lower()
        with (gzip.open if suffix.endswith("gz") else open)(folder / (name + suffix), "wt", newline="") as stream:
            stream.write((columns.upper() if upper else columns) + "\n")
            csv.DictWriter(stream, columns.split(","), extrasaction="ignore", lineterminator="\n").writerows(lines)
    return folder


def population(size=12):
    """A database that can be split either way, with one heart rate and one creatinine a patient."""
    patients = [
        patient(
            i,
            first_careunit=("SICU", "MICU")[i % 2],
            dbsource=("carevue", "metavision")[i % 2],
            outtime=hours(96 if i % 4 < 2 else 48),
        )
        for i in range(size)
    ]
    chart = [event(i, 211, 1, 70 + i, value="Arm, Right Lower") for i in range(size)]
    return patients, chart, [event(i, 50912, 2, 1 + i / 10) for i in range(size)]


def table_of(folder, cache):
    return mimic.cohort_table(folder, cache, progress=False)


def read_csv(path):
    with gzip.open(path, "rt", newline="") as stream:
        return list(csv.DictReader(stream))


def when(text):
    return datetime.datetime.fromisoformat(text) if text else None


def death(admission):
    """When a patient died in hospital; a demo's `deathtime` is once a day after the discharge."""
    died = admission["hospital_expire_flag"] == "1"
    return min(when(admission["deathtime"]), when(admission["dischtime"])) if died else None


def independent_cohort(stays, age_of, deaths, stay_id):
    """{subject: (stay, died in the unit, stayed over three days)}, stay by stay in plain Python."""
    by_subject = collections.defaultdict(list)
    for stay in stays:
        by_subject[stay["subject_id"]].append(stay)
    cohort = {}
    for subject, own in by_subject.items():
        first = min(own, key=lambda stay: stay["intime"])
        length = when(first["outtime"]) - when(first["intime"])
        if length > datetime.timedelta(hours=36) and age_of(first) > 15:
            died = (deaths[first["hadm_id"]] or datetime.datetime.max) <= when(first["outtime"])
            cohort[int(subject)] = (int(first[stay_id]), died, length > datetime.timedelta(days=3))
    return cohort


def assert_cohort_is(table, expected):
    found = zip(table["stay_id"], table["mortality"] == 1, table["long_stay"] == 1, strict=True)
    assert dict(zip(table["subject_id"], found, strict=True)) == expected


@needs_iii
def test_the_mimic_iii_cohort_agrees_with_a_plain_computation(tmp_path):
    admissions = {row["hadm_id"]: row for row in read_csv(MIMIC_III / "ADMISSIONS.csv.gz")}
    births = {row["subject_id"]: when(row["dob"]) for row in read_csv(MIMIC_III / "PATIENTS.csv.gz")}

    def age(stay):
        return (when(admissions[stay["hadm_id"]]["admittime"]) - births[stay["subject_id"]]).days / 365.25

    deaths = {key: death(row) for key, row in admissions.items()}
    expected = independent_cohort(read_csv(MIMIC_III / "ICUSTAYS.csv.gz"), age, deaths, "icustay_id")
    assert len(expected) == 66
    assert_cohort_is(table_of(MIMIC_III, tmp_path), expected)


@needs_iv
def test_the_mimic_iv_cohort_agrees_with_a_plain_computation(tmp_path):
    admissions = {row["hadm_id"]: row for row in read_csv(MIMIC_IV / "hosp/admissions.csv.gz")}
    ages = {row["subject_id"]: int(row["anchor_age"]) for row in read_csv(MIMIC_IV / "hosp/patients.csv.gz")}
    deaths = {key: death(row) for key, row in admissions.items()}
    stays = read_csv(MIMIC_IV / "icu/icustays.csv.gz")
    expected = independent_cohort(stays, lambda stay: ages[stay["subject_id"]], deaths, "stay_id")
    assert len(expected) == 60
    assert_cohort_is(table_of(MIMIC_IV, tmp_path), expected)


@needs_iii
def test_a_demo_feature_agrees_with_a_plain_computation(tmp_path):
    table = table_of(MIMIC_III, tmp_path)
    start = {row["icustay_id"]: when(row["intime"]) for row in read_csv(MIMIC_III / "ICUSTAYS.csv.gz")}
    begin = {subject: start[str(stay)] for subject, stay in zip(table["subject_id"], table["stay_id"], strict=True)}
    values = {subject: collections.defaultdict(list) for subject in begin}
    with gzip.open(MIMIC_III / "CHARTEVENTS.csv.gz", "rt") as stream:
        wanted = (line for line in stream if line.startswith("row_id") or ",646," in line or ",220277," in line)
        for row in csv.DictReader(wanted):
            if int(row["subject_id"]) in begin and row["itemid"] in ("646", "220277") and row["valuenum"]:
                delay = (when(row["charttime"]) - begin[int(row["subject_id"])]).total_seconds() / 3600
                if 0 <= delay < 24 and 30 <= float(row["valuenum"]) <= 100 and row["error"] != "1":
                    values[int(row["subject_id"])][delay].append(float(row["valuenum"]))
    for index, subject in enumerate(table["subject_id"]):
        moments = [np.mean(entries) for _, entries in sorted(values[subject].items())]
        expected = [moments[-1], np.mean(moments), min(moments), max(moments)] if moments else [np.nan] * 4
        found = [table[f"spo2_{statistic}"][index] for statistic in mimic.STATISTICS]
        np.testing.assert_allclose(found, [*expected, len(moments)], rtol=1e-6)


def test_an_odd_cell_is_a_missing_one(tmp_path):
    patients, chart, labs = population()
    odd = [event(0, 211, 2, 99) | {name: "odd"} for name in ("subject_id", "itemid", "charttime", "valuenum")]
    table = table_of(write(tmp_path / "raw", patients, chart + odd, labs), tmp_path / "cache")
    assert table["heart_rate_count"].tolist() == [1] * 12


LABELS = {
    "heart_rate": "heart rate", "systolic_bp": "systolic", "diastolic_bp": "diastolic", "mean_bp": "mean",
    "respiratory_rate": "resp", "temperature": "temperature [cf]", "spo2": "spo2|o2 saturation",
    "fio2": "fio2|inspired o2 fraction|^oxygen$", "gcs_eye": "eye", "gcs_verbal": "verbal", "gcs_motor": "motor",
    "weight": "weight|admit wt", "urea_nitrogen": "urea nitrogen", "anion_gap": "anion gap", "inr": "inr",
    "white_cells": "white blood|wbc", "free_calcium": "free calcium", "calcium": "calcium, total",
    "platelets": "platelet count",
}  # fmt: skip


@needs_iii
def test_every_item_exists_and_is_what_its_variable_says():
    charted = {(int(row["itemid"]), row["dbsource"]): row["label"] for row in read_csv(MIMIC_III / "D_ITEMS.csv.gz")}
    tested = {int(row["itemid"]): row for row in read_csv(MIMIC_III / "D_LABITEMS.csv.gz")}
    for variable in mimic.VARIABLES:
        labels = [charted[item, "carevue"] for item in variable.carevue]
        labels += [charted[item, "metavision"] for item in variable.metavision]
        labels += [tested[item]["label"] for item in variable.labs]
        assert all(tested[item]["fluid"].lower() == "blood" for item in variable.labs)
        for label in labels:
            assert re.search(LABELS.get(variable.name, variable.name), label.lower()), label


def test_no_item_belongs_to_two_variables():
    items = [item for v in mimic.VARIABLES for item in (*v.carevue, *v.metavision, *v.labs)]
    assert len(set(items)) == len(items)


def test_features_are_those_computed_by_hand(tmp_path):
    chart = [
        event(1, 211, -0.1, 150),  # before the stay
        event(1, 211, 0, 80),
        event(1, 220045, 10, 110),
        event(1, 211, 12, 400),  # implausible
        event(1, 211, 13, "odd", value='said "no", twice'),
        event(1, 211, 14, 200, error=1),
        event(1, 211, 23.9, 95),
        event(1, 211, 24, 60),  # the gap begins
        event(1, 211, 29, 61),
        event(1, 678, 1, 98.6),
        event(1, 676, 2, 39),
        event(1, 678, 3, 37),  # Celsius under a Fahrenheit item
        event(1, 226512, 5, 70),
        event(1, 226531, 5, 80 / 0.45359237),
        event(1, 190, 4, 0.5),
        event(1, 190, 5, 40),
        event(9, 211, 4, 99),  # nobody of the cohort
    ]
    labs = [event(1, 50912, 3, 1.5), event(1, 50912, 2, 2.5), event(1, 50912, 25, 9)]
    table = table_of(write(tmp_path / "raw", [patient(1), patient(2)], chart, labs), tmp_path / "cache")
    expected = {
        "heart_rate": (95, 95, 80, 110, 3),
        "temperature": (39, 38, 37, 39, 2),
        "weight": (75, 75, 75, 75, 1),
        "fio2": (40, 45, 40, 50, 2),
        "creatinine": (1.5, 2, 1.5, 2.5, 2),
    }
    for variable in mimic.VARIABLES:
        found = np.stack([table[f"{variable.name}_{statistic}"] for statistic in mimic.STATISTICS])
        missing = [np.nan] * 4 + [0]
        np.testing.assert_allclose(found.T, [expected.get(variable.name, missing), missing], rtol=1e-6)
    np.testing.assert_allclose(table["age"], 50.16, atol=0.01)
    np.testing.assert_array_equal(table["female"], [1, 1])


CASES = [
    ({}, (0, 1)),
    ({"outtime": hours(36)}, None),
    ({"outtime": hours(36.1)}, (0, 0)),
    ({"outtime": hours(72)}, (0, 0)),
    ({"outtime": hours(72.1)}, (0, 1)),
    ({"outtime": None}, None),
    ({"dob": "2135-06-01 00:00:00"}, None),
    ({"dob": "2134-06-01 00:00:00"}, (0, 1)),
    ({"deathtime": hours(96), "hospital_expire_flag": 1}, (1, 1)),
    ({"deathtime": hours(97), "hospital_expire_flag": 1}, (0, 1)),
    ({"deathtime": hours(30), "hospital_expire_flag": 1}, None),
    ({"deathtime": hours(31), "hospital_expire_flag": 1}, (1, 1)),
    ({"dischtime": hours(90), "hospital_expire_flag": 1}, (1, 1)),
    ({"dod": "2150-03-05 00:00:00"}, (0, 1)),  # the day the stay ends, at 9 am: later that day, it may be
    ({"dod": "2150-03-04 00:00:00"}, (1, 1)),
    ({"dod": "2150-03-04 00:00:00", "deathtime": hours(100), "hospital_expire_flag": 1}, (0, 1)),
    ({"dod": "2150-03-01 00:00:00"}, None),
]


def test_who_belongs_to_the_cohort_and_what_became_of_them(tmp_path):
    raw = write(tmp_path / "raw", [patient(i, **changes) for i, (changes, _) in enumerate(CASES)])
    table = table_of(raw, tmp_path / "cache")
    outcomes = zip(table["mortality"], table["long_stay"], strict=True)
    found = dict(zip(table["subject_id"], outcomes, strict=True))
    for i, (changes, expected) in enumerate(CASES):
        assert found.get(i) == expected, changes


def test_only_a_first_stay_counts_even_where_a_later_one_would_qualify(tmp_path):
    later = [patient(i, icustay_id=3000 + i, intime=hours(100), outtime=hours(190)) for i in (1, 2)]
    raw = write(tmp_path / "raw", [patient(1, outtime=hours(20)), patient(2)], stays=later)
    table = table_of(raw, tmp_path / "cache")
    assert (table["subject_id"].tolist(), table["stay_id"].tolist()) == ([2], [2002])


def test_ages_over_89_are_90(tmp_path):
    raw = write(tmp_path / "raw", [patient(1, dob="1850-03-01 00:00:00")])
    assert table_of(raw, tmp_path / "cache")["age"] == 90


@pytest.mark.parametrize(("upper", "suffix"), [(True, ".csv.gz"), (False, ".csv"), (True, ".csv")])
def test_case_and_compression_make_no_difference(tmp_path, upper, suffix):
    lower = table_of(write(tmp_path / "lower [1]", *population()), tmp_path / "cache")
    other = write(tmp_path / "it's other", *population(), upper=upper, suffix=suffix)
    np.testing.assert_equal(table_of(other, tmp_path / "cache"), lower)


@pytest.mark.parametrize("split_by", ["care_unit", "era"])
def test_the_parts_are_one_population_each_and_standardised_by_the_public_one(tmp_path, split_by):
    raw, cache = write(tmp_path / "raw", *population(24)), tmp_path / "cache"
    arguments = {"outcome": "long_stay", "split_by": split_by, "cache_dir": cache, "progress": False}
    split = mimic.load(raw, seed=3, **arguments)
    assert [len(part["label"]) for part in split[:3]] == [12, 8, 4]
    table = table_of(raw, cache)
    raw_x = np.stack([table[name] for name in mimic.FEATURES], axis=1).astype(float)
    public, private = raw_x[::2], raw_x[1::2]
    expected_public, expected_private = splits.standardise(public, public, private)
    np.testing.assert_array_equal(split.public["x"], expected_public)
    joined = np.concatenate([split.private["x"], split.test["x"]])
    np.testing.assert_array_equal(np.unique(joined, axis=0), np.unique(expected_private, axis=0))
    assert len(np.unique(joined, axis=0)) == 12
    assert {part["x"].dtype.name + part["label"].dtype.name for part in split[:3]} == {"float32int32"}
    assert not np.array_equal(mimic.load(raw, seed=4, **arguments).test["x"], split.test["x"])


@needs_iii
@pytest.mark.parametrize(("split_by", "sizes"), [("care_unit", [25, 28, 13]), ("era", [37, 20, 9])])
def test_the_mimic_iii_demo_loads_end_to_end(tmp_path, split_by, sizes):
    split = mimic.load(MIMIC_III, outcome="long_stay", split_by=split_by, cache_dir=tmp_path, progress=False)
    assert [len(part["label"]) for part in split[:3]] == sizes
    assert all(np.isfinite(part["x"]).all() and abs(part["x"]).max() <= 5 for part in split[:3])


@needs_iv
@pytest.mark.parametrize(("split_by", "sizes"), [("care_unit", [36, 16, 7]), ("era", [27, 22, 11])])
def test_the_mimic_iv_demo_loads_end_to_end_from_its_meds_events(tmp_path, split_by, sizes):
    split = mimic.load(MIMIC_IV, outcome="long_stay", split_by=split_by, cache_dir=tmp_path, progress=False)
    assert [len(part["label"]) for part in split[:3]] == sizes
    assert table_of(MIMIC_IV, tmp_path)["heart_rate_count"].min() > 10


@needs_iv
def test_mimic_iv_with_raw_event_tables_equals_mimic_iv_with_meds_events(tmp_path):
    for folder in ("hosp", "icu"):
        (tmp_path / folder).symlink_to(MIMIC_IV / folder)
    with pytest.raises(FileNotFoundError, match=r"lacks the tables \['chartevents', 'labevents'\].*credentialed"):
        table_of(tmp_path, tmp_path / "cache")
    raw = tmp_path / "raw"
    for folder, name, condition in (("icu", "chartevents", "> 200000"), ("hosp", "labevents", "< 100000")):
        (raw / folder).mkdir(parents=True)
        for path in (MIMIC_IV / folder).glob("*.csv.gz"):
            (raw / folder / path.name).symlink_to(path)
        mimic.duckdb.sql(
            f"COPY (SELECT subject_id, split_part(code, '//', 2)::INT AS itemid, time AS charttime, value AS valuenum "
            f"FROM '{MIMIC_IV}/meds/*.parquet' WHERE code LIKE 'LAB//%' AND itemid {condition}) "
            f"TO '{raw / folder / name}.csv.gz'"
        )
    found, expected = table_of(raw, tmp_path / "cache"), table_of(MIMIC_IV, tmp_path / "cache")
    for name in expected:
        if expected[name].dtype == object:
            np.testing.assert_array_equal(found[name], expected[name])
        else:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_a_directory_that_is_no_mimic_is_told_what_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No ICUSTAYS.*mimiciii/1.4.*TABLE.csv\[.gz\].*icu/chartevents"):
        table_of(tmp_path, tmp_path / "cache")


def drop(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path):
    path.write_bytes(b"")


def plain(path):
    path.write_bytes(gzip.decompress(path.read_bytes()))


def headerless(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).partition(b"\n")[2]))


def rename_column(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"subject_id", b"subject")))


def extend_row(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"5,5,5,5,5,5,5,5,5,5,5,5,5,5\n"))


@pytest.mark.parametrize(
    ("damage", "table", "message"),
    [
        (drop, "labevents", r"lacks the tables \['labevents'\].*PhysioNet"),
        (truncate, "icustays", "icustays.csv.gz is damaged or incomplete"),
        (truncate, "chartevents", "chartevents.csv.gz is damaged or incomplete"),
        (truncate, "labevents", "labevents.csv.gz is damaged or incomplete"),
        (empty, "labevents", "labevents.csv.gz"),
        (plain, "chartevents", "chartevents.csv.gz is damaged or incomplete: Not a gzipped file"),
        (headerless, "patients", r"patients.csv.gz lacks \['subject_id', 'gender', 'dob', 'dod'\]"),
        (rename_column, "chartevents", r"chartevents.csv.gz lacks \['subject_id'\] among the 8 columns"),
        (extend_row, "labevents", "labevents.csv.gz is damaged or incomplete: .*Line: 14"),
    ],
)
def test_a_damaged_database_is_refused_by_name_and_leaves_no_cache(tmp_path, damage, table, message):
    raw, cache = write(tmp_path / "raw", *population()), tmp_path / "cache"
    damage(raw / f"{table}.csv.gz")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        table_of(raw, cache)
    assert not cache.exists() or not list(cache.iterdir())
    assert "2150-" not in str(caught.value), "an error quotes a patient's row"


def test_an_interruption_leaves_no_cache(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(mimic, "_feature_query", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table_of(write(tmp_path / "raw", *population()), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_an_empty_cohort_is_refused_before_the_events_are_read(tmp_path):
    raw = write(tmp_path / "raw", [patient(1, outtime=hours(20))])
    truncate(raw / "chartevents.csv.gz")
    with pytest.raises(ValueError, match="None of 1 ICU stays is a first stay over 36 h"):
        table_of(raw, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_part_of_one_class_is_refused_with_counts(tmp_path):
    raw = write(tmp_path / "raw", *population())
    with pytest.raises(ValueError, match=r"with mortality; found .*'public': \[6, 0\], 'private': \[4, 0\]"):
        mimic.load(raw, cache_dir=tmp_path / "cache", progress=False)
    raw = write(tmp_path / "raw", [patient(1)])
    with pytest.raises(ValueError, match=r"'public': \[0, 0\]"):
        mimic.load(raw, cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("wrong", [{"outcome": "death"}, {"split_by": "site"}])
def test_an_unknown_choice_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        mimic.load(tmp_path, cache_dir=tmp_path, **wrong)


def test_the_cache_spares_the_files_and_notices_their_change(tmp_path):
    patients, chart, labs = population()
    raw, cache = write(tmp_path / "raw", patients, chart, labs), tmp_path / "cache"
    first = table_of(raw, cache)
    path = raw / "chartevents.csv.gz"
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(content)))  # unreadable, but of the same size and time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    np.testing.assert_equal(table_of(raw, cache), first)
    assert len(list(cache.iterdir())) == 1
    write(raw, patients, [*chart, event(0, 211, 3, 90)], labs)
    assert table_of(raw, cache)["heart_rate_count"].tolist() == [2] + [1] * 11


def test_the_cache_is_not_shared_by_directories_or_definitions(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    one = write(tmp_path / "one", *population())
    assert len({table_of(folder, cache)["age"].size for folder in (one, write(tmp_path / "two", *population(8)))}) == 2
    narrow = (mimic.VARIABLES[0]._replace(high=75.5), *mimic.VARIABLES[1:])
    monkeypatch.setattr(mimic, "VARIABLES", narrow)
    assert table_of(one, cache)["heart_rate_count"].sum() == 6
    assert len(list(cache.iterdir())) == 3


def test_progress_names_stages_and_can_be_silent(tmp_path, capsys):
    raw = write(tmp_path / "raw", *population())
    mimic.cohort_table(raw, tmp_path / "cache")
    lines = capsys.readouterr().out.splitlines()
    assert "mimic-iii: 12 patients in the cohort" in lines and all(line.startswith("mimic-iii: ") for line in lines)
    table_of(raw, tmp_path / "other")
    assert not capsys.readouterr().out
