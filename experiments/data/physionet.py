"""PhysioNet/CinC Challenge 2012: 12,000 adult ICU stays of MIMIC-II, their first 48 hours, and in-hospital death.

Features of a stay: last, mean, minimum, maximum and count of each of 37 series, and age, sex, height and weight on
admission. Nothing that follows the 48 hours is used (Length_of_stay and Survival leak the outcome), nor are the scores
SAPS-I and SOFA, nor the ICU type, which the split by ICU makes constant. Challenge paper: Silva et al., Computing in
Cardiology 2012.

What counts of a stay's file:

- A value of -1 is missing, as the publisher has it, and so is what is not finite (`NaN`, `inf`, `1e999`) or lies
  outside `clinical.PHYSIONET_BOUNDS`. Of the public files' 5,252,452 values the bounds remove 7,208 (0.14 %), in 2,029
  stays: mostly pressures of 0, then weights, temperatures such as -17.8, heights in other units, pH 735.
- Rows after 48:00 are not used. "Last" is the last by time, and among rows of one time the last in the file.
- Blank lines, hidden files and what macOS adds to archives (`._1000.txt`, `__MACOSX/`) are ignored.
- Whatever else is not as published is refused, with its file and line: a set is whole or not read at all.
- A stay of unknown ICU (ICUType -1) belongs to neither population and is left out of both splits, with a notice.
"""

import collections
import hashlib
import math
import pathlib
import zipfile
import zlib

import numpy as np

from experiments.data.clinical import PHYSIONET_BOUNDS
from experiments.data.physionet_files import (
    AS_PUBLISHED,
    MISSING,
    SERIES,
    Row,
    icu_type,
    read_outcomes,
    read_rows,
    read_texts,
    record_id,
    stay_files,
    stay_once,
)
from experiments.data.splits import Records, Split, atomic, find, select, standardise

STATIC = ("Age", "Gender", "Height", "Weight")
SURGICAL, MEDICAL = (2, 4), (1, 3)
LAST_MINUTE = 48 * 60
_HOW_TO_GET = (
    "Get set-a, set-b and set-c (.tar.gz, or unpacked folders) and Outcomes-a.txt, Outcomes-b.txt, Outcomes-c.txt from "
    "physionet.org/content/challenge-2012/1.0.0 (open access) and put them into this folder or its subfolder "
    "physionet2012/."
)


