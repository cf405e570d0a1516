"""The rows of `arena.csv`, and ours against the best baseline of a kind in every setting."""

import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = [
    "table", "task", "pretraining", "model", "n", "epsilon", "delta", "method", "seed", "metric_name", "metric", "loss",
    "seconds", "compile_seconds", "private_gradients", "noisy_steps", "peak_bytes", "search_seconds",
]  # fmt: skip
GROUP = ["task", "model"]
SETTING = ["task", "model", "n", "epsilon"]
OURS = "qexp"
ONE_DRAW = "one_draw"
ZERO_SHOT = "zero_shot"
NON_PRIVATE = "non_private"
DESCENT = "dp_"  # how the names of DP-SGD and its relatives begin
TUNED = "tuned on test"
# What a baseline had to go by: kind -> how the names of its methods begin; all others were tuned on the test set.
PREFIXES = {"rehearsed": "rehearsed_", "recipe": "recipe_", "public curvature": "public_"}
KINDS = (*PREFIXES, TUNED)
_OPTIONAL = ["loss", "search_seconds"]  # not every run measured them
VERDICTS = ("ahead", "within 2 SE", "behind", "undecided")
LOSS_VERDICTS = ("lower", "higher")
SMALLEST_DROP = 0.003
REFERENCE_EPSILON = 1.0


def kind_of(method: str) -> str | None:
    """One of `KINDS`; None of a method that is no baseline."""
    if method in (OURS, ONE_DRAW, ZERO_SHOT, NON_PRIVATE):
        return None
    return next((kind for kind, prefix in PREFIXES.items() if method.startswith(prefix)), TUNED)


def read(path: pathlib.Path) -> pd.DataFrame:
    """The rows of `arena.csv`; of runs that did not measure it the loss is NaN.

    Raises:
      ValueError: the file is empty, lacks a column, holds a half-written row, or holds a run twice.
    """
    try:
        rows = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty.") from None
    if absent := [name for name in COLUMNS if name not in rows]:
        raise ValueError(f"{path}: lacks the columns {absent}, found {list(rows)}.")
    if rows.empty:
        raise ValueError(f"{path}: a header without rows.")
    rows = rows[COLUMNS]
    for fault, bad in {
        "an unfilled field (a half-written row?)": rows.drop(columns=_OPTIONAL).isna().any(axis=1),
        "a run that an earlier line has already": rows.duplicated([*SETTING, "method", "seed"]),
    }.items():
        if bad.any():
            # Lines are counted from 1, and the first is the header.
            raise ValueError(f"{path}: {fault} in line {bad.idxmax() + 2} ({bad.sum()} such lines).")
    if not np.isfinite(rows["epsilon"]).any():
        raise ValueError(f"{path}: no rows of a private method, found only {sorted(set(rows['method']))}.")
    return rows.astype({"n": int, "epsilon": float, "seed": int, "metric": float, "loss": float})


def compare(df: pd.DataFrame, baselines: Sequence[str] | None = None) -> pd.DataFrame:
    """One row for each setting: every n of a (task, model) at every epsilon of the file, run or not.

    NaN stands for what is missing and for the standard error of a single seed.

    Args:
      df: what `read` gives.
      baselines: methods among which the best is taken; by default those that were tuned on the test set.

    Returns:
      Beside the setting and `metric_name` these columns:

      * `ours`, `ours_se`: mean and standard error of our metric.
      * `baseline`, `best`, `best_se`: name, mean and standard error of the baseline with the highest mean.
      * `difference`, `difference_se`, `seeds`: mean of ours minus best over their common seeds, its standard error,
        and their number.
      * `zero_shot`, `non_private`: means.
      * `below_zero_shot`: whether ours is, by more than three standard errors and `SMALLEST_DROP`.
      * `verdict`: one of `VERDICTS`, or what is missing.
      * `absent`: the baselines run with this model elsewhere but not here.
      * `ours_loss`, `best_loss`, `zero_shot_loss`: mean test losses.
      * `loss_verdict`: ours against the baseline's, "lower", "higher", "within 2 SE" or nothing.
    """
    scores = {key: group.set_index("seed")[["metric", "loss"]] for key, group in df.groupby([*SETTING, "method"])}
    epsilons = sorted(value for value in df["epsilon"].unique() if math.isfinite(value))
    baselines = methods_of(df, TUNED) if baselines is None else baselines
    # Of these, the ones run with a model on any task.
    ran = df.groupby("model")["method"].unique()
    expected = {model: sorted(set(methods) & set(baselines)) for model, methods in ran.items()}
    sizes = df[[*GROUP, "n", "metric_name"]].drop_duplicates().sort_values([*GROUP, "n"])
    return pd.DataFrame(
        {"metric_name": size.metric_name}
        | _compared(scores, (size.task, size.model, size.n, epsilon), expected[size.model])
        for size in sizes.itertuples(index=False)
        for epsilon in epsilons
    )


