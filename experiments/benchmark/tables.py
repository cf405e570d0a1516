"""A page of every setting of a table: ours against the best baseline, costs, every method's mean, what is missing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from experiments.benchmark.comparison import (
    DESCENT,
    GROUP,
    LOSS_VERDICTS,
    OURS,
    SMALLEST_DROP,
    VERDICTS,
    nearest,
)
from experiments.benchmark.markdown import NOTHING, number, span, table, with_se

_COST_NOTES = [
    "Ours and the DP-SGD relative of highest mean. Seconds: wall time of a run without compilation, median over seeds;",
    "a baseline's search is not counted. Compilation: seconds, the most of any seed; zero after a search.",
    "Gradients: evaluations of a private record's gradient. Memory: the process's peak, data and runtime included.",
]


def page(name: str, df: pd.DataFrame, compared: pd.DataFrame) -> str:
    """The whole page.

    Args:
      name: of the table.
      df: what `comparison.read` gives.
      compared: what `comparison.compare` gives.
    """
    lines = [
        f"# {name.capitalize()}: ours against the best baseline",
        "",
        *_summary(df, compared),
        "",
        "## Ours against the best baseline",
        "",
    ]
    for (task, model), group in compared.groupby(GROUP):
        lines += [_title(task, model, group), "", *table(_comparison_row(row) for row in group.itertuples()), ""]
    lines += ["## Costs", "", *_COST_NOTES, ""]
    for (task, model), group in df.groupby(GROUP):
        lines += [f"### {task}, {model}", "", *table(_cost_rows(group)), ""]
    lines += ["## Mean of every method", "", "Bold: the best private method of the row. –: not run.", ""]
    for (task, model), group in df.groupby(GROUP):
        lines += [_title(task, model, group), "", *table(_mean_rows(group)), ""]
    return "\n".join([*lines, "## Missing", "", *_missing(compared), ""])


def _title(task: str, model: str, group: pd.DataFrame) -> str:
    return f"### {task}, {model} ({group['metric_name'].iloc[0]})"


def _summary(df: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """Verdicts counted by split of the settings, and how to read them."""
    metrics = df.groupby("metric_name")["task"].agg(lambda tasks: ", ".join(sorted(set(tasks))))
    measured = "; ".join(f"{name} ({tasks})" for name, tasks in metrics.items())
    deltas = ", ".join(f"{delta:g}" for delta in sorted(df["delta"].unique()))
    done = compared["verdict"].isin(VERDICTS)
    return [
        *table(_split_row(name, compared[chosen]) for name, chosen in _splits(compared).items()), "",
        f"- {done.sum()} of {len(compared)} settings compared, {(~done).sum()} missing; "
        f"{(compared['absent'] != '').sum()} still lack a baseline (see Missing, at the end).",
        "- **Each baseline's hyperparameters were chosen on the test set; ours were not.**",
        "- Best baseline: the baseline with the highest mean in that setting. Higher is better.",
        "- Ahead, behind: by more than 2 standard errors (SE) of the paired difference over common seeds, which share "
        "the private records. SEs cover subsample, order of the public records and noise, not test set or pretraining.",
        f"- Below zero-shot: ours is, by more than max(3 SE, {SMALLEST_DROP:g}).",
        "- Loss: mean cross-entropy on the test set, in nats; ours is lower or higher than the same baseline's by "
        "more than 2 SE. **The baseline's settings are those of its best metric; others may have a lower loss.**",
        f"- Metric: {measured}. δ = {deltas}. Common seeds in a setting: {span(compared.loc[done, 'seeds'])}.",
    ]  # fmt: skip


def _splits(compared: pd.DataFrame) -> dict[str, Any]:
    """Name -> which settings: all, by epsilon, and by task and model."""
    small = compared["epsilon"] <= 2
    everything = pd.Series(True, index=compared.index)
    splits = {"all": everything, "epsilon <= 2": small, "epsilon > 2": ~small}
    for (task, model), group in compared.groupby(GROUP):
        splits[f"{task}, {model}"] = compared.index.isin(group.index)
    return splits


def _split_row(name: str, part: pd.DataFrame) -> dict[str, str]:
    counts = part["verdict"].value_counts()
    return {
        "settings": name,
        "compared": str(part["verdict"].isin(VERDICTS).sum()),
        **{verdict: str(counts.get(verdict, 0)) for verdict in VERDICTS},
        "mean difference": number(part["difference"].mean(), signed=True),
        "below zero-shot": str(part["below_zero_shot"].sum()),
        **{f"loss {verdict}": str((part["loss_verdict"] == verdict).sum()) for verdict in LOSS_VERDICTS},
    }


def _comparison_row(row: Any) -> dict[str, str]:
    """A line of ours against the best baseline; `row` is one of `comparison.compare`."""
    flags = [row.verdict if row.verdict in ("ahead", "within 2 SE") else f"**{row.verdict}**"]
    if row.below_zero_shot:
        flags.append("**below zero-shot**")
    losses = (row.zero_shot_loss, row.ours_loss, row.best_loss)
    return {
        "n": str(row.n),
        "epsilon": f"{row.epsilon:g}",
        "zero-shot": number(row.zero_shot),
        "qexp": with_se(row.ours, row.ours_se),
        "best baseline": f"{row.baseline} {with_se(row.best, row.best_se)}".strip(),
        "difference": with_se(row.difference, row.difference_se, signed=True),
        "verdict": ", ".join(flags),
        "non-private": number(row.non_private),
        "loss: zero-shot / qexp / baseline": " / ".join(map(number, losses)),
        "ours is": row.loss_verdict or NOTHING,
    }


def _cost_rows(group: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Ours and the best relative of DP-SGD at each n, at one epsilon."""
    chosen = group[group["epsilon"] == nearest(group["epsilon"])]
    for (n, epsilon), part in chosen.groupby(["n", "epsilon"]):
        methods = part.groupby("method")
        descent = methods["metric"].mean().filter(regex=f"^{DESCENT}")
        median = methods.median(numeric_only=True)
        compilation = methods["compile_seconds"].max()
        best = [descent.idxmax()] if len(descent) else []
        for name in (OURS, *best):
            labels = {"n": str(n), "epsilon": f"{epsilon:g}", "method": name}
            yield labels | (_cost(median.loc[name], compilation[name]) if name in median.index else _UNKNOWN_COST)


