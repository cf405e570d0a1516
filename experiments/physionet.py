"""PhysioNet/CinC Challenge 2012: 12,000 adult ICU stays of MIMIC-II, their first 48 hours, and in-hospital death.

Features of a stay: last, mean, minimum, maximum and count of each of 37 series, and age, sex, height and weight on
admission. Nothing that follows the 48 hours is used (Length_of_stay and Survival leak the outcome), nor are the scores
SAPS-I and SOFA, nor the ICU type, which the split by ICU makes constant. Challenge paper: Silva et al., Computing in
Cardiology 2012.
"""

import hashlib
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np

from experiments.data import Records, Split, atomic, find, standardise

SERIES = (
    "Albumin ALP ALT AST Bilirubin BUN Cholesterol Creatinine DiasABP FiO2 GCS Glucose HCO3 HCT HR K Lactate "
    "Mg MAP MechVent Na NIDiasABP NIMAP NISysABP PaCO2 PaO2 pH Platelets RespRate SaO2 SysABP Temp TroponinI "
    "TroponinT Urine WBC Weight"
).split()
STATIC = ("Age", "Gender", "Height", "Weight")
SURGICAL, MEDICAL = (2, 4), (1, 3)
_HOW_TO_GET = (
    "Get set-a, set-b and set-c (.tar.gz, or unpacked folders) and Outcomes-a.txt, Outcomes-b.txt, Outcomes-c.txt from "
    "physionet.org/content/challenge-2012/1.0.0 (open access) and put them into this folder or its subfolder "
    "physionet2012/."
)
_HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"


def by_icu(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """Surgical stays are public, medical stays private (sets a and b) and test (set c)."""
    sets = _tables(data_dir, cache_dir)
    surgical, medical = ([_of_icu(table, types) for table in sets] for types in (SURGICAL, MEDICAL))
    return _split(
        _concat(surgical),
        _concat(medical[:2]),
        medical[2],
        "PhysioNet 2012 (MIMIC-II): surgical ICU stays are public, medical ICU stays private; in-hospital death",
    )


def no_shift(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """The control: set a is public, set b private, set c the test, all from one population."""
    return _split(
        *_tables(data_dir, cache_dir),
        "PhysioNet 2012 (MIMIC-II): set a is public, set b private, set c test, without shift; in-hospital death",
    )


def _split(public, private, test, description):
    for name, part in (("public", public), ("private", private), ("test", test)):
        counts = np.bincount(part["label"], minlength=2)
        if not counts.all():
            raise ValueError(f"PhysioNet 2012, {name} part: expected both outcomes, found counts {counts.tolist()}.")
    features = standardise(public["x"], public["x"], private["x"], test["x"])
    parts = [
        {"x": x, "label": part["label"]} for x, part in zip(features, (public, private, test), strict=True)
    ]  # fmt: skip
    return Split(*parts, description)


def _of_icu(table, types):
    keep = np.isin(table["icu"], types)
    return {name: values[keep] for name, values in table.items()}


def _concat(tables):
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _tables(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> list[Records]:
    """Raw features (NaN where missing), labels and ICU types of sets a, b, c; cached."""
    sources = [
        (_stays_path(data_dir, s), find(data_dir, "physionet2012", f"Outcomes-{s}.txt", _HOW_TO_GET)) for s in "abc"
    ]
    signature = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for pair in sources for path in pair
    ]
    digest = hashlib.sha256(repr((signature, SERIES, STATIC)).encode()).hexdigest()[:16]
    cache = cache_dir / f"physionet2012-{digest}.npz"
    if not cache.is_file():
        print(f"reading PhysioNet 2012 from {data_dir} (once; then cached in {cache_dir}) ...", flush=True)
        tables = [_read_set(*pair) for pair in sources]
        with atomic(cache) as temporary:
            np.savez_compressed(temporary, **{f"{i}_{k}": v for i, t in enumerate(tables) for k, v in t.items()})
    with np.load(cache) as saved:
        return [{k: saved[f"{i}_{k}"] for k in ("x", "label", "icu")} for i in range(3)]


def _stays_path(data_dir, letter):
    try:
        return find(data_dir, "physionet2012", f"set-{letter}", _HOW_TO_GET)
    except FileNotFoundError:
        return find(data_dir, "physionet2012", f"set-{letter}.tar.gz", _HOW_TO_GET)


def _read_set(stays: pathlib.Path, outcomes: pathlib.Path) -> Records:
    """One set, in the order of its outcome file."""
    died = _read_outcomes(outcomes)
    rows = {}
    for name, text in _texts(stays):
        stay, icu, features = _stay(name, text)
        rows[stay] = (icu, features)
    missing = sorted(died.keys() ^ rows.keys())
    if missing:
        raise ValueError(
            f"{stays}: {len(rows)} stays for {len(died)} outcomes in {outcomes}; not in both: {missing[:3]} ..."
        )
    return {
        "x": np.stack([rows[stay][1] for stay in died]).astype(np.float32),
        "label": np.array(list(died.values()), np.int32),
        "icu": np.array([rows[stay][0] for stay in died], np.int32),
    }


def _read_outcomes(path: pathlib.Path) -> dict[int, int]:
    header, *lines = path.read_text().splitlines() or [""]
    if header != _HEADER:
        raise ValueError(f"{path}: expected the header {_HEADER!r}, found {header!r}.")
    fields = [line.split(",") for line in lines if line]
    bad = [row for row in fields if len(row) != 6 or row[5] not in ("0", "1")]
    if bad:
        raise ValueError(f"{path}: expected 6 fields with an In-hospital_death of 0 or 1, found {','.join(bad[0])!r}.")
    return {int(row[0]): int(row[5]) for row in fields}


def _texts(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Name and content of each stay's file, from the folder or the archive."""
    if path.is_dir():
        yield from ((str(file), file.read_text()) for file in sorted(path.glob("*.txt")))
        return
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name.endswith(".txt"):
                    yield member.name, archive.extractfile(member).read().decode()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a gzipped tar ({error}); get the file again.") from None


def _stay(name: str, text: str) -> tuple[int, int, np.ndarray]:
    """Stay id, ICU type and raw features of one file."""
    header, *lines = text.splitlines() or [""]
    if header != "Time,Parameter,Value":
        raise ValueError(f"{name}: expected the header 'Time,Parameter,Value', found {header!r}.")
    static: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for line in lines:
        time, parameter, value = line.split(",")
        number = float(value)
        if time == "00:00":
            static.setdefault(parameter, number)
        if number != -1:  # the publisher's code for missing
            series.setdefault(parameter, []).append(number)
    if not {"RecordID", "ICUType"} <= static.keys():
        raise ValueError(f"{name}: expected RecordID and ICUType at 00:00, found {sorted(static)}.")
    entry = [static.get(parameter, -1.0) for parameter in STATIC]
    features = [number if number != -1 else np.nan for number in entry]
    for parameter in SERIES:
        values = series.get(parameter)
        summary = [np.nan] * 4 if not values else [values[-1], sum(values) / len(values), min(values), max(values)]
        features += [*summary, float(len(values or []))]
    return int(static["RecordID"]), int(static["ICUType"]), np.array(features)
