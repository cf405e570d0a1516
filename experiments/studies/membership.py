"""Membership inference: how well an attacker tells who was in the fine-tuning data, against what mu-GDP allows.

    python -m experiments.studies.membership

From a pool of private records, many shadow models are fine-tuned, each on the records that its coin flips include.
Each in turn is attacked with all others as the attacker's own: LiRA (Carlini et al., arXiv:2112.03570), the likelihood
ratio of a record's logit-scaled confidence under Gaussians fitted to the models with and without it; and a threshold on
the loss, which needs no shadow model. Attacked are full-batch AdamW, stopped early and run on until it over-fits, and
this library's defaults at each epsilon, relation ADD_OR_REMOVE_ONE with half the pool as the public count. Under mu-GDP
no attack has TPR above 1 - Phi(Phi^{-1}(1 - FPR) - mu), nor AUC above Phi(mu / sqrt 2). The plan, which is public, is
made once for all shadow models and known to the attacker.

Intervals are 95 % bootstrap intervals over attacked models. Writes membership.csv, membership.md and membership.png
into --out.
"""

import argparse
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from scipy.stats import norm
from tqdm import tqdm

from experiments.benchmark import models, tasks
from experiments.benchmark.results import RESULTS, write_table
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import run_cli, select
from experiments.studies.attacks import ATTACKS, SCORES, Game, bounds, intervals, lira, play, roc, summary
from experiments.studies.shadow_models import released, trained
from qexp_jax import privacy
from qexp_jax import subspace as subspaces

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = (
    "task model pool shadows method epsilon delta mu metric_name metric attack auc auc_low auc_high auc_bound "
    "tpr_at_01 tpr_at_01_low tpr_at_01_high tpr_at_01_bound tpr_at_1 tpr_at_1_low tpr_at_1_high tpr_at_1_bound"
).split()
LEARNING_RATES = {"linear": 1e-2, "mlp": 3e-3, "cnn": 3e-3}
DIGITS = {"auc": 3, "tpr_at_01": 4, "tpr_at_1": 4}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--tasks", nargs="+", default=["physionet_icu", "mnist_writers"], choices=list(tasks.TASKS))
    parser.add_argument("--models", nargs="+", default=["linear", "mlp"], choices=list(models.MODELS))
    parser.add_argument("--pool", type=int, default=400)
    parser.add_argument("--shadows", type=int, default=64)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 300], help="of AdamW")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


class Training(NamedTuple):
    """How the shadow models of one game were made.

    Attributes:
      task: name of the task.
      model: name of the model.
      method: AdamW or this library.
      epsilon: infinite without privacy.
      mu: infinite without privacy.
    """

    task: str
    model: str
    method: str
    epsilon: float
    mu: float

    @property
    def label(self) -> str:
        """In table and figure."""
        return f"{self.method}, epsilon {self.epsilon:g}" if np.isfinite(self.epsilon) else self.method


def games_of(
    pretrained: Pretrained, model_name: str, args: argparse.Namespace, progress: tqdm
) -> Iterator[tuple[Training, Game]]:
    """The games of one model on one task; all methods see the same coins.

    Args:
      pretrained: where all shadow models start.
      model_name: key of `LEARNING_RATES`.
      args: the command line.
      progress: is told of each game.
    """
    private = pretrained.split.private
    rng = np.random.default_rng([args.pool, args.shadows])
    pool = select(private, rng.permutation(len(private["label"]))[: args.pool])
    included = rng.integers(2, size=(args.shadows, args.pool)).astype(bool)
    start = subspaces.working(subspaces.layout_of(pretrained.params), pretrained.params)
    labels = (pretrained.task.name, model_name)
    for steps in args.steps:
        stacked = trained(start, pool, included, pretrained.model.loss_fn, LEARNING_RATES[model_name], steps)
        yield Training(*labels, f"adamw, {steps} steps", np.inf, np.inf), play(pretrained, pool, included, stacked)
        progress.update()
    for epsilon in args.epsilons:
        stacked = released(jax.random.key(0), pretrained, pool, included, epsilon, args.delta)
        mu = privacy.mu_from_budget(epsilon, args.delta)
        yield Training(*labels, "qexp", epsilon, mu), play(pretrained, pool, included, stacked)
        progress.update()


