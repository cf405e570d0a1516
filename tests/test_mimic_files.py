"""MIMIC's tables as hospitals, databases, spreadsheets and people hand them over."""

import csv
import gzip
import io
import json
import re

import numpy as np
import pytest

pytest.importorskip("duckdb", reason="duckdb is not installed; it comes with the extra 'experiments'")

from test_mimic import MIMIC_IV, hours, needs_iv, patient, population, table_of, write

from experiments.data import clinical, mimic, mimic_files, mimic_report, mimic_tables

TABLES = ("icustays", "patients", "admissions", "chartevents", "labevents")
COLUMNS = [(name, column) for name in TABLES for column in mimic_files.MIMIC_III.tables[name][1].split()]
IV_COLUMNS = [
    (name, column) for name in TABLES for column in mimic_files.MIMIC_IV.tables[name][1].split()
]  # fmt: skip
TYPED = [(name, column) for name, column in COLUMNS if mimic_tables.COLUMN_KINDS[column] != "text"]
TYPED_IV = [(name, column) for name, column in IV_COLUMNS if mimic_tables.COLUMN_KINDS[column] != "text"]
NOT_PARSED = ["NULL", r"\N", "> 5", "___", "", "NaN", "inf"]


def database(folder, size=12):
    """A plain MIMIC-III in which half the patients die in hospital, so that no column but DOD is empty."""
    patients, chart, labs = population(size)
    for row in patients[::2]:
        row |= {"deathtime": hours(190), "hospital_expire_flag": 1, "dod": hours(190)}
    chart = [row | {"error": 0} for row in chart]
    return write(folder, patients, chart, labs, suffix=".csv")


def database_iv(folder, size=12):
    """The same patients as a MIMIC-IV."""
    database(folder, size)
    for name in TABLES:
        table = rows(folder / f"{name}.csv")
        for row in table:
            row |= {"stay_id": row.pop("icustay_id", ""), "anchor_age": 50, "anchor_year": 2150}
            row |= {"anchor_year_group": f"{2008 + 3 * (int(row['subject_id']) % 2)} - 2019"}
        place, _ = mimic_files.MIMIC_IV.tables[name]
        (folder / place).mkdir(exist_ok=True)
        save(folder / place / f"{name}.csv", table)
        (folder / f"{name}.csv").unlink()
    return folder


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def save(path, table):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def change(path, column, cells):
    """Puts `cells(place, old)` into a column."""
    table = rows(path)
    for place, row in enumerate(table):
        row[column] = cells(place, row[column])
    save(path, table)


