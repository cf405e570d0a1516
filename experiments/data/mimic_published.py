"""The protocol of the nearest published work (arXiv:2311.09200) on MIMIC-III, as tasks of their own.

    split = mimic_published.load(pathlib.Path("mimiciii/1.4"), outcome="mortality", cache_dir=pathlib.Path("cache"))

MIMIC-III 1.4 by MIMIC-Extract (arXiv:1907.08322): each patient's first ICU stay, of more than 36 hours and, as
MIMIC-Extract has it, at most 240; 21,877 stays as published. Inputs are hourly means of 104 variables over 24 hours,
a mean carried on until the next one. Death in, or more than three days of, intensive care. The patients are split
70/10/20 into private, public and test part: **the public part, of which everything public is learned, is the published
validation tenth**, there is no shift. Published are AUROCs, medians of ten runs, for logistic regression and a
recurrent network, epsilon from .001 to 10 at delta 1e-5: `make mimic-published DATA=dir`.

What differs: values outside the bounds of `clinical` are missing, where MIMIC-Extract moves some of them to the nearest
valid value; a missing hour before the first one has the public mean, without indicators.
"""

import pathlib
from typing import Literal

import numpy as np

from experiments.data import mimic, mimic_build, mimic_files, splits
from experiments.data.clinical import BOUNDS
from experiments.data.mimic_extract import BOUNDED, VARIABLES
from experiments.data.mimic_files import text
from experiments.data.mimic_sql import INPUT_HOURS

MOST_HOURS = 240
PRIVATE_SHARE, PUBLIC_SHARE = 0.7, 0.1
_NAMES = tuple(VARIABLES)
_UNBOUNDED = (-1e9, 1e9)

CONVERSIONS = {
    "if(value > 79, (value - 32) / 1.8, value)": VARIABLES["temperature"],
    "if(value > 1, value / 100, value)": (
        *VARIABLES["fraction inspired oxygen"],
        *VARIABLES["fraction inspired oxygen set"],
    ),
    "if(value <= 1, 100 * value, value)": VARIABLES["oxygen saturation"],
    "value * 0.45359237": (3581, 226531),  # pounds
    "value / 16 * 0.45359237": (3582,),  # ounces
    "value * 2.54": (1394, 226707),  # inches
}

# One row a patient, in two lists: the places of the hourly means in an array (hours, variables), and the means.
HOURLY_MEANS = f"""
WITH means AS (
    SELECT subject_id, variable, sum(total) / sum(number) AS mean,
        floor(epoch(time - intime) / 3600)::INTEGER AS hour
    FROM events JOIN cohort USING (subject_id) WHERE fate = 'used' GROUP BY subject_id, variable, hour
), placed AS (
    SELECT subject_id, hour * {len(_NAMES)} + list_position([{", ".join(map(text, _NAMES))}], variable) - 1 AS place,
        mean
    FROM means
), lists AS (
    SELECT subject_id, list(place ORDER BY place) AS places, list(mean::FLOAT ORDER BY place) AS means
    FROM placed GROUP BY subject_id
)
SELECT subject_id, stay_id, unit, era, mortality, long_stay, coalesce(places, []) AS places,
    coalesce(means, []) AS means
FROM cohort LEFT JOIN lists USING (subject_id) ORDER BY subject_id
"""


def load(
    directory: pathlib.Path,
    *,
    outcome: Literal["mortality", "long_stay"] = "mortality",
    cache_dir: pathlib.Path,
    memory_limit: str = "4GB",
    seed: int = 0,
    progress: bool = True,
) -> splits.Split:
    """The published task; the public part is the validation tenth.

    Args:
      directory: MIMIC-III 1.4 as PhysioNet distributes it.
      outcome: "mortality", death before the stay ends; or "long_stay", a stay over three days.
      cache_dir: keeps the derived table, and what duckdb spills while it is derived.
      memory_limit: of duckdb.
      seed: of the split.
      progress: print the stages and duckdb's progress bar.

    Returns:
      Parts `{"x": (n, 24, 104) float32, "label": (n,) int32}`, one record a patient, standardised by public statistics.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: as `mimic.load`; or the directory holds another MIMIC.
    """
    if outcome not in ("mortality", "long_stay"):
        raise ValueError(f"Expected outcome 'mortality' or 'long_stay', found {outcome=}.")
    layout, _ = mimic_files.locate(directory)
    if layout is not mimic_files.MIMIC_III:
        raise ValueError(f"{directory} holds {layout.name}: the published protocol is one of MIMIC-III 1.4.")
    table = mimic_build.read(mimic_build.derive(directory, cache_dir, _study(), memory_limit, progress))
    order = np.random.default_rng(seed).permutation(len(table["subject_id"]))
    private, public, test = np.split(order, _cuts(len(order)))
    parts = [public, private, test]
    mimic.require_one_part_each(table, parts)
    labels = [table[outcome][part].astype(np.int32) for part in parts]
    mimic.require_both_classes(labels, outcome)
    inputs = _standardise(*(_hourly_means(table, part) for part in parts))
    records = [{"x": x, "label": label} for x, label in zip(inputs, labels, strict=True)]
    sizes = " + ".join(str(len(part)) for part in parts)
    description = f"MIMIC-III {outcome} as in arXiv:2311.09200; public is the validation tenth ({sizes} patients)"
    return splits.Split(*records, description)


def _cuts(size):
    private = round(PRIVATE_SHARE * size)
    return [private, private + round(PUBLIC_SHARE * size)]


def _study():
    items = tuple(
        (item, name, *(BOUNDS[BOUNDED[name]][:2] if name in BOUNDED else _UNBOUNDED))
        for name, items in VARIABLES.items()
        for item in items
    )
    return mimic_build.Study("-published", items, CONVERSIONS, lambda: HOURLY_MEANS, (HOURLY_MEANS,), MOST_HOURS)


def _hourly_means(table, part):
    """(n, hours, variables), NaN where nothing was measured."""
    values = np.full((len(part), INPUT_HOURS * len(_NAMES)), np.nan, np.float32)
    for row, patient in zip(values, part, strict=True):
        row[np.asarray(table["places"][patient], int)] = table["means"][patient]
    return values.reshape(len(part), INPUT_HOURS, len(_NAMES))


def _standardise(public, *others):
    """Parts in units of the public spread, clipped to [-5, 5]; a gap has the value before it, or 0."""
    seen = ~np.isnan(public)
    count = np.maximum(seen.sum((0, 1)), 1)
    mean = np.where(seen, public, 0).sum((0, 1), dtype=np.float64) / count
    spread = np.sqrt(np.where(seen, (public - mean) ** 2, 0).sum((0, 1)) / count)
    scale = np.where(spread > 1e-6 * (1 + abs(mean)), spread, np.inf)
    return [_carried_on(np.clip((part - mean) / scale, -splits.CLIP, splits.CLIP)) for part in (public, *others)]


def _carried_on(values):
    """Each variable's last value before a gap; 0, the public mean, before the first."""
    filled = np.nan_to_num(values[:, :1])
    hours = [filled[:, 0]]
    for hour in range(1, values.shape[1]):
        hours.append(np.where(np.isnan(values[:, hour]), hours[-1], values[:, hour]))
    return np.stack(hours, axis=1).astype(np.float32)
