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
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from dp_accounting import NeighboringRelation
from scipy.stats import norm
from tqdm import tqdm

from experiments.benchmark import models, tasks
from experiments.benchmark.grid import RESULTS, write_table
from experiments.data.splits import run_cli, select
from qexp_jax import clipping, mechanism, plan, precision, privacy
from qexp_jax import subspace as subspaces
from qexp_jax.fine_tuning import rounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = (
    "task model pool shadows method epsilon delta mu metric_name metric attack auc auc_low auc_high auc_bound "
    "tpr_at_01 tpr_at_01_low tpr_at_01_high tpr_at_01_bound tpr_at_1 tpr_at_1_low tpr_at_1_high tpr_at_1_bound"
).split()
RATES = {"tpr_at_01": 1e-3, "tpr_at_1": 1e-2}  # false positives: .1 % and 1 %
LEARNING_RATES = {"linear": 1e-2, "mlp": 3e-3, "cnn": 3e-3}
RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
BATCH = 8  # shadow models at a time


class Game(NamedTuple):
    """Shadow models of one method.

    Attributes:
      included: (shadows, pool) bool, the coins.
      confidence: (shadows, pool) logit-scaled confidence in the true label.
      metric: mean test metric.
    """

    included: np.ndarray
    confidence: np.ndarray
    metric: float


def parse_args(argv=None):
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


# --- Shadow models ---


@functools.partial(jax.jit, static_argnames=("loss_fn", "learning_rate", "steps"))
def trained(params, pool, included, loss_fn, learning_rate, steps):
    """Parameters after `steps` of full-batch AdamW on each row of `included`, without privacy."""
    optimizer = optax.adamw(learning_rate)

    def train(mask):
        def mean_loss(params):
            return jnp.sum(jnp.where(mask, jax.vmap(loss_fn, in_axes=(None, 0))(params, pool), 0)) / jnp.sum(mask)

        def step(state, _):
            params, inner = state
            updates, inner = optimizer.update(jax.grad(mean_loss)(params), inner, params)
            return (optax.apply_updates(params, updates), inner), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return jax.lax.map(train, included, batch_size=BATCH)


def released(key, anchor, pool, included, epsilon, delta):
    """What `qexp_jax.fine_tune` releases for each row of `included`, with one public plan and its rounds for all."""
    mu, count, loss_fn = privacy.mu_from_budget(epsilon, delta), included.shape[1] // 2, anchor.model.loss_fn
    layout = subspaces.layout_of(anchor.params)
    start, public = subspaces.working(layout, anchor.params), anchor.split.public
    made = plan.make_plan(
        jax.random.key(0), loss_fn, start, public, loss_fn, public,
        num_units=count, noise_multiplier=privacy.noise_multiplier(mu, RELATION),
    )  # fmt: skip
    noise_multiplier = privacy.noise_multiplier(mu / made.rounds**0.5, RELATION)

    @jax.jit
    def release(noise_keys, included, start, made_arrays, pool):
        spaced, estimate, preconditioners = made_arrays

        def one(row):
            keys, mask = jax.random.split(row[0], made.rounds), row[1]
            state = rounds.start(layout, start, estimate, made.rounds)

            def round_of(state, key):
                preconditioner, _ = plan.choose(
                    state.posterior, estimate, preconditioners, noise_multiplier / made.rounds**0.5, count, made.rounds
                )  # fmt: skip
                clip_norm, noise_std = preconditioner.l2_clip_norm, preconditioner.l2_clip_norm * noise_multiplier

                def sum_in(precise):
                    return clipping.clipped_sum(
                        loss_fn, state.params, spaced, precise, pool, l2_clip_norm=clip_norm, mask=mask
                    )[0]

                leading, rest = preconditioner.eigenvalues[:-1], preconditioner.eigenvalues[-1]
                precise = precision.spectral(rest, estimate.directions, leading)
                total = jax.lax.cond(
                    preconditioner.tuned[-1] > 0,
                    lambda: sum_in(precise),
                    lambda: sum_in(precision.leading(estimate.directions, leading)),
                )
                quadratic = mechanism.Quadratic(precise, total, count)
                noisy = mechanism.noisy_sum(key, total, noise_std)
                *_, state = rounds.follow(
                    noisy, state, spaced, quadratic, noise_std, estimate, preconditioner, made.rounds
                )
                return state, None

            return jax.lax.scan(round_of, state, keys)[0].params

        return jax.lax.map(one, (noise_keys, included), batch_size=BATCH)

    arrays = made.subspace, made.estimate, made.preconditioners
    return release(jax.random.split(key, len(included)), included, start, arrays, pool)