def by_icu(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """Surgical stays are public, medical stays private (sets a and b) and test (set c)."""
    sets, notice = stays_of_known_icu(data_dir, cache_dir)
    surgical, medical = ([_of_icu(table, types) for table in sets] for types in (SURGICAL, MEDICAL))
    return _split(
        _concat(surgical),
        _concat(medical[:2]),
        medical[2],
        "PhysioNet 2012 (MIMIC-II): surgical ICU stays are public, medical ICU stays private; in-hospital death"
        + notice,
    )


def no_shift(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """The control: set a is public, set b private, set c the test, all from one population."""
    sets, notice = stays_of_known_icu(data_dir, cache_dir)
    return _split(
        *sets,
        "PhysioNet 2012 (MIMIC-II): set a is public, set b private, set c test, without shift; in-hospital death"
        + notice,
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


def stays_of_known_icu(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> tuple[list[Records], str]:
    """The stays of sets a, b and c, raw features with `"icu"`, and a notice of those that were left out."""
    return _of_known_icu(_tables(data_dir, cache_dir))


def _of_known_icu(tables: list[Records]) -> tuple[list[Records], str]:
    """The stays that belong to a population, and in words how many do not."""
    unknown = sum(int(np.sum(table["icu"] == MISSING)) for table in tables)
    if not unknown:
        return tables, ""
    stays = "1 stay" if unknown == 1 else f"{unknown} stays"
    notice = f"{stays} of unknown ICU (ICUType {MISSING}) left out, in no population"
    print(f"PhysioNet 2012: {notice}", flush=True)
    known = [select(table, np.flatnonzero(table["icu"] != MISSING)) for table in tables]
    return known, f"; {notice}"


def _of_icu(table, types):
    return select(table, np.flatnonzero(np.isin(table["icu"], types)))


def _concat(tables):
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _tables(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> list[Records]:
    """Raw features (NaN where missing), labels, ICU types and RecordIDs of sets a, b, c; cached."""
    sources = [(_stays_path(data_dir, s), _outcomes_path(data_dir, s)) for s in "abc"]
    signature = [_signature(path) for pair in sources for path in pair]
    definitions = (SERIES, STATIC, dict(PHYSIONET_BOUNDS))
    digest = hashlib.sha256(repr((signature, definitions)).encode()).hexdigest()[:16]
    cache = cache_dir / f"physionet2012-{digest}.npz"
    if not cache.is_file():
        print(f"reading PhysioNet 2012 from {data_dir} (once; then cached in {cache_dir}) ...", flush=True)
        tables = _read_sets(sources)
        with atomic(cache) as temporary:
            np.savez_compressed(temporary, **{f"{i}_{k}": v for i, t in enumerate(tables) for k, v in t.items()})
    return _load(cache)


def _stays_path(data_dir, letter):
    return find(data_dir, "physionet2012", (f"set-{letter}.tar.gz", f"set-{letter}"), _HOW_TO_GET)


def _outcomes_path(data_dir, letter):
    return find(data_dir, "physionet2012", f"Outcomes-{letter}.txt", _HOW_TO_GET)


def _signature(path: pathlib.Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the file, or of each file in the folder, whose own time no edited file changes."""
    path = path.resolve()
    files = stay_files(path) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _load(cache: pathlib.Path) -> list[Records]:
    try:
        with cache.open("rb") as file, np.load(file) as saved:
            return [{k: saved[f"{i}_{k}"] for k in ("x", "label", "icu", "stay")} for i in range(3)]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{cache}: a damaged cache ({error}); remove it, and it is made again.") from None


def _read_sets(sources) -> list[Records]:
    """The three sets, no stay in two of them."""
    dropped: collections.Counter = collections.Counter()
    tables = [_read_set(stays, outcomes, dropped) for stays, outcomes in sources]
    places: dict[int, pathlib.Path] = {}
    for (stays, _), table in zip(sources, tables, strict=True):
        for stay in table["stay"].tolist():
            if stay in places:
                raise ValueError(f"RecordID {stay} is in two sets, {places[stay]} and {stays}; remove one.")
            places[stay] = stays
    _report(dropped)
    return tables


def _report(dropped: collections.Counter) -> None:
    """Says how many values were left out and why."""
    reasons: dict[str, list[str]] = {}
    for (reason, parameter), count in sorted(dropped.items()):
        reasons.setdefault(reason, []).append(f"{parameter} {count}")
    for reason, counts in reasons.items():
        print(f"PhysioNet 2012: values left out, {reason}: {', '.join(counts)}", flush=True)


def _read_set(stays: pathlib.Path, outcomes: pathlib.Path, dropped: collections.Counter) -> Records:
    """One set, in the order of its outcome file."""
    died = read_outcomes(outcomes)
    names: dict[int, str] = {}
    found: dict[int, tuple[int, np.ndarray]] = {}
    for name, text in read_texts(stays):
        stay, icu, features = _stay(name, text, dropped)
        if stay in names:
            raise ValueError(f"RecordID {stay} is in two files, {names[stay]} and {name}; remove one.")
        names[stay] = name
        found[stay] = (icu, features)
    _require_both(stays, outcomes, died, found)
    return {
        "x": np.stack([found[stay][1] for stay in died]).astype(np.float32),
        "label": np.array(list(died.values()), np.int32),
        "icu": np.array([found[stay][0] for stay in died], np.int32),
        "stay": np.array(list(died), np.int64),
    }


def _require_both(stays, outcomes, died, found):
    """Every stay has an outcome and every outcome a stay."""
    without_stay = sorted(died.keys() - found.keys())
    without_outcome = sorted(found.keys() - died.keys())
    if not without_stay and not without_outcome:
        return
    raise ValueError(
        f"{stays}: {len(found)} stays for {len(died)} outcomes in {outcomes}; RecordIDs without a stay "
        f"{_first(without_stay)}, without an outcome {_first(without_outcome)}; {AS_PUBLISHED}."
    )


def _first(numbers):
    shown = ", ".join(map(str, numbers[:3]))
    return f"[{shown}, ...]" if len(numbers) > 3 else f"[{shown}]"


def _stay(name: str, text: str, dropped: collections.Counter | None = None) -> tuple[int, int, np.ndarray]:
    """Stay id, ICU type and raw features of one file; `dropped` counts what was left out by reason and parameter."""
    rows = read_rows(name, text)
    once = stay_once(name, rows)
    number = record_id(name, once["RecordID"])
    icu = icu_type(name, once["ICUType"])
    kept = _plausible(rows, collections.Counter() if dropped is None else dropped)
    entry = [_on_admission(kept, parameter) for parameter in STATIC]
    summaries = [number for parameter in SERIES for number in _summary(kept, parameter)]
    return number, icu, np.array(entry + summaries)


def _plausible(rows: list[Row], dropped: collections.Counter) -> dict[str, list[Row]]:
    """The rows that count by parameter, in order of time; rows of one time keep the file's order."""
    kept: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.minutes):
        if row.value == MISSING or row.parameter in ("RecordID", "ICUType"):
            continue
        reason = _why_not(row)
        if reason:
            dropped[reason, row.parameter] += 1
        else:
            kept.setdefault(row.parameter, []).append(row)
    return kept


def _why_not(row: Row) -> str | None:
    if row.minutes > LAST_MINUTE:
        return "after 48:00"
    if not math.isfinite(row.value):
        return "not finite"
    bounds = PHYSIONET_BOUNDS[row.parameter]
    return None if bounds.low <= row.value <= bounds.high else "outside plausible bounds"


def _on_admission(kept: dict[str, list[Row]], parameter: str) -> float:
    """The first value at 00:00."""
    return next((row.value for row in kept.get(parameter, []) if row.minutes == 0), np.nan)


def _summary(kept: dict[str, list[Row]], parameter: str) -> list[float]:
    """Last, mean, minimum, maximum and count of a series."""
    values = [row.value for row in kept.get(parameter, [])]
    if not values:
        return [np.nan, np.nan, np.nan, np.nan, 0.0]
    return [values[-1], sum(values) / len(values), min(values), max(values), float(len(values))]
