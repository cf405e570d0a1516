"""The arena's results as one page and three pictures.

    python -m experiments.benchmark.report [--results DIR]   # DIR holds arena.csv; default experiments/results

Writes arena.md, arena_epsilon.png, arena_time.png and arena_gain.png beside the CSV, complete or not: what has not been
run yet is shown as missing.
"""

import argparse
import math
import pathlib

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

RESULTS = pathlib.Path(__file__).parents[1] / "results"
COLUMNS = [
    "task", "model", "n", "epsilon", "delta", "method", "seed", "metric_name", "metric", "loss", "seconds",
    "compile_seconds", "private_gradients", "noisy_steps", "peak_bytes",
]  # fmt: skip
GROUP, CELL = ["task", "model"], ["task", "model", "n", "epsilon"]
OURS, ONE_DRAW, ZERO_SHOT, NON_PRIVATE = "qexp", "one_draw", "zero_shot", "non_private"
DESCENT = "dp_"  # DP-SGD and its relatives
VERDICTS = ("ahead", "within 2 SE", "behind", "undecided")
LOSS_VERDICTS = ("lower", "higher")
SMALLEST_DROP = 0.003
REFERENCE_EPSILON = 1.0

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
FAMILIES = {
    "qexp (ours)": BLUE,
    "DP-SGD family, all weights": VERMILION,
    "DP-SGD family, few weights": ORANGE,
    "other private": PURPLE,
    "non-private": "0.6",
}
MARKERS = "os^DvPX*"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of arena.csv")
    return parser.parse_args(argv)


# Comparison


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
        "an unfilled field (a half-written row?)": rows.drop(columns="loss").isna().any(axis=1),
        "a run that an earlier line has already": rows.duplicated([*CELL, "method", "seed"]),
    }.items():
        if bad.any():
            raise ValueError(f"{path}: {fault} in line {bad.idxmax() + 2} ({bad.sum()} such lines).")
    if not np.isfinite(rows["epsilon"]).any():
        raise ValueError(f"{path}: no rows of a private method, found only {sorted(set(rows['method']))}.")
    return rows.astype({"n": int, "epsilon": float, "seed": int, "metric": float, "loss": float})