def confidence(logits, labels):
    """log p - log(1 - p) of the true label, without overflow."""
    if logits.shape[-1] == 1:
        return (2 * labels - 1) * logits[..., 0]
    true = np.take_along_axis(logits, np.broadcast_to(labels, logits.shape[:-1])[..., None], axis=-1)[..., 0]
    others = np.where(np.arange(logits.shape[-1]) == labels[:, None], -np.inf, logits)
    return true - np.logaddexp.reduce(others, axis=-1)


def play(anchor, pool, included, stacked) -> Game:
    """Evaluates the shadow models on pool and test records."""
    each = [jax.tree.map(lambda x, s=s: x[s], stacked) for s in range(len(included))]
    logits = np.stack([np.asarray(anchor.model.logits(p, pool["x"]), np.float64) for p in each])
    metrics = [models.evaluate(anchor.model, p, anchor.split.test, anchor.task.metric) for p in each]
    return Game(included, confidence(logits, np.asarray(pool["label"])), float(np.mean(metrics)))


# --- Attacks ---


def lira(game: Game) -> np.ndarray:
    """(shadows, pool) log-likelihood ratios of membership, each model attacked with all others."""
    scores = np.empty_like(game.confidence)
    for target in range(len(scores)):
        others = np.delete(np.arange(len(scores)), target)
        seen, inside = game.confidence[others], game.included[others]
        means = [np.sum(seen * m, axis=0) / np.maximum(1, np.sum(m, axis=0)) for m in (inside, ~inside)]
        spread = np.mean((seen - np.where(inside, *means)) ** 2, axis=0)
        spread += 1e-3 * np.mean(spread)  # a record on which all models agree
        with_it, without = ((game.confidence[target] - m) ** 2 / (2 * spread) for m in means)
        scores[target] = without - with_it
    return scores


ATTACKS = {"lira": lira, "loss": lambda game: game.confidence}


def roc(scores, included):
    """False and true positive rates at every threshold."""
    order = np.argsort(-scores.ravel(), kind="stable")
    hits = included.ravel()[order]
    last = np.append(np.diff(scores.ravel()[order]) != 0, True)  # ties are one threshold
    rates = [np.append(0, np.cumsum(x)[last] / max(1, np.sum(x))) for x in (~hits, hits)]
    return rates[0], rates[1]


def summary(scores, included) -> np.ndarray:
    """AUC, and the true positive rate at each of RATES."""
    false, true = roc(scores, included)
    return np.array([np.trapezoid(true, false), *(true[false <= rate][-1] for rate in RATES.values())])


def bounds(mu):
    """What mu-GDP allows of the same numbers."""
    return np.array([norm.cdf(mu / 2**0.5), *(norm.sf(norm.isf(rate) - mu) for rate in RATES.values())])


