"""The page that is read first: ours against each kind of baseline, setting by setting, and what each of them costs.

A baseline is of the kind of what it had to go by: rehearsals on public records and published recipes, as any user has
them, or the test set, which nobody has (`comparison.KINDS`). In each setting the best of a kind is shown, picked with
hindsight.
"""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from experiments.benchmark.comparison import (
    GROUP,
    KINDS,
    NON_PRIVATE,
    ONE_DRAW,
    OURS,
    REFERENCE_EPSILON,
    SETTING,
    VERDICTS,
    ZERO_SHOT,
    compare,
    methods_of,
)
from experiments.benchmark.markdown import NOTHING, number, table

EPSILONS = (0.5, 1.0, 2.0, 8.0)
REHEARSED_ALONE = "rehearsed_dp_sgd_all"
_HEADS = {
    "rehearsed": "rehearsed on public records",
    "recipe": "published recipe",
    "public curvature": "with public records, tuned on test",
    "tuned on test": "tuned on test",
}
_HOW_TO_READ = """\
Test metric ± 2 standard errors over seeds, test loss in brackets. **Bold**: ours is ahead of the best of the rehearsed
and the recipes, by more than 2 standard errors of the paired difference; *italic*: behind. –: not run. Every baseline
is the best of its kind in that setting, picked with hindsight; nothing of ours was picked."""
_KINDS = """\
- **Rehearsed**: settings chosen by the loss of held-out public records, as a user can: four miniatures of the task,
  half of them with a population of their own held out; no privacy is spent.
- **Recipe**: published settings (arXiv:2204.13650, arXiv:2206.07136), nothing is chosen.
- **With public records**: DP-SGD in public coordinates or with public gradients, tuned on the test set.
- **Tuned on test**: up to nine baselines, settings by the test metric of two other seeds, which nobody has.
- **One draw**: the mechanism of arXiv:2605.20521 alone, at this library's defaults for the rest."""
_COST_NOTES = f"""\
At epsilon {REFERENCE_EPSILON:g}, medians over seeds. Passes: over the private records. Seconds: of a run without
compilation, and of the search for its settings before it, which ours does not need; of runs beside other work on two
cores, so that in seconds `make benchmarks` is to be trusted. A search starts where that at the epsilon before ended: a
first one is longer."""


def page(df: pd.DataFrame) -> str:
    """The whole page; `df` is what `comparison.read` gives."""
    df = df[df["epsilon"].isin([*EPSILONS, math.inf])]
    compared = {kind: _indexed(compare(df, methods_of(df, kind))) for kind in KINDS}
    best = _indexed(compare(df, [*methods_of(df, "rehearsed"), *methods_of(df, "recipe")]))
    # A recipe alone is no comparison.
    best = best[compared["rehearsed"]["verdict"].isin(VERDICTS)]
    lines = ["# Ours against private fine-tuning", "", *_counts(df, compared, best), "", _KINDS, ""]
    lines += ["![metric against epsilon](epsilon.png)", "", "## Setting by setting", "", _HOW_TO_READ, ""]
    for (task, model), group in df.groupby(GROUP, sort=True):
        lines += [f"### {task}, {model} ({group['metric_name'].iloc[0]})", ""]
        lines += [*table(_setting_rows(group, compared, best)), ""]
    lines += ["## Costs", "", _COST_NOTES, "", *table(_cost_rows(df, compared))]
    return "\n".join([*lines, ""])


def _indexed(compared: pd.DataFrame) -> pd.DataFrame:
    """By setting."""
    return compared.set_index(SETTING)


def _counts(df: pd.DataFrame, compared: dict[str, pd.DataFrame], best: pd.DataFrame) -> list[str]:
    """A line for each kind: in how many settings ours is ahead, level and behind."""
    against = {
        "best rehearsed or recipe": best,
        "best rehearsed": compared["rehearsed"],
        "rehearsed DP-SGD": _indexed(compare(df, [REHEARSED_ALONE])),
        "best recipe": compared["recipe"],
        "best with public records, tuned on test": compared["public curvature"],
        "best tuned on test": compared["tuned on test"],
        "one draw, the paper's mechanism": _indexed(compare(df, [ONE_DRAW])),
    }
    return table(_count_row(name, rows[rows["verdict"].isin(VERDICTS)]) for name, rows in against.items())


