"""The benchmark's three pictures: metric against epsilon, gain against time, and gain over n and epsilon."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from experiments.benchmark.comparison import DESCENT, GROUP, NON_PRIVATE, OURS, ZERO_SHOT, methods_of, nearest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
FAMILIES = {
    "qexp (ours)": BLUE,
    "DP-SGD family, all weights": VERMILION,
    "DP-SGD family, few weights": ORANGE,
    "other private": PURPLE,
    "non-private": "0.6",
}
# What a baseline had to go by -> colour and marker of its curve.
CURVES = {
    "rehearsed": (VERMILION, "s"),
    "recipe": (ORANGE, "^"),
    "public curvature": (PURPLE, "D"),
    "tuned on test": ("0.55", "v"),
}
MARKERS = "os^DvPX*"
MISSING = {"fc": "0.92", "ec": "0.6", "hatch": "///"}


# Metric against epsilon


def epsilon_figure(df: pd.DataFrame, compared: pd.DataFrame, path: pathlib.Path) -> None:
    """Metric against epsilon, a panel for each (task, model) and n."""
    groups = list(compared.groupby(GROUP))
    columns = max(group["n"].nunique() for _, group in groups)
    fig, axes = _panels(len(groups), columns, size=(2.7, 2.1), sharey="row")
    for row, ((task, model), group) in zip(axes, groups, strict=True):
        runs = df[(df["task"] == task) & (df["model"] == model)]
        for ax, (n, part) in zip(row, group.groupby("n")):  # noqa: B905 - a row may have fewer panels
            _curves(ax, runs[runs["n"] == n], part)
            ax.set_title(f"{task}, {model}, n = {n:,}", fontsize=9)
        row[0].set(ylabel=group["metric_name"].iloc[0], ylim=_limits(group))
    handles = [Line2D([], [], color=BLUE, lw=2.5, marker="o", ms=4, label="qexp (ours) ± 2 SE")]
    handles += [
        Line2D([], [], color=colour, lw=1.2, marker=marker, ms=3.5, label=f"best baseline: {kind}")
        for kind, (colour, marker) in CURVES.items()
    ]
    handles += [
        Line2D([], [], color=GREEN, lw=1.2, ls="--", label="non-private"),
        Line2D([], [], color="k", lw=1.2, ls=":", label="zero-shot"),
    ]
    _finish(fig, axes, handles, path, xlabel="ε (recipes may leave the frame)")


def _curves(ax: Axes, runs: pd.DataFrame, part: pd.DataFrame) -> None:
    """One panel: `runs` are the rows of the file, `part` the same compared."""
    for kind, (colour, marker) in CURVES.items():
        means = runs[runs["method"].isin(methods_of(runs, kind))].groupby(["epsilon", "method"])["metric"].mean()
        if len(means):
            ax.plot(means.groupby("epsilon").max(), color=colour, lw=1.2, marker=marker, ms=3.5, zorder=3)
    ax.axhline(part["zero_shot"].iloc[0], color="k", lw=1.2, ls=":", zorder=2)
    ax.axhline(part["non_private"].iloc[0], color=GREEN, lw=1.2, ls="--", zorder=2)
    band = 2 * part["ours_se"].fillna(0)
    ax.fill_between(part["epsilon"], part["ours"] - band, part["ours"] + band, color=BLUE, alpha=0.25, lw=0, zorder=4)
    ax.plot(part["epsilon"], part["ours"], color=BLUE, lw=2.5, marker="o", ms=4, zorder=5)
    ax.set_xscale("log")
    ax.set_xticks(part["epsilon"], [f"{value:g}" for value in part["epsilon"]], minor=False)
    ax.minorticks_off()
    ax.set_xlim(part["epsilon"].min() / 1.3, part["epsilon"].max() * 1.3)
    if part["ours"].isna().all():
        ax.annotate("qexp missing", (0.03, 0.88), xycoords="axes fraction", color=BLUE, fontsize=8, backgroundcolor="w")


def _limits(group: pd.DataFrame) -> tuple[float, float]:
    """Of what matters: a baseline that fails must not flatten the rest."""
    values = group[["ours", "best", "zero_shot", "non_private"]].to_numpy()
    low = np.nanmin(values)
    high = np.nanmax(values)
    pad = 0.08 * (high - low) or 0.01
    return low - pad, high + pad


# Gain against time


def time_figure(df: pd.DataFrame, path: pathlib.Path) -> None:
    """Gain over zero-shot against wall seconds, a panel for each (task, model), at the epsilon nearest to 1."""
    groups = list(df.groupby(GROUP))
    sizes = sorted(df["n"].unique())
    columns = min(4, len(groups))
    fig, axes = _panels(math.ceil(len(groups) / columns), columns, size=(3.4, 2.8))
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


def _gains(group: pd.DataFrame, epsilon: float) -> pd.DataFrame:
    """Median seconds and mean gain over zero-shot, by method and n."""
    runs = group[group["epsilon"].isin([epsilon, math.inf])].groupby(["method", "n"])
    mean = runs["metric"].mean()
    zero_shot = mean.xs(ZERO_SHOT) if ZERO_SHOT in mean.index.get_level_values("method") else pd.Series(dtype=float)
    gain = mean - mean.index.get_level_values("n").map(zero_shot)
    # The log axis would drop a time that is rounded to zero.
    seconds = runs["seconds"].median().clip(lower=1e-4)
    return pd.DataFrame({"seconds": seconds, "gain": gain}).dropna().drop(ZERO_SHOT, level="method", errors="ignore")


def family(method: str) -> str:
    """Key of `FAMILIES`."""
    if method == OURS:
        return "qexp (ours)"
    if method == NON_PRIVATE:
        return "non-private"
    if not method.startswith(DESCENT):
        return "other private"
    few = method.endswith(("_last", "_bias", "_lora"))
    return f"DP-SGD family, {'few' if few else 'all'} weights"


# Gain over n and epsilon


def gain_figure(compared: pd.DataFrame, path: pathlib.Path) -> None:
    """Ours minus the best baseline, in hundredths, over n and epsilon, a panel for each (task, model)."""
    groups = list(compared.groupby(GROUP))
    columns = min(4, len(groups))
    fig, axes = _panels(math.ceil(len(groups) / columns), columns, size=(3.6, 2.4))
    # A few failures must not bleach the rest: beyond this quantile the colour saturates and the number tells.
    limit = 100 * np.nan_to_num(compared["difference"].abs().quantile(0.9)) or 1.0
    for ax, ((task, model), group) in zip(axes.flat, groups):  # noqa: B905 - the last row may be short
        image = _heat_map(ax, group, limit)
        ax.set_title(f"{task}, {model} ({group['metric_name'].iloc[0]})", fontsize=9)
    bar = fig.colorbar(image, ax=axes, shrink=0.8, extend="both")
    bar.set_label("ours − best baseline, in hundredths\n(blue: ours ahead)")
    handles = [
        Line2D([], [], color="k", marker="$*$", ls="", label="|difference| > 2 SE"),
        plt.Rectangle((0, 0), 1, 1, **MISSING, label="missing"),
    ]
    _finish(fig, axes, handles, path, xlabel="ε")


def _heat_map(ax: Axes, group: pd.DataFrame, limit: float) -> AxesImage:
    """One panel; colours saturate at a difference of `limit` hundredths."""
    table = group.pivot(index="n", columns="epsilon", values="difference") * 100
    decided = group["verdict"].isin(("ahead", "behind")).to_numpy().reshape(table.shape)
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        if math.isnan(value):
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, **MISSING, lw=0))
        else:
            colour = "w" if abs(value) > 0.65 * limit else "k"
            text = f"{value:+.2f}{'*' if decided[i, j] else ''}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(table.shape[1]), [f"{value:g}" for value in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{n:,}" for n in table.index])
    ax.set_ylabel("n")
    return ax.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")


# What all three share


def _panels(rows: int, columns: int, *, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes; `size` is a panel's width and height in inches."""
    width, height = size
    figsize = (max(width * columns, 7) + 0.5, height * rows + 1)
    return plt.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained", **kwargs)


def _finish(fig: Figure, axes: np.ndarray, handles: Sequence[Artist], path: pathlib.Path, xlabel: str) -> None:
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
