"""Predicted against measured: the accuracy estimate (T3) beside what noise cost, and mu beside dp_accounting's epsilon.

    python -m experiments.studies.predicted

For each task, model, n and epsilon, one release per seed: the loss per record that the noise of the first step cost
under the public curvature, over its predicted mean, against its chi-square law; and the epsilon that dp_accounting's
PLD accountant finds for the certificate's mu. The measured cost is **not private**: it is shown because the data is
open. Writes predicted.csv and predicted.png into --out.
"""

import argparse
import pathlib

import jax
import matplotlib
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from tqdm import tqdm

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.benchmark.grid import RESULTS, subsample, write_table
from experiments.data.splits import run_cli
from qexp_jax import privacy
from qexp_jax.fine_tuning import rounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = (
    "task model n epsilon delta seed k mu accountant_epsilon predicted_cost quantile_05 quantile_95 measured_cost"
).split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.OPEN_TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.1, 1.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


def row_of(anchor, model_name, n, epsilon, delta, seed):
    """One release, its first round's prediction and what the noise really cost."""
    private = subsample(anchor, n, seed)
    release, infos = qexp_jax.fine_tune(
        jax.random.key(seed), anchor.model.loss_fn, anchor.params,
        public=anchor.split.public, private=private, epsilon=epsilon, delta=delta,
        run=qexp_jax.RunOptions(diagnostics=True),
    )  # fmt: skip
    k, count = infos[0].plan.subspace.dim, len(private["label"])
    mu, (predicted, degrees) = release.certificate["mu"], rounds.predicted_cost(infos[0])
    low, high = (qexp_jax.accuracy.excess_quantile(p, predicted, degrees) for p in (0.05, 0.95))
    found = (mu, accountant_epsilon(mu, delta), predicted, low, high, float(infos[0].noise_cost))
    labels = (anchor.task.name, model_name, count, epsilon, delta, seed, k)
    return dict(zip(COLUMNS, (*labels, *(float(f"{x:.6g}") for x in found)), strict=True))


def accountant_epsilon(mu, delta):
    """dp_accounting's epsilon of one release."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(privacy.dp_event([mu])).get_epsilon(delta)


def figure(rows, path):
    """Each release's cost over its predicted mean, with the 90 % band of its law."""
    groups = sorted({(r["task"], r["model"], r["n"], r["epsilon"]) for r in rows})
    fig, axis = plt.subplots(figsize=(10, 0.32 * len(groups) + 1.5), layout="constrained")
    for y, group in enumerate(groups):
        mine = [r for r in rows if (r["task"], r["model"], r["n"], r["epsilon"]) == group]
        for r in mine:
            low, high = (r[quantile] / r["predicted_cost"] for quantile in ("quantile_05", "quantile_95"))
            axis.fill_betweenx([y - 0.4, y + 0.4], low, high, color="tab:blue", alpha=0.03)
        axis.plot([r["measured_cost"] / r["predicted_cost"] for r in mine], [y] * len(mine), "k.", ms=4)
    axis.axvline(1, color="tab:blue")
    axis.set_yticks(range(len(groups)), [f"{t} {m}  n={n}  ε={e:g}" for t, m, n, e in groups], fontsize=8)
    inside = np.mean([r["quantile_05"] <= r["measured_cost"] <= r["quantile_95"] for r in rows])
    axis.set(xlabel="measured / predicted cost of the noise (bands: predicted 90 %)")
    axis.set_title(f"{inside:.0%} of {len(rows)} releases inside their 90 % interval")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv=None):
    args = parse_args(argv)
    pairs = [(t, m) for t in args.tasks for m in args.models if m in tasks.TASKS[t].pretraining]
    rows = []
    with tqdm(total=len(pairs) * len(args.sizes) * len(args.epsilons) * args.seeds, unit="release") as progress:
        for task, model_name in pairs:
            anchor = tasks.make_anchor(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
            for n in args.sizes:
                for epsilon in args.epsilons:
                    for seed in range(args.seeds):
                        rows.append(row_of(anchor, model_name, n, epsilon, args.delta, seed))
                        progress.update()
    write_table(args.out, "predicted", COLUMNS, rows)
    figure(rows, args.out / "predicted.png")
    print(f"wrote predicted.csv and predicted.png into {args.out}")


if __name__ == "__main__":
    run_cli(main)