def path_of(folder, name):
    return next(folder.rglob(f"{name}.csv"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The cohort of the plain MIMIC-III."""
    folder = tmp_path_factory.mktemp("plain")
    return table_of(database(folder), folder / "cache")


@pytest.fixture(scope="module")
def expected_iv(tmp_path_factory):
    """The cohort of the plain MIMIC-IV."""
    folder = tmp_path_factory.mktemp("plain_iv")
    return table_of(database_iv(folder), folder / "cache")


def assert_only_the_first_patients_differ(found, expected):
    """A patient's own features depend on the cells that are missing; those of the others must not."""
    untouched = len(NOT_PARSED)
    kept = {name: values[found["subject_id"] >= untouched] for name, values in found.items()}
    np.testing.assert_equal(kept, {name: values[untouched:] for name, values in expected.items()})
    assert len(found["subject_id"]) == len(set(found["subject_id"]))


def with_odd_cells(path, column):
    change(path, column, lambda place, old: NOT_PARSED[place] if place < len(NOT_PARSED) else old)


@pytest.mark.parametrize(("name", "column"), TYPED)
def test_odd_cells_harm_nobody_else(tmp_path, expected, name, column):
    raw = database(tmp_path / "raw")
    with_odd_cells(path_of(raw, name), column)
    found = table_of(raw, tmp_path / "cache")
    assert_only_the_first_patients_differ(found, expected)
    if column in mimic_tables.MAY_BE_EMPTY:
        assert len(found["subject_id"]) == 12


@pytest.mark.parametrize(("name", "column"), TYPED_IV)
def test_odd_cells_of_mimic_iv_harm_nobody_else(tmp_path, expected_iv, name, column):
    raw = database_iv(tmp_path / "raw")
    with_odd_cells(path_of(raw, name), column)
    assert_only_the_first_patients_differ(table_of(raw, tmp_path / "cache"), expected_iv)


@pytest.mark.parametrize("cell", ["NULL", "> 5", "___"])
def test_a_lone_odd_death_is_none(tmp_path, cell):
    """Where nobody else died, the cell is all that the column holds."""
    raw = write(tmp_path / "raw", *population(), suffix=".csv")
    change(path_of(raw, "patients"), "dod", lambda place, old: cell if place == 0 else old)
    assert not table_of(raw, tmp_path / "cache")["mortality"].any()


@pytest.mark.parametrize("cell", ["", "NULL", r"\N", "NaN", "NA"])
def test_an_unknown_unit_or_era_has_no_name(tmp_path, cell):
    raw = database(tmp_path / "raw")
    for column in ("dbsource", "first_careunit"):
        change(path_of(raw, "icustays"), column, lambda place, old: cell if place == 0 else old)
    table = table_of(raw, tmp_path / "cache")
    assert (table["unit"][0], table["era"][0]) == ("", "")


def as_written(kind, cell):
    """A cell as pandas, R, a database or a spreadsheet may write it."""
    if kind == "id":
        return f"{cell}.0"
    if kind == "flag":
        return f"{cell}.0"
    if kind == "number":
        return f" {float(cell):e} "
    if kind == "time":
        return cell.replace(" ", "T") + "Z"
    return cell.lower() + " "


@pytest.mark.parametrize(("name", "column"), TYPED)
def test_other_ways_to_write_a_cell_are_read(tmp_path, expected, name, column):
    other = database(tmp_path / "other")
    kind = mimic_tables.COLUMN_KINDS[column]
    change(path_of(other, name), column, lambda place, old: as_written(kind, old) if old else old)
    np.testing.assert_equal(table_of(other, tmp_path / "cache"), expected)


@pytest.mark.parametrize("mark", ["1", "1.0", "True", "t", " 1 "])
def test_a_row_marked_as_an_error_is_left_out(tmp_path, mark):
    raw = database(tmp_path / "raw")
    change(path_of(raw, "chartevents"), "error", lambda place, old: mark if place == 0 else "0.0")
    assert table_of(raw, tmp_path / "cache")["heart_rate_count"].tolist() == [0] + [1] * 11


@pytest.mark.parametrize(
    ("column", "cell"),
    [("charttime", "2150-03-01 10:30 PM"), ("charttime", "2150-03-01 10:00:00+02"), ("subject_id", "0.4")]
    + [("valuenum", cell) for cell in ("7_0", "1,070", "70,0", "1e999", "0x46", "70 bpm")],
)  # fmt: skip
def test_what_a_cast_would_misread_is_missing(tmp_path, column, cell):
    raw = database(tmp_path / "raw")
    change(path_of(raw, "chartevents"), column, lambda place, old: cell if place == 0 else old)
    assert table_of(raw, tmp_path / "cache")["heart_rate_count"].tolist() == [0] + [1] * 11


KEYS = [("icustays", "icustay_id"), ("patients", "subject_id"), ("admissions", "hadm_id")]


@pytest.mark.parametrize("conflict", [False, True])
@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_key_of_two_rows_is_refused(tmp_path, name, key, conflict):
    raw = database(tmp_path / "raw")
    table = rows(path_of(raw, name))
    changed = {"icustays": "intime", "patients": "dob", "admissions": "dischtime"}[name]
    again = table[0] | ({changed: "2150-01-01"} if conflict else {})
    save(path_of(raw, name), [*table, again])
    with pytest.raises(ValueError, match=rf"{name}.csv: {key} is not unique in {name.upper()}; 1 of its"):
        table_of(raw, tmp_path / "cache")


@pytest.mark.parametrize("name", ["patients", "admissions"])
def test_a_stay_without_its_patient_tells_of_a_cut_table(tmp_path, name):
    raw = database(tmp_path / "raw")
    save(path_of(raw, name), rows(path_of(raw, name))[:-3])
    with pytest.raises(ValueError, match=rf"icustays.csv has 3 stays whose .* is not in .*{name}.csv.*incomplete"):
        table_of(raw, tmp_path / "cache")


def test_a_patient_is_in_one_part_whatever_the_table_holds(tmp_path, monkeypatch):
    raw = write(tmp_path / "raw", *population(24))
    table = table_of(raw, tmp_path / "cache")
    doubled = table | {"subject_id": np.concatenate([table["subject_id"][:-1], table["subject_id"][:1]])}
    monkeypatch.setattr(mimic, "cohort_table", lambda *arguments, **settings: doubled)
    with pytest.raises(ValueError, match="each patient once in one part"):
        mimic.load(raw, outcome="long_stay", cache_dir=tmp_path / "cache", progress=False)


def test_without_a_beginning_no_stay_is_the_first(tmp_path):
    later = [patient(1, icustay_id=3001, intime=None, outtime=hours(190))]
    raw = write(tmp_path / "raw", [patient(1), patient(2)], stays=later)
    assert table_of(raw, tmp_path / "cache")["subject_id"].tolist() == [2]


TIMES = [(name, column) for name, column in TYPED if mimic_tables.COLUMN_KINDS[column] == "time"]


@pytest.mark.parametrize(("name", "column"), TIMES)
def test_dates_of_another_form_are_refused(tmp_path, name, column):
    raw = database(tmp_path / "raw")
    change(path_of(raw, name), column, lambda place, old: re.sub(r"(\d+)-(\d+)-(\d+)", r"\2/\3/\1", old))
    with pytest.raises(ValueError, match=rf"{name}.csv: not one cell of the column '{column}' parses as a time"):
        table_of(raw, tmp_path / "cache")


@pytest.mark.parametrize(("name", "column"), [pair for pair in TYPED if pair[1] not in mimic_tables.MAY_BE_EMPTY])
@pytest.mark.parametrize("cell", ["", "odd"])
def test_a_column_that_gives_nothing_is_refused(tmp_path, name, column, cell):
    raw = database(tmp_path / "raw")
    change(path_of(raw, name), column, lambda place, old: cell)
    with pytest.raises(ValueError, match=rf"{name}.csv.*({column}|gives no value for the cohort)"):
        table_of(raw, tmp_path / "cache")


@pytest.mark.parametrize("name", TABLES)
def test_a_header_alone_is_refused(tmp_path, name):
    raw = database(tmp_path / "raw")
    path = path_of(raw, name)
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    with pytest.raises(ValueError, match=rf"{name}.csv has a header alone: {name.upper()} gives no value"):
        table_of(raw, tmp_path / "cache")


@pytest.mark.parametrize("column", ["subject_id", "itemid", "charttime", "valuenum"])
@pytest.mark.parametrize("name", ["chartevents", "labevents"])
def test_events_of_no_use_are_refused(tmp_path, name, column):
    """Of other patients, other items, another day, or implausible."""
    raw = database(tmp_path / "raw")
    useless = "2151-01-01 00:00:00" if column == "charttime" else "99999"
    change(path_of(raw, name), column, lambda place, old: useless)
    with pytest.raises(ValueError, match=f"{name.upper()} gives no value for the cohort; its rows are"):
        table_of(raw, tmp_path / "cache")


@pytest.mark.parametrize("size", mimic_tables.FULL_SHEETS)
def test_a_full_sheet_is_refused(tmp_path, size):
    raw = database(tmp_path / "raw")
    path = path_of(raw, "labevents")
    (line,) = path.read_text().splitlines()[1:2]
    path.write_text(path.read_text() + (line + "\n") * (size - 12))
    with pytest.raises(ValueError, match=f"labevents.csv has exactly {size:,} rows, as many as a spreadsheet holds"):
        table_of(raw, tmp_path / "cache")
    with path.open("a") as stream:
        stream.write(line + "\n")
    assert len(table_of(raw, tmp_path / "cache")["subject_id"]) == 12


def unnamed_index(content):
    lines = content.splitlines()
    return "\n".join(["," + lines[0], *(f"{place},{line}" for place, line in enumerate(lines[1:]))]) + "\n"


def trailing_commas(content):
    return "".join(f"{line},,\n" for line in content.splitlines())


def quoted(content):
    table = io.StringIO()
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows(csv.reader(io.StringIO(content)))
    return table.getvalue()


HARMLESS = {
    "unnamed index": lambda content: unnamed_index(content).encode(),
    "trailing commas": lambda content: trailing_commas(content).encode(),
    "byte order mark": lambda content: content.encode("utf-8-sig"),
    "CR LF": lambda content: content.replace("\n", "\r\n").encode(),
    "no last line break": lambda content: content.rstrip("\n").encode(),
    "blank lines": lambda content: content.encode() + b"\n\n",
    "quotes": lambda content: quoted(content).encode(),
}


@pytest.mark.parametrize("form", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_form_is_read(tmp_path, expected, form):
    other = database(tmp_path / "other")
    for path in other.glob("*.csv"):
        path.write_bytes(form(path.read_text()))
    np.testing.assert_equal(table_of(other, tmp_path / "cache"), expected)


def wrong_check_sum(content):
    whole = gzip.compress(content.encode())
    return whole[:-8] + bytes(4) + whole[-4:]


HARMFUL = {
    "semicolons": ("", lambda content: content.replace(",", ";").encode(), "Separated by semicolons"),
    "tabs": ("", lambda content: content.replace(",", "\t").encode(), "Separated by tabs"),
    "UTF-16": ("", lambda content: content.encode("utf-16"), "UTF-8"),
    "UTF-16 without mark": ("", lambda content: content.encode("utf-16-le"), "UTF-16"),
    "latin-1": ("", lambda content: content.encode() + b"\xe9,\n", "UTF-8|CSV Error on Line: 14"),
    "zeros at the end": ("", lambda content: content.encode() + bytes(99), "zero bytes"),
    "cut": ("", lambda content: content[: content.rindex(",")].encode(), "Expected Number of Columns"),
    "open quote": ("", lambda content: content.encode() + b'"1,2\n', "unterminated quote"),
    "column twice": ("", lambda content: re.sub("row_id|hadm_id", "subject_id", content).encode(), "twice|lacks"),
    "empty": ("", lambda content: b"", "is empty"),
    "plain as .gz": (".gz", lambda content: content.encode(), "Not a gzipped file"),
    "gz as plain": ("", lambda content: gzip.compress(content.encode()), "UTF-8"),
    "empty .gz": (".gz", lambda content: b"", "is empty"),
    "cut .gz": (".gz", lambda content: gzip.compress(content.encode())[:-9], "ended before the end"),
    "wrong check sum": (".gz", wrong_check_sum, "CRC check failed"),
    "more after .gz": (".gz", lambda content: gzip.compress(content.encode()) + b"more", "Not a gzipped file"),
}


@pytest.mark.parametrize("name", ["patients", "chartevents"])
@pytest.mark.parametrize(("suffix", "form", "message"), HARMFUL.values(), ids=HARMFUL)
def test_a_harmful_form_is_refused_by_name(tmp_path, suffix, form, message, name):
    raw = database(tmp_path / "raw")
    path = path_of(raw, name)
    content = path.read_text()
    path.unlink()
    path.with_name(path.name + suffix).write_bytes(form(content))
    with pytest.raises(ValueError, match=message) as caught:
        table_of(raw, tmp_path / "cache")
    assert f"{name}.csv{suffix}" in str(caught.value) and "2150-" not in str(caught.value)


@pytest.mark.parametrize("name", TABLES)
def test_two_files_for_one_table_are_refused(tmp_path, name):
    raw = database(tmp_path / "raw")
    path = path_of(raw, name)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=rf"{name}.csv and .*{name}.csv.gz are two files for one table: remove"):
        table_of(raw, tmp_path / "cache")


@pytest.mark.parametrize("name", TABLES)
def test_a_folder_named_as_a_file_is_looked_into(tmp_path, expected, name):
    other = database(tmp_path / "other")
    path = path_of(other, name)
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / f"._{name}.csv").write_bytes(b"\0\5\x16\7")
    with pytest.raises(FileNotFoundError, match=f"{name}.csv is a folder, without a {name}.csv"):
        table_of(other, tmp_path / "cache")
    (path / f"{name.upper()}.csv").write_bytes(content)
    np.testing.assert_equal(table_of(other, tmp_path / "cache"), expected)


def test_what_is_nearly_there_is_pointed_at(tmp_path):
    database(tmp_path / "mimic-iii-1.4")
    with pytest.raises(FileNotFoundError, match="There is one in .*mimic-iii-1.4: give that directory"):
        table_of(tmp_path, tmp_path / "cache")
    path = path_of(tmp_path, "labevents")
    path.rename(path.with_suffix(".csv.zip"))
    with pytest.raises(FileNotFoundError, match="Found .*labevents.csv.zip: unpack"):
        table_of(tmp_path / "mimic-iii-1.4", tmp_path / "cache")
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="labevents.csv is no file, or a link to nothing"):
        table_of(tmp_path / "mimic-iii-1.4", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="absent is not a directory"):
        table_of(tmp_path / "absent", tmp_path / "cache")