def cells(df: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell: every n of a (task, model) at every epsilon of the file, run or not.

    Columns beside the cell: `metric_name`; mean and standard error of ours (`ours`, `ours_se`) and of the baseline with
    the highest mean (`baseline`, `best`, `best_se`); mean of ours minus best over their common seeds and its standard
    error (`difference`, `difference_se`, `seeds`); `zero_shot` and `non_private` means; `below_zero_shot`; `verdict`,
    one of `VERDICTS` or what is missing; `absent`, the baselines run with this model elsewhere but not here; mean test
    losses (`ours_loss`, `best_loss`, `zero_shot_loss`), and `loss_verdict` on ours and its: "lower", "higher",
    "within 2 SE" or nothing. NaN stands for what is missing and for the standard error of a single seed.
    """
    scores = {key: group.set_index("seed")[["metric", "loss"]] for key, group in df.groupby([*CELL, "method"])}
    epsilons = sorted(value for value in df["epsilon"].unique() if math.isfinite(value))
    sizes = df[[*GROUP, "n", "metric_name"]].drop_duplicates().sort_values([*GROUP, "n"])
    return pd.DataFrame(
        {"metric_name": metric_name} | _compare(scores, (task, model, n, epsilon), baselines_of(df, model))
        for task, model, n, metric_name in sizes.itertuples(index=False, name=None)
        for epsilon in epsilons
    )


def baselines_of(df: pd.DataFrame, model: str) -> list[str]:
    """The private methods other than ours that the file has for `model`, on any task."""
    return sorted(set(df.loc[df["model"] == model, "method"]) - {OURS, ONE_DRAW, ZERO_SHOT, NON_PRIVATE})


def _compare(scores, cell, expected):
    def of(method, epsilon):
        return scores.get((*cell[:3], epsilon, method), pd.DataFrame({"metric": [], "loss": []}, dtype=float))

    found = {name: of(name, cell[3]) for name in expected if len(of(name, cell[3]))}
    baseline = max(found, key=lambda name: found[name]["metric"].mean(), default="")
    runs = of(OURS, cell[3]), found.get(baseline, of("", math.nan)), of(ZERO_SHOT, math.inf), of(NON_PRIVATE, math.inf)
    ours, best, zero, ceiling = (run["metric"] for run in runs)
    difference, drop = (ours - best).dropna(), (zero - ours).dropna()
    return dict(zip(CELL, cell, strict=True)) | {
        "ours": ours.mean(), "ours_se": ours.sem(),
        "baseline": baseline, "best": best.mean(), "best_se": best.sem(),
        "difference": difference.mean(), "difference_se": difference.sem(), "seeds": len(difference),
        "zero_shot": zero.mean(), "non_private": ceiling.mean(),
        # fmax: with a single seed the smallest drop alone decides.
        "below_zero_shot": bool(drop.mean() > np.fmax(3 * drop.sem(), SMALLEST_DROP)),
        "verdict": _lack(ours, best, difference) or _verdict(difference.mean(), difference.sem()),
        "absent": ", ".join(sorted(set(expected) - set(found))),
        **_losses(*(run["loss"] for run in runs[:3])),
    }  # fmt: skip


def _losses(ours, best, zero):
    less = (best - ours).dropna()
    verdict = "" if less.empty else _verdict(less.mean(), less.sem())
    return {
        "ours_loss": ours.mean(), "best_loss": best.mean(), "zero_shot_loss": zero.mean(),
        "loss_verdict": {"ahead": "lower", "behind": "higher"}.get(verdict, verdict),
    }  # fmt: skip


def _lack(ours, best, difference):
    lacking = [text for text, part in (("no qexp", ours), ("no baselines", best)) if part.empty]
    return ", ".join(lacking) or ("no common seeds" if difference.empty else "")


def _verdict(difference, se):
    if math.isnan(se):
        return "undecided"
    if abs(difference) <= 2 * se:
        return "within 2 SE"
    return "ahead" if difference > 0 else "behind"


def nearest(epsilons) -> float:
    """The finite epsilon nearest to `REFERENCE_EPSILON` on the log scale; that itself where there is none."""
    finite = sorted(value for value in set(epsilons) if math.isfinite(value))
    return min(finite, key=lambda value: abs(math.log(value / REFERENCE_EPSILON)), default=REFERENCE_EPSILON)


# The page


def page(df: pd.DataFrame, compared: pd.DataFrame) -> str:
    """The text of `arena.md`."""
    lines = [*_summary(df, compared), "", "## Ours against the best baseline", ""]
    for (task, model), group in compared.groupby(GROUP):
        lines += [_title(task, model, group), "", *_table(_comparison_row(cell) for cell in group.itertuples()), ""]
    lines += ["## Costs", "", *_COST_NOTES, ""]
    for (task, model), group in df.groupby(GROUP):
        lines += [f"### {task}, {model}", "", *_table(_cost_rows(group)), ""]
    lines += ["## Mean of every method", "", "Bold: the best private method of the row. –: not run.", ""]
    for (task, model), group in df.groupby(GROUP):
        lines += [_title(task, model, group), "", *_table(_mean_rows(group)), ""]
    return "\n".join([*lines, "## Missing", "", *_missing(compared), ""])


_COST_NOTES = [
    "Ours and the DP-SGD relative of highest mean. Seconds: wall time of a run without compilation, median over seeds;",
    "a baseline's search is not counted. Compilation: seconds, the most of any seed; zero after a search.",
    "Gradients: evaluations of a private record's gradient. Memory: the process's peak, data and runtime included.",
]


def _summary(df, compared):
    metrics = df.groupby("metric_name")["task"].agg(lambda tasks: ", ".join(sorted(set(tasks))))
    done, small = compared["verdict"].isin(VERDICTS), compared["epsilon"] <= 2
    splits = {"all": done | True, "epsilon <= 2": small, "epsilon > 2": ~small}
    for (task, model), group in compared.groupby(GROUP):
        splits[f"{task}, {model}"] = compared.index.isin(group.index)
    return [
        "# The arena: qexp (ours) against private fine-tuning", "",
        *_table(_split_row(name, compared[chosen]) for name, chosen in splits.items()), "",
        f"- {done.sum()} of {len(compared)} cells compared, {(~done).sum()} missing; "
        f"{(compared['absent'] != '').sum()} still lack a baseline (see Missing, at the end).",
        "- **Each baseline's hyperparameters were chosen on the test set; ours were not.**",
        "- Best baseline: the baseline with the highest mean in that cell. Higher is better.",
        "- Ahead, behind: by more than 2 standard errors (SE) of the paired difference over common seeds, which share "
        "the private records. SEs cover subsample, order of the public records and noise, not test set or pretraining.",
        f"- Below zero-shot: ours is, by more than max(3 SE, {SMALLEST_DROP:g}).",
        "- Loss: mean cross-entropy on the test set, in nats; ours is lower or higher than the same baseline's by "
        "more than 2 SE. **The baseline's settings are those of its best metric; others may have a lower loss.**",
        "- Metric: " + "; ".join(f"{name} ({tasks})" for name, tasks in metrics.items())
        + f". δ = {', '.join(f'{delta:g}' for delta in sorted(df['delta'].unique()))}."
        + f" Common seeds in a cell: {_span(compared.loc[done, 'seeds'])}.",
    ]  # fmt: skip


def _split_row(name, part):
    counts = part["verdict"].value_counts()
    return {
        "cells": name,
        "compared": str(part["verdict"].isin(VERDICTS).sum()),
        **{verdict: str(counts.get(verdict, 0)) for verdict in VERDICTS},
        "mean difference": _number(part["difference"].mean(), signed=True),
        "below zero-shot": str(part["below_zero_shot"].sum()),
        **{f"loss {verdict}": str((part["loss_verdict"] == verdict).sum()) for verdict in LOSS_VERDICTS},
    }


def _comparison_row(cell):
    flags = [cell.verdict if cell.verdict in ("ahead", "within 2 SE") else f"**{cell.verdict}**"]
    flags += ["**below zero-shot**"] if cell.below_zero_shot else []
    return {
        "n": str(cell.n),
        "epsilon": f"{cell.epsilon:g}",
        "zero-shot": _number(cell.zero_shot),
        "qexp": _with_se(cell.ours, cell.ours_se),
        "best baseline": f"{cell.baseline} {_with_se(cell.best, cell.best_se)}".strip(),
        "difference": _with_se(cell.difference, cell.difference_se, signed=True),
        "verdict": ", ".join(flags),
        "non-private": _number(cell.non_private),
        "loss: zero-shot / qexp / baseline": " / ".join(
            _number(loss) for loss in (cell.zero_shot_loss, cell.ours_loss, cell.best_loss)
        ),
        "ours is": cell.loss_verdict or "–",
    }


def _cost_rows(group):
    chosen = group[group["epsilon"] == nearest(group["epsilon"])]
    for (n, epsilon), part in chosen.groupby(["n", "epsilon"]):
        methods = part.groupby("method")
        descent = methods["metric"].mean().filter(regex=f"^{DESCENT}")
        median, compilation = methods.median(numeric_only=True), methods["compile_seconds"].max()
        for name in (OURS, *([descent.idxmax()] if len(descent) else [])):
            cost = {"n": str(n), "epsilon": f"{epsilon:g}", "method": name}
            yield cost | (_cost(median.loc[name], compilation[name]) if name in median.index else _cost(None, None))


def _cost(median, compilation):
    if median is None:
        return dict.fromkeys(("seconds", "compilation", "gradients", "noisy steps", "memory, MiB"), "–")
    return {
        "seconds": f"{median['seconds']:.3g}",
        "compilation": f"{compilation:.3g}",
        "gradients": f"{median['private_gradients']:,.0f}",
        "noisy steps": f"{median['noisy_steps']:.0f}",
        "memory, MiB": f"{median['peak_bytes'] / 2**20:,.0f}",
    }


def _mean_rows(group):
    means = group[np.isfinite(group["epsilon"])].pivot_table(index=["n", "epsilon"], columns="method", values="metric")
    for (n, epsilon), row in means.iterrows():
        named = {name: _number(value) for name, value in row.items()}
        yield {"n": str(n), "epsilon": f"{epsilon:g}"} | named | {row.idxmax(): f"**{_number(row.max())}**"}


def _missing(compared):
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


def _title(task, model, group):
    return f"### {task}, {model} ({group['metric_name'].iloc[0]})"


def _table(rows):
    """Markdown that is aligned as plain text too; `rows` are dicts with the same keys."""
    rows = list(rows)
    if not rows:
        return ["Nothing yet."]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def _number(value, signed=False):
    return "–" if math.isnan(value) else f"{value:{'+' if signed else ''}.4f}"


def _with_se(mean, se, signed=False):
    return "–" if math.isnan(mean) else f"{_number(mean, signed)} ± {'n/a' if math.isnan(se) else f'{se:.4f}'}"


def _span(counts):
    return "none" if counts.empty else " to ".join(f"{value:g}" for value in sorted({counts.min(), counts.max()}))


# The pictures


def epsilon_figure(df: pd.DataFrame, compared: pd.DataFrame, path: pathlib.Path) -> None:
    """Metric against epsilon, a panel for each (task, model) and n."""
    groups = list(compared.groupby(GROUP))
    columns = max(group["n"].nunique() for _, group in groups)
    fig, axes = _panels(len(groups), columns, 2.7, 2.1, sharey="row")
    for row, ((task, model), group) in zip(axes, groups, strict=True):
        runs = df[(df["task"] == task) & (df["model"] == model)]
        for ax, (n, part) in zip(row, group.groupby("n")):  # noqa: B905 - a row may have fewer panels
            _curves(ax, runs[runs["n"] == n], part)
            ax.set_title(f"{task}, {model}, n = {n:,}", fontsize=9)
        row[0].set(ylabel=group["metric_name"].iloc[0], ylim=_limits(group))
    handles = [
        Line2D([], [], color=BLUE, lw=2.5, marker="o", ms=4, label="qexp (ours) ± 2 SE"),
        Line2D([], [], color=VERMILION, lw=1.5, marker="s", ms=3.5, label="best baseline in the cell (tuned on test)"),
        Line2D([], [], color="0.75", lw=0.8, label="each baseline"),
        Line2D([], [], color=GREEN, lw=1.2, ls="--", label="non-private"),
        Line2D([], [], color="k", lw=1.2, ls=":", label="zero-shot"),
    ]  # fmt: skip
    _finish(fig, axes, handles, path, xlabel="ε (grey curves may leave the frame)")


def _curves(ax, runs, part):
    means = runs[np.isfinite(runs["epsilon"])].pivot_table(index="epsilon", columns="method", values="metric")
    for name in means.columns.difference([OURS]):
        ax.plot(means[name].dropna(), color="0.75", lw=0.8, zorder=1)
    ax.axhline(part["zero_shot"].iloc[0], color="k", lw=1.2, ls=":", zorder=2)
    ax.axhline(part["non_private"].iloc[0], color=GREEN, lw=1.2, ls="--", zorder=2)
    ax.plot(part["epsilon"], part["best"], color=VERMILION, lw=1.5, marker="s", ms=3.5, zorder=3)
    band = 2 * part["ours_se"].fillna(0)
    ax.fill_between(part["epsilon"], part["ours"] - band, part["ours"] + band, color=BLUE, alpha=0.25, lw=0, zorder=4)
    ax.plot(part["epsilon"], part["ours"], color=BLUE, lw=2.5, marker="o", ms=4, zorder=5)
    ax.set_xscale("log")
    ax.set_xticks(part["epsilon"], [f"{value:g}" for value in part["epsilon"]], minor=False)
    ax.minorticks_off()
    ax.set_xlim(part["epsilon"].min() / 1.3, part["epsilon"].max() * 1.3)
    if part["ours"].isna().all():
        ax.annotate("qexp missing", (0.03, 0.88), xycoords="axes fraction", color=BLUE, fontsize=8, backgroundcolor="w")


def _limits(group):
    """Of what matters: a baseline that fails must not flatten the rest."""
    values = group[["ours", "best", "zero_shot", "non_private"]].to_numpy()
    low, high = np.nanmin(values), np.nanmax(values)
    pad = 0.08 * (high - low) or 0.01
    return low - pad, high + pad


def time_figure(df: pd.DataFrame, path: pathlib.Path) -> None:
    """Gain over zero-shot against wall seconds, a panel for each (task, model), at the epsilon nearest to 1."""
    groups, sizes = list(df.groupby(GROUP)), sorted(df["n"].unique())
    columns = min(4, len(groups))
    fig, axes = _panels(math.ceil(len(groups) / columns), columns, 3.4, 2.8)
    shapes = {n: MARKERS[i % len(MARKERS)] for i, n in enumerate(sizes)}
    for ax, ((task, model), group) in zip(axes.flat, groups):  # noqa: B905 - the last row may be short
        epsilon = nearest(group["epsilon"])
        for (method, n), (seconds, gain) in _gains(group, epsilon).iterrows():
            style = {"s": 70, "edgecolors": "k", "zorder": 4} if method == OURS else {"s": 28, "edgecolors": "w"}
            ax.scatter(seconds, gain, color=FAMILIES[family(method)], marker=shapes[n], linewidths=0.6, **style)
        ax.axhline(0, color="k", lw=1, ls=":")
        label_times(ax)
        ax.set_title(f"{task}, {model}, ε = {epsilon:g}", fontsize=9)
        ax.set_ylabel(f"{group['metric_name'].iloc[0]} − zero-shot")
    handles = [Line2D([], [], color=c, marker="o", ls="", label=name) for name, c in FAMILIES.items()]
    handles += [Line2D([], [], color="0.3", marker=shapes[n], ls="", label=f"n = {n:,}") for n in sizes]
    _finish(fig, axes, handles, path, xlabel="wall seconds of one run, without compilation")


def label_times(ax: Axes) -> None:
    """A log axis of seconds whose labels do not overlap, be it a third of a decade long or five."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 30 * low else (1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _gains(group, epsilon):
    """Median seconds and mean gain over zero-shot, by method and n."""
    runs = group[group["epsilon"].isin([epsilon, math.inf])].groupby(["method", "n"])
    mean = runs["metric"].mean()
    zero = mean.xs(ZERO_SHOT) if ZERO_SHOT in mean.index.get_level_values("method") else pd.Series(dtype=float)
    gain = mean - mean.index.get_level_values("n").map(zero)
    # The log axis would drop a time that is rounded to zero.
    table = pd.DataFrame({"seconds": runs["seconds"].median().clip(lower=1e-4), "gain": gain}).dropna()
    return table.drop(ZERO_SHOT, level="method", errors="ignore")


def family(method: str) -> str:
    """Key of `FAMILIES`."""
    if method in (OURS, NON_PRIVATE):
        return "qexp (ours)" if method == OURS else "non-private"
    if not method.startswith(DESCENT):
        return "other private"
    few = method.endswith(("_last", "_bias", "_lora"))
    return f"DP-SGD family, {'few' if few else 'all'} weights"


def gain_figure(compared: pd.DataFrame, path: pathlib.Path) -> None:
    """Ours minus the best baseline, in hundredths, over n and epsilon, a panel for each (task, model)."""
    groups = list(compared.groupby(GROUP))
    columns = min(4, len(groups))
    fig, axes = _panels(math.ceil(len(groups) / columns), columns, 3.6, 2.4)
    # A few failures must not bleach the rest: beyond this quantile the colour saturates and the number tells.
    limit = 100 * np.nan_to_num(compared["difference"].abs().quantile(0.9)) or 1.0
    for ax, ((task, model), group) in zip(axes.flat, groups):  # noqa: B905 - the last row may be short
        image = _heat_map(ax, group, limit)
        ax.set_title(f"{task}, {model} ({group['metric_name'].iloc[0]})", fontsize=9)
    bar = fig.colorbar(image, ax=axes, shrink=0.8, extend="both")
    bar.set_label("ours − best baseline, in hundredths\n(blue: ours ahead)")
    handles = [
        Line2D([], [], color="k", marker="$*$", ls="", label="|difference| > 2 SE"),
        plt.Rectangle((0, 0), 1, 1, fc="0.92", ec="0.6", hatch="///", label="missing"),
    ]
    _finish(fig, axes, handles, path, xlabel="ε")


def _heat_map(ax, group, limit):
    table = group.pivot(index="n", columns="epsilon", values="difference") * 100
    decided = group["verdict"].isin(("ahead", "behind")).to_numpy().reshape(table.shape)
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        if math.isnan(value):
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fc="0.92", ec="0.6", hatch="///", lw=0))
        else:
            colour = "w" if abs(value) > 0.65 * limit else "k"
            text = f"{value:+.2f}{'*' if decided[i, j] else ''}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(table.shape[1]), [f"{value:g}" for value in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{n:,}" for n in table.index])
    ax.set_ylabel("n")
    return ax.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")


def _panels(rows, columns, width, height, **kwargs):
    size = (max(width * columns, 7) + 0.5, height * rows + 1)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs)
    return fig, axes


def _finish(fig, axes, handles, path, xlabel):
    """Hides empty panels, adds the shared legend, writes and closes."""
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
        ax.tick_params(labelsize=8)
    fig.supxlabel(xlabel, fontsize=10)
    fig.legend(
        handles=handles,
        loc="outside upper center",
        ncols=max(2, int(fig.get_figwidth() / 2.4)),
        fontsize=9,
        frameon=False,
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv=None):
    args = parse_args(argv)
    df = read(args.results / "arena.csv")
    compared = cells(df)
    (args.results / "arena.md").write_text(page(df, compared), encoding="utf-8")
    epsilon_figure(df, compared, args.results / "arena_epsilon.png")
    time_figure(df, args.results / "arena_time.png")
    gain_figure(compared, args.results / "arena_gain.png")
    print(f"wrote arena.md and three pictures into {args.results}")


if __name__ == "__main__":
    main()
