"""The methods of the arena, under one signature: ours, the floor, the ceiling, and every baseline.

A method takes a `Cell` (anchor, private records, budget), a seed and a point of its lattice of hyperparameters, and
returns parameters and what it spent. Ours has no lattice. A baseline's lattice is logarithmic and has no edges but
those that `allowed` states: cost (at most 64 passes over the private records) and what its guarantee requires.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import qexp_jax
from experiments.baselines import dp_sgd, linear
from experiments.baselines.adapters import ADAPTERS
from experiments.benchmark import models
from experiments.benchmark.search import Point
from experiments.benchmark.tasks import Anchor
from experiments.data.splits import Records

MAX_PASSES = 64
MAX_STEPS = 405
MIN_BATCH = 16
NON_PRIVATE_EPOCHS = 15


class Cell(NamedTuple):
    """Where a method runs: the private records are a seed's subsample."""

    anchor: Anchor
    private: Records
    epsilon: float
    delta: float

    @property
    def num_private(self) -> int:
        """N."""
        return len(self.private["label"])


class Outcome(NamedTuple):
    """Parameters, evaluations of a private record's gradient (expected, under sampling), noisy releases."""

    params: Any
    private_gradients: int
    noisy_steps: int


class Method(NamedTuple):
    """A contestant.

    Attributes:
      run: `(cell, seed, settings) -> Outcome`.
      models: those it applies to.
      private: whether epsilon matters.
      settings: lattice point -> settings, JSON-able.
      starts: number of private records -> points from which its search starts; empty where nothing is chosen.
      allowed: `(cell, settings) -> bool`.
    """

    run: Callable[[Cell, int, dict[str, Any]], Outcome]
    models: tuple[str, ...] = ("linear", "mlp", "cnn", "gru")
    private: bool = True
    settings: Callable[[Point], dict[str, Any]] = lambda point: {}
    starts: Callable[[int], list[Point]] = lambda num_private: []
    allowed: Callable[[Cell, dict[str, Any]], bool] = lambda cell, settings: True


def _fine_tuned(cell, seed, **options):
    return qexp_jax.fine_tune(
        jax.random.key(seed),
        cell.anchor.model.loss_fn,
        cell.anchor.params,
        public=cell.anchor.split.public,
        private=cell.private,
        epsilon=cell.epsilon,
        delta=cell.delta,
        **options,
    )


def _qexp(cell, seed, settings):
    # Only to count the rounds, of open data; a tilt is one pass more.
    release, infos = _fine_tuned(cell, seed, run=qexp_jax.RunOptions(diagnostics=True))
    passes = len(infos) + (release.certificate["tilt"] is not None)
    return Outcome(jax.block_until_ready(release.params), passes * cell.num_private, passes)


def _one_draw(cell, seed, settings):
    """The mechanism of arXiv:2605.20521 alone: one draw with A = M = H + lambda I."""
    release = _fine_tuned(cell, seed, plan=qexp_jax.PlanOptions(one_draw=True))
    return Outcome(jax.block_until_ready(release.params), cell.num_private, 1)


def _zero_shot(cell, seed, settings):
    return Outcome(cell.anchor.params, 0, 0)


def _non_private(cell, seed, settings):
    """AdamW on the private records; the best epoch **on the test set**, so that it is a ceiling."""
    anchor = cell.anchor
    epochs = models.epochs_of_adamw(
        anchor.model.loss_fn, anchor.params, cell.private,
        epochs=NON_PRIVATE_EPOCHS, batch_size=64, seed=seed, **settings,
    )  # fmt: skip
    best = max(epochs, key=lambda p: models.evaluate(anchor.model, p, anchor.split.test, anchor.task.metric))
    return Outcome(best, NON_PRIVATE_EPOCHS * cell.num_private, 0)


def _noisy_descent(optimizer, adapter, cell, seed, settings):
    params = dp_sgd.train(
        seed,
        cell.anchor.model.loss_fn,
        cell.anchor.params,
        cell.private,
        optimizer=optimizer,
        adapter=adapter,
        settings=dp_sgd.Settings(**settings),
        epsilon=cell.epsilon,
        delta=cell.delta,
    )
    passes = settings["steps"] * settings["sampling_prob"]
    return Outcome(params, round(passes * cell.num_private), settings["steps"])


