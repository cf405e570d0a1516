"""Predicted against measured: the accuracy estimate (T3) beside what noise cost, and mu beside dp_accounting's epsilon.

    python -m experiments.studies.predicted

For each task, model, n and epsilon, one release per seed: the loss per record that the noise of the first step cost
under the public curvature, over its predicted mean, against its chi-square law; and the epsilon that dp_accounting's
PLD accountant finds for the certificate's mu. The measured cost is **not private**: it is shown because the data is
open. Writes predicted.csv and predicted.png into --out.
"""

import argparse
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from tqdm import tqdm

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.benchmark.results import RESULTS, write_table
from experiments.benchmark.runs import subsample
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import run_cli
from qexp_jax import privacy
from qexp_jax.fine_tuning import one_round

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = (
    "task model n epsilon delta seed k mu accountant_epsilon predicted_cost quantile_05 quantile_95 measured_cost"
).split()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
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


def row_of(pretrained: Pretrained, model_name: str, n: int, epsilon: float, delta: float, seed: int) -> dict[str, Any]:
    """One release, its first round's prediction and what the noise really cost.

    Args:
      pretrained: where the release starts, and the public records.
      model_name: in the table.
      n: private records.
      epsilon: of the release.
      delta: of the release.
      seed: of private records and noise.
    """
    private = subsample(pretrained, n, seed)
    release, infos = qexp_jax.fine_tune(
        jax.random.key(seed), pretrained.model.loss_fn, pretrained.params,
        public=pretrained.split.public, private=private, epsilon=epsilon, delta=delta,
        run=qexp_jax.RunOptions(diagnostics=True),
    )  # fmt: skip
    mu = release.certificate["mu"]
    predicted, degrees = one_round.predicted_cost(infos[0])
    low, high = (qexp_jax.accuracy.excess_quantile(p, predicted, degrees) for p in (0.05, 0.95))
    found = {
        "mu": mu,
        "accountant_epsilon": accountant_epsilon(mu, delta),
        "predicted_cost": predicted,
        "quantile_05": low,
        "quantile_95": high,
        "measured_cost": float(infos[0].noise_cost),
    }
    return {
        "task": pretrained.task.name,
        "model": model_name,
        "n": len(private["label"]),
        "epsilon": epsilon,
        "delta": delta,
        "seed": seed,
        "k": infos[0].plan.subspace.dim,
        **{name: float(f"{value:.6g}") for name, value in found.items()},
    }


def accountant_epsilon(mu: float, delta: float) -> float:
    """dp_accounting's epsilon of one release."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(privacy.dp_event([mu])).get_epsilon(delta)


def figure(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Each release's cost over its predicted mean, with the 90 % band of its law."""
    setting_of = lambda row: (row["task"], row["model"], row["n"], row["epsilon"])
    settings = sorted({setting_of(row) for row in rows})
    fig, ax = plt.subplots(figsize=(10, 0.32 * len(settings) + 1.5), layout="constrained")
    for y, setting in enumerate(settings):
        releases = [row for row in rows if setting_of(row) == setting]
        for row in releases:
            low, high = (row[quantile] / row["predicted_cost"] for quantile in ("quantile_05", "quantile_95"))
            ax.fill_betweenx([y - 0.4, y + 0.4], low, high, color="tab:blue", alpha=0.03)
        ratios = [row["measured_cost"] / row["predicted_cost"] for row in releases]
        ax.plot(ratios, [y] * len(releases), "k.", ms=4)
    ax.axvline(1, color="tab:blue")
    names = [f"{task} {model}  n={n}  ε={epsilon:g}" for task, model, n, epsilon in settings]
    ax.set_yticks(range(len(settings)), names, fontsize=8)
    inside = np.mean([row["quantile_05"] <= row["measured_cost"] <= row["quantile_95"] for row in rows])
    ax.set(xlabel="measured / predicted cost of the noise (bands: predicted 90 %)")
    ax.set_title(f"{inside:.0%} of {len(rows)} releases inside their 90 % interval")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all releases; writes table and figure."""
    args = parse_args(argv)
    pairs = [(task, model) for task in args.tasks for model in args.models if model in tasks.TASKS[task].pretraining]
    in_turn = list(itertools.product(args.sizes, args.epsilons, range(args.seeds)))
    rows = []
    with tqdm(total=len(pairs) * len(in_turn), unit="release") as progress:
        for task, model_name in pairs:
            pretrained = tasks.pretrained_on(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
            for n, epsilon, seed in in_turn:
                rows.append(row_of(pretrained, model_name, n, epsilon, args.delta, seed))
                progress.update()
    write_table(args.out, "predicted", COLUMNS, rows, module="experiments.studies.predicted")
    figure(rows, args.out / "predicted.png")
    print(f"wrote predicted.csv and predicted.png into {args.out}")


if __name__ == "__main__":
    run_cli(main)