def _count_row(name: str, rows: pd.DataFrame) -> dict[str, str]:
    counts = rows["verdict"].value_counts()
    losses = rows["loss_verdict"].value_counts()
    return {
        "ours against": name,
        "settings": str(len(rows)),
        "ahead": str(counts.get("ahead", 0)),
        "level": str(counts.get("within 2 SE", 0) + counts.get("undecided", 0)),
        "behind": str(counts.get("behind", 0)),
        "mean difference": number(rows["difference"].mean(), signed=True),
        "loss lower": str(losses.get("lower", 0)),
        "loss higher": str(losses.get("higher", 0)),
    }


def _setting_rows(group: pd.DataFrame, compared: dict[str, pd.DataFrame], best: pd.DataFrame) -> Iterator[dict]:
    """A line for each n and epsilon of a model on a task."""
    task, model = group[GROUP].iloc[0]
    for n in sorted(group["n"].unique()):
        of_n = group[group["n"] == n]
        for epsilon in EPSILONS:
            where = (task, model, n, epsilon)
            ours = _mean(of_n, OURS, epsilon)
            verdict = best["verdict"].get(where, "")
            mark = {"ahead": "**", "behind": "*"}.get(verdict, "")
            yield {
                "n": f"{n:,}",
                "epsilon": f"{epsilon:g}",
                "pretrained": _mean(of_n, ZERO_SHOT, math.inf, with_error=False),
                "ours": f"{mark}{ours}{mark}",
                **{_HEADS[kind]: _mean(of_n, compared[kind]["baseline"].get(where, ""), epsilon) for kind in KINDS},
                "one draw": _mean(of_n, ONE_DRAW, epsilon),
                "non-private": _mean(of_n, NON_PRIVATE, math.inf, with_error=False),
            }


def _mean(group: pd.DataFrame, method: str, epsilon: float, with_error: bool = True) -> str:
    """A method's mean metric, its error and its mean loss, as in the table."""
    runs = group[(group["method"] == method) & (group["epsilon"] == epsilon)]
    if runs.empty:
        return NOTHING
    error = f" ± {_short(2 * runs['metric'].sem())}" if with_error and len(runs) > 1 else ""
    return f"{_short(runs['metric'].mean())}{error} ({runs['loss'].mean():.3f})"


def _short(value: float) -> str:
    """Four decimals without the zero before them."""
    return f"{value:.4f}".replace("0.", ".", 1)


def _cost_rows(df: pd.DataFrame, compared: dict[str, pd.DataFrame]) -> Iterator[dict[str, str]]:
    """A line for each model on a task and n: ours, and the best of each kind."""
    at_reference = df[df["epsilon"] == REFERENCE_EPSILON]
    for (task, model, n), group in at_reference.groupby([*GROUP, "n"]):
        where = (task, model, n, REFERENCE_EPSILON)
        costs = {"ours": _cost(group, OURS)}
        costs |= {kind: _cost(group, compared[kind]["baseline"].get(where, "")) for kind in KINDS}
        yield {"task, model": f"{task}, {model}", "n": f"{n:,}"} | costs


def _cost(group: pd.DataFrame, method: str) -> str:
    """Passes, seconds, and seconds of the search."""
    runs: Any = group[group["method"] == method]
    if runs.empty:
        return NOTHING
    passes = (runs["private_gradients"] / runs["n"]).median()
    search = runs["search_seconds"].max()
    searching = f" + {search:,.0f} s" if search > 0 else ""
    return f"{passes:.3g} passes, {runs['seconds'].median():.2g} s{searching}"