def intervals(scores, included, resamples=200):
    """2.5 and 97.5 % quantiles over attacked models drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(scores), size=(resamples, len(scores)))
    return np.quantile([summary(scores[i], included[i]) for i in drawn], [0.025, 0.975], axis=0)


# --- Table and figure ---


def rows_of(anchor, model_name, method, epsilon, game, args):
    mu = privacy.mu_from_budget(epsilon, args.delta) if np.isfinite(epsilon) else np.inf
    for attack, attacked in ATTACKS.items():
        scores = attacked(game)
        found, (low, high), allowed = summary(scores, game.included), intervals(scores, game.included), bounds(mu)
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
            "task": anchor.task.name, "model": model_name, "pool": args.pool, "shadows": args.shadows, "method": method,
            "epsilon": epsilon, "delta": args.delta, "mu": round(mu, 4), "metric_name": anchor.task.metric,
            "metric": round(game.metric, 4), "attack": attack,
        }  # fmt: skip
        for i, name in enumerate(("auc", *RATES)):
            values = (found[i], low[i], high[i], allowed[i])
            keys = (name, f"{name}_low", f"{name}_high", f"{name}_bound")
            row |= {k: round(float(v), 5) for k, v in zip(keys, values, strict=True)}
        yield row


def table(rows, floors):
    """A line for each model, method and attack; `floors` are the pretrained models' metrics."""
    lines = [
        "| task | model | pretrained | trained by | test metric | attack | AUC | most allowed "
        "| TPR at FPR .1 % | most allowed | TPR at FPR 1 % | most allowed |",
        "|" + " --- |" * 12,
    ]
    for row in rows:
        floor = floors[(row["task"], row["model"])]
        cells = [row["task"], row["model"], f"{floor:.3f}", label(row), f"{row['metric']:.3f}", row["attack"]]
        for name, digits in (("auc", 3), ("tpr_at_01", 4), ("tpr_at_1", 4)):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            cells += [f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"]
            cells += [f"{row[f'{name}_bound']:.{digits}f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def label(row):
    return row["method"] if not np.isfinite(row["epsilon"]) else f"{row['method']}, epsilon {row['epsilon']:g}"


def figure(games, path):
    """ROC curves of LiRA on logarithmic axes, with the most that mu-GDP allows dashed in the same colour."""
    panels = list(dict.fromkeys(key[:2] for key in games))
    fig, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels) + 0.5, 4), squeeze=False, layout="constrained", sharey=True
    )
    grid = np.geomspace(1e-4, 1, 200)
    for ax, panel in zip(axes.flat, panels, strict=True):
        mine = {key[2:]: game for key, game in games.items() if key[:2] == panel}
        for color, ((method, epsilon, mu), game) in zip(plt.cm.tab10.colors, mine.items(), strict=False):
            name = label({"method": method, "epsilon": epsilon})
            ax.plot(*roc(lira(game), game.included), color=color, label=name, drawstyle="steps-post")
            if np.isfinite(mu):
                ax.plot(grid, norm.sf(norm.isf(grid) - mu), "--", color=color)
        ax.plot(grid, grid, ":", color="0.6")
        ax.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1), xlabel="false positive rate")
        ax.set_title(" ".join(panel), fontsize=10)
    axes.flat[0].set_ylabel("true positive rate of LiRA\n(dashed: the most that mu-GDP allows)")
    axes.flat[0].legend(fontsize=8, loc="upper left")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def games_of(anchor, model_name, args, progress):
    """(method, epsilon, mu) -> its shadow models; all methods see the same coins."""
    rng = np.random.default_rng([args.pool, args.shadows])
    pool = select(anchor.split.private, rng.permutation(len(anchor.split.private["label"]))[: args.pool])
    included = rng.integers(2, size=(args.shadows, args.pool)).astype(bool)
    start = subspaces.working(subspaces.layout_of(anchor.params), anchor.params)
    for steps in args.steps:
        stacked = trained(start, pool, included, anchor.model.loss_fn, LEARNING_RATES[model_name], steps)
        yield (f"adamw, {steps} steps", np.inf, np.inf), play(anchor, pool, included, stacked)
        progress.update()
    for epsilon in args.epsilons:
        stacked = released(jax.random.key(0), anchor, pool, included, epsilon, args.delta)
        mu = privacy.mu_from_budget(epsilon, args.delta)
        yield ("qexp", epsilon, mu), play(anchor, pool, included, stacked)
        progress.update()


def main(argv=None):
    args = parse_args(argv)
    pairs = [(t, m) for t in args.tasks for m in args.models if m in tasks.TASKS[t].pretraining]
    rows, games, floors = [], {}, {}
    with tqdm(total=len(pairs) * (len(args.steps) + len(args.epsilons)), unit="game") as progress:
        for task, model_name in pairs:
            anchor = tasks.make_anchor(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
            floors[(task, model_name)] = models.evaluate(
                anchor.model, anchor.params, anchor.split.test, anchor.task.metric
            )  # fmt: skip
            for key, game in games_of(anchor, model_name, args, progress):
                games[(task, model_name, *key)] = game
                rows += rows_of(anchor, model_name, *key[:2], game, args)
    write_table(args.out, "membership", COLUMNS, rows)
    (args.out / "membership.md").write_text(table(rows, floors))
    figure(games, args.out / "membership.png")
    print(table(rows, floors))


if __name__ == "__main__":
    run_cli(main)