@pytest.mark.parametrize("method", ["open", "iterdir"])
def test_what_may_not_be_read_is_refused(tmp_path, monkeypatch, method):
    raw = database(tmp_path / "raw")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    if method == "open":
        monkeypatch.setattr(mimic_files, "open", refuse, raising=False)
    else:
        monkeypatch.setattr(type(raw), "iterdir", refuse)
    with pytest.raises(ValueError, match="raw.* may not be read .Permission denied.: ask"):
        table_of(raw, tmp_path / "cache")


def test_too_little_memory_is_said(tmp_path):
    with pytest.raises(ValueError, match="cannot be read with memory_limit='1MB': give more memory"):
        mimic.cohort_table(database(tmp_path / "raw"), tmp_path / "cache", memory_limit="1MB", progress=False)


@needs_iv
def test_a_damaged_meds_file_is_refused(tmp_path):
    for folder in ("hosp", "icu"):
        (tmp_path / folder).symlink_to(MIMIC_IV / folder)
    (tmp_path / "meds").mkdir()
    (tmp_path / "meds" / "0.parquet").write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(ValueError, match=r"meds/0.parquet is damaged or incomplete"):
        table_of(tmp_path, tmp_path / "cache")


def test_bounds_are_never_wider_than_the_published_ones():
    for name, (low, high) in clinical.OUTLIERS.items():
        bounds = clinical.BOUNDS[name]
        assert low <= bounds.low < bounds.high <= high, name
    for variable in mimic.VARIABLES:
        assert (variable.low, variable.high) == clinical.BOUNDS[variable.name][:2]


