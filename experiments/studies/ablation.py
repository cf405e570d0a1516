"""The random-projection ablation: test metric against k, for each kind of subspace.

    python -m experiments.studies.ablation

Random Gaussian and count-sketch directions, the leading public eigenspace, the last layer, and all parameters with a
precision of rank k plus damping (the default at k = 128); and the mechanism of arXiv:2605.20521, one draw with A = M =
H + lambda I, in the eigenspace and in all parameters. Everything else is chosen on public data as in the one call.
Beside what each reached stands what the noise of its first draw was predicted to cost and did cost, in loss per record
of the public quadratic (T3). Writes ablation.csv, ablation.md and ablation.png into --out.
"""

import argparse
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from tqdm import tqdm

import qexp_jax
from experiments.benchmark import markdown, models, tasks
from experiments.benchmark.results import RESULTS, write_table
from experiments.benchmark.runs import subsample
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records, run_cli
from qexp_jax import subspace
from qexp_jax.fine_tuning import one_round

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = "task model n epsilon delta subspace k seed metric_name metric loss predicted_cost measured_cost".split()
KINDS = (
    "gaussian", "count_sketch", "public eigenspace", "last layer", "all parameters, rank k",
    "one draw, public eigenspace", "one draw, rank k",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--tasks", nargs="+", default=["physionet_icu", "mnist_trained"], choices=list(tasks.TASKS))
    parser.add_argument("--models", nargs="+", default=["mlp"], choices=list(models.MODELS))
    parser.add_argument("--dims", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


def choice(kind: str, dim: int, key: jax.Array, params: Any) -> dict[str, Any]:
    """What of `fine_tune`'s defaults a kind replaces.

    Args:
      kind: one of `KINDS`.
      dim: k.
      key: of random directions.
      params: the pretrained ones.
    """
    return {
        "gaussian": lambda: {"subspace": subspace.gaussian(key, params, dim)},
        "count_sketch": lambda: {"subspace": subspace.count_sketch(key, params, dim)},
        "public eigenspace": lambda: {"subspace_dim": dim},
        "last layer": lambda: {"subspace": subspace.full(params, where="head")},
        "all parameters, rank k": lambda: {"precision_rank": dim},
        "one draw, public eigenspace": lambda: {"subspace_dim": dim, "one_draw": True},
        "one draw, rank k": lambda: {"precision_rank": dim, "one_draw": True},
    }[kind]()


def release(
    kind: str, dim: int, key: jax.Array, pretrained: Pretrained, private: Records, epsilon: float, delta: float
) -> tuple[qexp_jax.Release, list[qexp_jax.RoundInfo]]:
    """A release, and its diagnostics: the private records are open data.

    Args:
      kind: one of `KINDS`.
      dim: k.
      key: of random directions and noise.
      pretrained: where the release starts, and the public records.
      private: records.
      epsilon: of the release.
      delta: of the release.
    """
    space_key, key = jax.random.split(key)
    plan = qexp_jax.PlanOptions(**choice(kind, dim, space_key, pretrained.params))
    return qexp_jax.fine_tune(
        key, pretrained.model.loss_fn, pretrained.params, public=pretrained.split.public, private=private,
        epsilon=epsilon, delta=delta, plan=plan, run=qexp_jax.RunOptions(diagnostics=True),
    )  # fmt: skip


def rows_of(
    pretrained: Pretrained, model_name: str, args: argparse.Namespace, progress: tqdm
) -> Iterator[dict[str, Any]]:
    """All kinds, dimensions and seeds for one pretrained model.

    Args:
      pretrained: where all releases start.
      model_name: in the table.
      args: the command line.
      progress: is told of each release.
    """
    metrics = (pretrained.task.metric, "negative_loss")
    head_dim = subspace.full(pretrained.params, where="head").dim
    for kind in KINDS:
        for dim in [head_dim] if kind == "last layer" else args.dims:
            for seed in range(args.seeds):
                private = subsample(pretrained, args.n, seed)
                key = jax.random.key(seed)
                found, infos = release(kind, dim, key, pretrained, private, args.epsilon, args.delta)
                value, negative_loss = models.scores(pretrained.model, found.params, pretrained.split.test, metrics)
                predicted, _ = one_round.predicted_cost(infos[0])
                yield {
                    "task": pretrained.task.name,
                    "model": model_name,
                    "n": len(private["label"]),
                    "epsilon": args.epsilon,
                    "delta": args.delta,
                    "subspace": kind,
                    "k": dim,
                    "seed": seed,
                    "metric_name": metrics[0],
                    "metric": round(value, 6),
                    "loss": round(-negative_loss, 6),
                    "predicted_cost": float(f"{predicted:.4g}"),
                    "measured_cost": float(f"{float(infos[0].noise_cost):.4g}"),
                }
                progress.update()


def page(rows: list[dict[str, Any]], pretrained_metrics: dict[tuple[str, str], float]) -> str:
    """Means over seeds, a table for each task and model."""
    lines = [f"# Metric against k, n = {rows[0]['n']}, epsilon = {rows[0]['epsilon']:g}", ""]
    for (task, model), group in pd.DataFrame(rows).groupby(["task", "model"]):
        metric_name = group["metric_name"].iloc[0]
        lines += [f"## {task}, {model}: pretrained {metric_name} {pretrained_metrics[task, model]:.4f}", ""]
        cells = group.groupby(["subspace", "k"], sort=False)
        lines += [*markdown.table(_line(kind, k, cell) for (kind, k), cell in cells), ""]
    return "\n".join(lines)


def _line(kind: str, k: int, cell: pd.DataFrame) -> dict[str, str]:
    """Of one kind of subspace and one k."""
    return {
        "directions": kind,
        "k": str(k),
        "metric ± 2 SE": markdown.with_se(cell["metric"].mean(), 2 * cell["metric"].sem()),
        "loss": markdown.number(cell["loss"].mean()),
        "noise of the first draw: predicted cost": f"{cell['predicted_cost'].mean():.2g}",
        "measured": f"{cell['measured_cost'].mean():.2g}",
    }


def figure(rows: list[dict[str, Any]], pretrained_metrics: dict[tuple[str, str], float], path: pathlib.Path) -> None:
    """One panel for each task and model: mean and standard error against k."""
    panels = sorted({(row["task"], row["model"]) for row in rows})
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for ax, (task, model) in zip(axes[0], panels, strict=True):
        of_panel = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        _curves(ax, of_panel)
        ax.axhline(pretrained_metrics[task, model], color="k", ls="--", lw=1, label="pretrained")
        ax.set(xscale="log", xlabel="k", ylabel=of_panel[0]["metric_name"], title=f"{task}, {model}")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    fig.suptitle(f"n = {rows[0]['n']}, ε = {rows[0]['epsilon']:g}")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _curves(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """One panel: a curve for each kind."""
    for kind, marker in zip(KINDS, "osD*^vP", strict=True):
        dims = sorted({row["k"] for row in rows if row["subspace"] == kind})
        values = [np.array([r["metric"] for r in rows if (r["subspace"], r["k"]) == (kind, k)]) for k in dims]
        errors = [np.std(v) / max(1, len(v) - 1) ** 0.5 for v in values]
        ax.errorbar(dims, [v.mean() for v in values], errors, marker=marker, capsize=2, label=kind)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all releases; writes table and figure."""
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []
    pretrained_metrics: dict[tuple[str, str], float] = {}
    pairs = [(task, model) for task in args.tasks for model in args.models]
    with tqdm(total=len(pairs) * args.seeds * (1 + (len(KINDS) - 1) * len(args.dims)), unit="release") as progress:
        for task, model_name in pairs:
            pretrained = tasks.pretrained_on(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
            pretrained_metrics[task, model_name] = models.evaluate(
                pretrained.model, pretrained.params, pretrained.split.test, pretrained.task.metric
            )
            rows += rows_of(pretrained, model_name, args, progress)
    write_table(args.out, "ablation", COLUMNS, rows, module="experiments.studies.ablation")
    (args.out / "ablation.md").write_text(page(rows, pretrained_metrics), encoding="utf-8")
    figure(rows, pretrained_metrics, args.out / "ablation.png")
    print(f"wrote ablation.csv, ablation.md and ablation.png into {args.out}")


if __name__ == "__main__":
    run_cli(main)