def _objective_perturbation(cell, seed, settings):
    params, passes = linear.objective_perturbation(
        np.random.default_rng(seed), cell.anchor.params, cell.private,
        **settings, epsilon=cell.epsilon, delta=cell.delta,
    )  # fmt: skip
    return Outcome(params, passes * cell.num_private, 1)


def _adassp(cell, seed, settings):
    mu = linear.adassp_mu(cell.epsilon, cell.delta)
    params = linear.adassp(np.random.default_rng(seed), cell.anchor.params, cell.private, **settings, mu=mu)
    return Outcome(params, cell.num_private, 3)


def _descent_settings(point):
    sampling, steps, length, clip = point
    return {
        "sampling_prob": 4.0**sampling,
        "steps": round(5 * 3.0**steps),
        "length": 2.0**length,
        "l2_clip_norm": 10.0 ** (clip / 2),
    }


def _descent_allowed(cell, settings):
    sampling_prob, steps = settings["sampling_prob"], settings["steps"]
    batch = sampling_prob * cell.num_private
    return sampling_prob <= 1 and batch >= MIN_BATCH and 1 < steps <= MAX_STEPS and steps * sampling_prob <= MAX_PASSES


def _descent_starts(lengths, num_private):
    sampling = -2 if num_private >= 1000 else -1 if num_private >= 4 * MIN_BATCH else 0
    return [(sampling, 2, length, 0) for length in lengths]


def _descent(optimizer, adapter):
    lengths = (-1, 1, 3, 5) if optimizer == "sgd" else (-6, -4, -2)
    return Method(
        run=functools.partial(_noisy_descent, optimizer, adapter),
        # A linear model is its own last layer, its biases alone do not change a ranking, and low rank saves nothing.
        models=("linear", "mlp", "cnn", "gru") if adapter == "all" else ("mlp", "cnn"),
        settings=_descent_settings,
        starts=functools.partial(_descent_starts, lengths),
        allowed=_descent_allowed,
    )


def _full_batch_settings(point):
    return _descent_settings((0, *point))


def _perturbation_settings(point):
    radius, strength = point
    norm_bound = 10.0 ** (radius / 2)
    return {"norm_bound": norm_bound, "regularisation": 2.0**strength * norm_bound**2}


def _perturbation_allowed(cell, settings):
    outputs = cell.anchor.task.num_outputs
    return linear.determinant_share(outputs, **settings) < 0.9 * cell.epsilon


def _perturbation_starts(num_private):
    return [(2, strength) for strength in (0, 2, 4, 6, 8, 10)]


METHODS = {
    "qexp": Method(_qexp),
    "one_draw": Method(_one_draw),
    "zero_shot": Method(_zero_shot, private=False),
    "non_private": Method(
        _non_private,
        private=False,
        settings=lambda point: {"learning_rate": 10.0 ** (point[0] / 2)},
        starts=lambda num_private: [(-6,)],
    ),
    "dp_gd": Method(
        functools.partial(_noisy_descent, "sgd", "all"),
        settings=_full_batch_settings,
        starts=lambda num_private: [(1, length, 0) for length in (-1, 1, 3, 5)],
        allowed=_descent_allowed,
    ),
    **{
        f"dp_{optimizer}_{adapter}": _descent(optimizer, adapter)
        for adapter in ADAPTERS
        for optimizer in dp_sgd.OPTIMIZERS
    },
    "objective_perturbation": Method(
        _objective_perturbation,
        models=("linear",),
        settings=_perturbation_settings,
        starts=_perturbation_starts,
        allowed=_perturbation_allowed,
    ),
    "adassp": Method(
        _adassp,
        models=("linear",),
        settings=lambda point: {"norm_bound": 10.0 ** (point[0] / 2), "step": 2.0 ** point[1]},
        starts=lambda num_private: [(1, 1)],
    ),
}
OURS = "qexp", "one_draw"
BASELINES = [name for name, method in METHODS.items() if method.private and name not in OURS]
DESCENT = [name for name in BASELINES if name.startswith("dp_")]  # DP-SGD and its relatives