def test_the_report_tells_what_was_dropped_and_why(tmp_path, capsys):
    raw = database(tmp_path / "raw")
    change(path_of(raw, "chartevents"), "valuenum", lambda place, old: {0: "> 5", 1: "7350", 2: ""}.get(place, old))
    change(path_of(raw, "labevents"), "itemid", lambda place, old: "1" if place == 0 else old)
    change(path_of(raw, "icustays"), "outtime", lambda place, old: hours(20) if place == 11 else old)
    arguments = ["--data-dir", str(raw), "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    mimic_report.main(arguments)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "mimic_report.json").read_text())
    assert found["patients"] == 11 and found["stays"] == {"36 hours or less": 1, "used": 11}
    chart = {"implausible value": 1, "no value": 2, "patient not in the cohort": 1, "used": 8}
    assert found["events"]["chartevents"] == chart and found["events"]["labevents"]["not an item of ours"] == 1
    states = {"read": 10, "empty": 1, "unreadable": 1, "other date": 0}
    assert found["tables"]["chartevents"]["cells"]["valuenum"] == states
    assert found["tables"]["chartevents"]["rows"] == 12 and found["units"] == {"MICU": 5, "SICU": 6}
    assert found["missing"]["heart_rate"] == round(3 / 11, 4) and found["missing"]["ph"] == 1
    for line in ("mimic-iii: 11 of 12 stays in the cohort", "  valuenum: 1 empty, 1 unreadable", "  heart_rate: 27.3%"):
        assert line in printed
    mimic_report.main(arguments)  # from the cache
    assert json.loads((tmp_path / "out" / "mimic_report.json").read_text()) == found