def rows_of(training: Training, game: Game, metric_name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of the table for each attack.

    Args:
      training: how the models were made.
      game: the models.
      metric_name: of `game.metric`.
      args: the command line.
    """
    for attack, attacked in ATTACKS.items():
        scores = attacked(game)
        low, high = intervals(scores, game.included)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
            "task": training.task, "model": training.model, "pool": args.pool, "shadows": args.shadows,
            "method": training.method, "epsilon": training.epsilon, "delta": args.delta, "mu": round(training.mu, 4),
            "metric_name": metric_name, "metric": round(game.metric, 4), "attack": attack,
        }  # fmt: skip
        columns = {"": summary(scores, game.included), "_low": low, "_high": high, "_bound": bounds(training.mu)}
        for ending, values in columns.items():
            row |= {f"{name}{ending}": round(float(value), 5) for name, value in zip(SCORES, values, strict=True)}
        yield row


def table(rows: list[dict[str, Any]], pretrained_metrics: dict[tuple[str, str], float]) -> str:
    """A line for each model, method and attack; the pretrained models' metrics are by (task, model)."""
    lines = [
        "| task | model | pretrained | trained by | test metric | attack | AUC | most allowed "
        "| TPR at FPR .1 % | most allowed | TPR at FPR 1 % | most allowed |",
        "|" + " --- |" * 12,
    ]
    for row in rows:
        training = Training(*(row[name] for name in Training._fields))
        before = pretrained_metrics[training.task, training.model]
        texts = [training.task, training.model, f"{before:.3f}", training.label, f"{row['metric']:.3f}", row["attack"]]
        for name, digits in DIGITS.items():
            rounded = {ending: f"{row[name + ending]:.{digits}f}" for ending in ("", "_low", "_high", "_bound")}
            texts += [f"{rounded['']} ({rounded['_low']} to {rounded['_high']})", rounded["_bound"]]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def figure(games: dict[Training, Game], path: pathlib.Path) -> None:
    """ROC curves of LiRA on logarithmic axes, with the most that mu-GDP allows dashed in the same colour."""
    panels = list(dict.fromkeys((training.task, training.model) for training in games))
    size = (3.6 * len(panels) + 0.5, 4)
    fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=True):
        _curves(ax, {training: game for training, game in games.items() if (training.task, training.model) == panel})
        ax.set_title(" ".join(panel), fontsize=10)
    axes.flat[0].set_ylabel("true positive rate of LiRA\n(dashed: the most that mu-GDP allows)")
    axes.flat[0].legend(fontsize=8, loc="upper left")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _curves(ax: Axes, games: dict[Training, Game]) -> None:
    """One panel: the games of one model on one task."""
    false_rates = np.geomspace(1e-4, 1, 200)
    for color, (training, game) in zip(plt.cm.tab10.colors, games.items(), strict=False):
        ax.plot(*roc(lira(game), game.included), color=color, label=training.label, drawstyle="steps-post")
        if np.isfinite(training.mu):
            ax.plot(false_rates, norm.sf(norm.isf(false_rates) - training.mu), "--", color=color)
    ax.plot(false_rates, false_rates, ":", color="0.6")
    ax.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1), xlabel="false positive rate")


def main(argv: Sequence[str] | None = None) -> None:
    """Plays all games; writes table and figure."""
    args = parse_args(argv)
    pairs = [(task, model) for task in args.tasks for model in args.models if model in tasks.TASKS[task].pretraining]
    rows: list[dict[str, Any]] = []
    games: dict[Training, Game] = {}
    pretrained_metrics: dict[tuple[str, str], float] = {}
    with tqdm(total=len(pairs) * (len(args.steps) + len(args.epsilons)), unit="game") as progress:
        for task, model_name in pairs:
            pretrained = tasks.pretrained_on(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
            metric = pretrained.task.metric
            pretrained_metrics[task, model_name] = models.evaluate(
                pretrained.model, pretrained.params, pretrained.split.test, metric
            )
            for training, game in games_of(pretrained, model_name, args, progress):
                games[training] = game
                rows += rows_of(training, game, metric, args)
    write_table(args.out, "membership", COLUMNS, rows, module="experiments.studies.membership")
    (args.out / "membership.md").write_text(table(rows, pretrained_metrics))
    figure(games, args.out / "membership.png")
    print(table(rows, pretrained_metrics))


if __name__ == "__main__":
    run_cli(main)