def methods_of(df: pd.DataFrame, kind: str) -> list[str]:
    """The methods of one of `KINDS` that the file has."""
    return sorted(method for method in df["method"].unique() if kind_of(method) == kind)


def _compared(
    scores: dict[tuple, pd.DataFrame], setting: tuple[str, str, int, float], expected: list[str]
) -> dict[str, Any]:
    """One row of `compare`; `scores` are metric and loss by seed, `expected` the baselines run with this model."""
    *where, epsilon = setting

    def of(method: str, epsilon: float) -> pd.DataFrame:
        nothing = pd.DataFrame({"metric": [], "loss": []}, dtype=float)
        return scores.get((*where, epsilon, method), nothing)

    found = {name: runs for name in expected if len(runs := of(name, epsilon))}
    baseline = max(found, key=lambda name: found[name]["metric"].mean(), default="")
    ours = of(OURS, epsilon)
    best = of(baseline, epsilon)
    zero_shot = of(ZERO_SHOT, math.inf)
    non_private = of(NON_PRIVATE, math.inf)
    return {
        **dict(zip(SETTING, setting, strict=True)),
        "baseline": baseline,
        "non_private": non_private["metric"].mean(),
        "absent": ", ".join(sorted(set(expected) - set(found))),
        **_metrics(ours["metric"], best["metric"], zero_shot["metric"]),
        **_losses(ours["loss"], best["loss"], zero_shot["loss"]),
    }


def _metrics(ours: pd.Series, best: pd.Series, zero_shot: pd.Series) -> dict[str, Any]:
    """The columns that are about the metric, each series indexed by seed."""
    difference = (ours - best).dropna()
    drop = (zero_shot - ours).dropna()
    return {
        "ours": ours.mean(),
        "ours_se": ours.sem(),
        "best": best.mean(),
        "best_se": best.sem(),
        "difference": difference.mean(),
        "difference_se": difference.sem(),
        "seeds": len(difference),
        "zero_shot": zero_shot.mean(),
        # fmax: with a single seed the smallest drop alone decides.
        "below_zero_shot": bool(drop.mean() > np.fmax(3 * drop.sem(), SMALLEST_DROP)),
        "verdict": _lack(ours, best, difference) or _verdict(difference.mean(), difference.sem()),
    }


def _losses(ours: pd.Series, best: pd.Series, zero_shot: pd.Series) -> dict[str, Any]:
    """The columns that are about the loss, each series indexed by seed."""
    less = (best - ours).dropna()
    verdict = "" if less.empty else _verdict(less.mean(), less.sem())
    return {
        "ours_loss": ours.mean(),
        "best_loss": best.mean(),
        "zero_shot_loss": zero_shot.mean(),
        "loss_verdict": {"ahead": "lower", "behind": "higher"}.get(verdict, verdict),
    }


def _lack(ours: pd.Series, best: pd.Series, difference: pd.Series) -> str:
    """What keeps ours and the best baseline from being compared; nothing where they can be."""
    lacking = [text for text, part in (("no qexp", ours), ("no baselines", best)) if part.empty]
    return ", ".join(lacking) or ("no common seeds" if difference.empty else "")


def _verdict(difference: float, se: float) -> str:
    if math.isnan(se):
        return "undecided"
    if abs(difference) <= 2 * se:
        return "within 2 SE"
    return "ahead" if difference > 0 else "behind"


def nearest(epsilons: Iterable[float]) -> float:
    """The finite epsilon nearest to `REFERENCE_EPSILON` on the log scale; that itself where there is none."""
    finite = sorted(value for value in set(epsilons) if math.isfinite(value))
    return min(finite, key=lambda value: abs(math.log(value / REFERENCE_EPSILON)), default=REFERENCE_EPSILON)
