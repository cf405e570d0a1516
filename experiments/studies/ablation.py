"""The random-projection ablation: test metric against k, for each kind of subspace.

    python -m experiments.studies.ablation

Random Gaussian and count-sketch directions, the leading public eigenspace, the last layer, and all parameters with a
precision of rank k plus damping (the default at k = 128); and the mechanism of arXiv:2605.20521, one draw with A = M =
H + lambda I, in the eigenspace and in all parameters. Everything else is chosen on public data as in the one call.
Writes ablation.csv and ablation.png into --out.
"""

import argparse
import pathlib

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.benchmark.grid import RESULTS, subsample, write_table
from experiments.data.splits import run_cli
from qexp_jax import subspace

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = "task model n epsilon delta subspace k seed metric_name metric".split()
KINDS = (
    "gaussian", "count_sketch", "public eigenspace", "last layer", "all parameters, rank k",
    "one draw, public eigenspace", "one draw, rank k",
)  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--tasks", nargs="+", default=["physionet_icu", "mnist_writers"], choices=list(tasks.TASKS))
    parser.add_argument("--models", nargs="+", default=["mlp"], choices=list(models.MODELS))
    parser.add_argument("--dims", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--n", type=int, default=4000)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


def choice(kind, dim, key, params):
    """What of `fine_tune`'s defaults a kind replaces."""
    return {
        "gaussian": lambda: {"subspace": subspace.gaussian(key, params, dim)},
        "count_sketch": lambda: {"subspace": subspace.count_sketch(key, params, dim)},
        "public eigenspace": lambda: {"subspace_dim": dim},
        "last layer": lambda: {"subspace": subspace.full(params, where="head")},
        "all parameters, rank k": lambda: {"precision_rank": dim},
        "one draw, public eigenspace": lambda: {"subspace_dim": dim, "one_draw": True},
        "one draw, rank k": lambda: {"precision_rank": dim, "one_draw": True},
    }[kind]()


def release(kind, dim, key, anchor, private, epsilon, delta):
    """The private parameters."""
    space_key, key = jax.random.split(key)
    return qexp_jax.fine_tune(
        key, anchor.model.loss_fn, anchor.params, public=anchor.split.public, private=private,
        epsilon=epsilon, delta=delta, plan=qexp_jax.PlanOptions(**choice(kind, dim, space_key, anchor.params)),
    ).params  # fmt: skip


def rows_of(anchor, model_name, args, progress):
    """All kinds, dimensions and seeds for one anchor."""
    metric = anchor.task.metric
    head_dim = subspace.full(anchor.params, where="head").dim
    for kind in KINDS:
        for dim in [head_dim] if kind == "last layer" else args.dims:
            for seed in range(args.seeds):
                private = subsample(anchor, args.n, seed)
                params = release(kind, dim, jax.random.key(seed), anchor, private, args.epsilon, args.delta)
                value = models.evaluate(anchor.model, params, anchor.split.test, metric)
                labels = anchor.task.name, model_name, len(private["label"]), args.epsilon, args.delta
                yield dict(zip(COLUMNS, (*labels, kind, dim, seed, metric, round(value, 6)), strict=True))
                progress.update()


def figure(rows, floors, path):
    """One panel for each task and model: mean and standard error against k."""
    panels = sorted({(row["task"], row["model"]) for row in rows})
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = [row for row in rows if (row["task"], row["model"]) == panel]
        for kind, marker in zip(KINDS, "osD*^vP", strict=True):
            dims = sorted({row["k"] for row in mine if row["subspace"] == kind})
            values = [np.array([r["metric"] for r in mine if (r["subspace"], r["k"]) == (kind, k)]) for k in dims]
            errors = [np.std(v) / max(1, len(v) - 1) ** 0.5 for v in values]
            axis.errorbar(dims, [v.mean() for v in values], errors, marker=marker, capsize=2, label=kind)
        axis.axhline(floors[panel], color="k", ls="--", lw=1, label="pretrained")
        axis.set(xscale="log", xlabel="k", ylabel=mine[0]["metric_name"], title=f"{panel[0]}, {panel[1]}")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    fig.suptitle(f"n = {rows[0]['n']}, ε = {rows[0]['epsilon']:g}")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv=None):
    args = parse_args(argv)
    rows, floors = [], {}
    pairs = [(t, m) for t in args.tasks for m in args.models]
    with tqdm(total=len(pairs) * args.seeds * (1 + 4 * len(args.dims)), unit="release") as progress:
        for task, model_name in pairs:
            anchor = tasks.make_anchor(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
            floors[task, model_name] = models.evaluate(
                anchor.model, anchor.params, anchor.split.test, anchor.task.metric
            )
            rows += rows_of(anchor, model_name, args, progress)
    write_table(args.out, "ablation", COLUMNS, rows)
    figure(rows, floors, args.out / "ablation.png")
    print(f"wrote ablation.csv and ablation.png into {args.out}")


if __name__ == "__main__":
    run_cli(main)