_UNKNOWN_COST = dict.fromkeys(("seconds", "compilation", "gradients", "noisy steps", "memory, MiB"), NOTHING)


def _cost(median: pd.Series, compilation: float) -> dict[str, str]:
    return {
        "seconds": f"{median['seconds']:.3g}",
        "compilation": f"{compilation:.3g}",
        "gradients": f"{median['private_gradients']:,.0f}",
        "noisy steps": f"{median['noisy_steps']:.0f}",
        "memory, MiB": f"{median['peak_bytes'] / 2**20:,.0f}",
    }


def _mean_rows(group: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Every private method's mean metric, a line for each n and epsilon."""
    means = group[np.isfinite(group["epsilon"])].pivot_table(index=["n", "epsilon"], columns="method", values="metric")
    for (n, epsilon), row in means.iterrows():
        named = {name: number(value) for name, value in row.items()}
        yield {"n": str(n), "epsilon": f"{epsilon:g}"} | named | {row.idxmax(): f"**{number(row.max())}**"}


def _missing(compared: pd.DataFrame) -> list[str]:
    """Lines, one for each n and fault."""
    faults = compared["verdict"].where(~compared["verdict"].isin(VERDICTS), "")
    partial = ("without " + compared["absent"]).where((compared["absent"] != "") & (compared["baseline"] != ""), "")
    lines = []
    for fault in (faults, partial):
        listed = compared.assign(fault=fault)[fault != ""]
        for (task, model, n, text), group in listed.groupby([*GROUP, "n", "fault"]):
            epsilons = ", ".join(f"{value:g}" for value in group["epsilon"])
            lines.append(f"- {task}, {model}, n = {n}, epsilon = {epsilons}: {text}")
    return lines or ["Nothing."]
