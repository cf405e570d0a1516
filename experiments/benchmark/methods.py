"""The methods of the benchmark, under one signature: ours, the floor, the ceiling, and every baseline.

A method takes a `Setting`, a seed and hyperparameters, and returns parameters and what it spent. Ours has no
hyperparameters to choose; those of the baselines lie on the lattices of `lattices`, and are chosen on the test set or,
under other names, by rehearsal.
"""

import functools
from typing import Any

import jax
import numpy as np

import qexp_jax
from experiments.baselines import dp_sgd, linear
from experiments.baselines.adapters import ADAPTERS
from experiments.benchmark import lattices, models
from experiments.benchmark.public_methods import PUBLIC_METHODS, rehearsed
from experiments.benchmark.setting import Hyperparameters, Method, Outcome, Setting

NON_PRIVATE_EPOCHS = 15


def _fine_tuned(setting: Setting, seed: int, **options: Any) -> Any:
    """The one call; what it returns, and `options`, are those of `qexp_jax.fine_tune`."""
    pretrained = setting.pretrained
    return qexp_jax.fine_tune(
        jax.random.key(seed),
        pretrained.model.loss_fn,
        pretrained.params,
        public=pretrained.split.public,
        private=setting.private,
        epsilon=setting.epsilon,
        delta=setting.delta,
        **options,
    )


def _qexp(setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    # Only to count the rounds, of open data; a tilt is one pass more.
    release, infos = _fine_tuned(setting, seed, run=qexp_jax.RunOptions(diagnostics=True))
    passes = len(infos) + (release.certificate["tilt"] is not None)
    return Outcome(jax.block_until_ready(release.params), passes * setting.num_private, passes)


def _one_draw(setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    """The mechanism of arXiv:2605.20521 alone: one draw with A = M = H + lambda I."""
    release = _fine_tuned(setting, seed, plan=qexp_jax.PlanOptions(one_draw=True))
    return Outcome(jax.block_until_ready(release.params), setting.num_private, 1)


def _zero_shot(setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    return Outcome(setting.pretrained.params, 0, 0)


def _non_private(setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    """AdamW on the private records; the best epoch **on the test set**, so that it is a ceiling."""
    pretrained = setting.pretrained
    epochs = models.epochs_of_adamw(
        pretrained.model.loss_fn, pretrained.params, setting.private,
        epochs=NON_PRIVATE_EPOCHS, batch_size=64, seed=seed, **hyperparameters,
    )  # fmt: skip

    def test_metric(params: Any) -> float:
        return models.evaluate(pretrained.model, params, pretrained.split.test, pretrained.task.metric)

    return Outcome(max(epochs, key=test_metric), NON_PRIVATE_EPOCHS * setting.num_private, 0)


def _noisy_descent(
    optimizer: str, adapter: str, setting: Setting, seed: int, hyperparameters: Hyperparameters
) -> Outcome:
    """DP-SGD or a relative, by `optimizer` on the parameters that `adapter` trains."""
    params = dp_sgd.train(
        seed,
        setting.pretrained.model.loss_fn,
        setting.pretrained.params,
        setting.private,
        optimizer=optimizer,
        adapter=adapter,
        settings=dp_sgd.Settings(**hyperparameters),
        epsilon=setting.epsilon,
        delta=setting.delta,
    )
    steps = hyperparameters["steps"]
    passes = steps * hyperparameters["sampling_prob"]
    return Outcome(params, round(passes * setting.num_private), steps)


def _objective_perturbation(setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    params, passes = linear.objective_perturbation(
        np.random.default_rng(seed), setting.pretrained.params, setting.private,
        **hyperparameters, epsilon=setting.epsilon, delta=setting.delta,
    )  # fmt: skip
    return Outcome(params, passes * setting.num_private, 1)


def _adassp(setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    rng = np.random.default_rng(seed)
    mu = linear.adassp_mu(setting.epsilon, setting.delta)
    params = linear.adassp(rng, setting.pretrained.params, setting.private, **hyperparameters, mu=mu)
    return Outcome(params, setting.num_private, 3)


def _descent(optimizer: str, adapter: str) -> Method:
    # Adam's steps have a length per coordinate, hence the shorter ones.
    lengths = (-1, 1, 3, 5) if optimizer == "sgd" else (-6, -4, -2)
    return Method(
        run=functools.partial(_noisy_descent, optimizer, adapter),
        # A linear model is its own last layer, its biases alone do not change a ranking, and low rank saves nothing.
        models=("linear", "mlp", "cnn", "gru") if adapter == "all" else ("mlp", "cnn"),
        hyperparameters=lattices.descent,
        starts=functools.partial(lattices.descent_starts, lengths),
        allowed=lattices.descent_allowed,
    )


_TUNED = {
    "dp_gd": Method(
        functools.partial(_noisy_descent, "sgd", "all"),
        hyperparameters=lattices.full_batch,
        starts=lattices.full_batch_starts,
        allowed=lattices.descent_allowed,
    ),
    **{
        f"dp_{optimizer}_{adapter}": _descent(optimizer, adapter)
        for adapter in ADAPTERS
        for optimizer in dp_sgd.OPTIMIZERS
    },
    "objective_perturbation": Method(
        _objective_perturbation,
        models=("linear",),
        hyperparameters=lattices.perturbation,
        starts=lattices.perturbation_starts,
        allowed=lattices.perturbation_allowed,
    ),
    "adassp": Method(
        _adassp,
        models=("linear",),
        hyperparameters=lattices.adassp,
        starts=lambda num_private: [(1, 1)],
    ),
}
METHODS = {
    "qexp": Method(_qexp),
    "one_draw": Method(_one_draw),
    "zero_shot": Method(_zero_shot, private=False),
    "non_private": Method(
        _non_private,
        private=False,
        hyperparameters=lattices.learning_rate,
        starts=lambda num_private: [(-6,)],
    ),
    **_TUNED,
    **PUBLIC_METHODS,
    **rehearsed(_TUNED | PUBLIC_METHODS),
}
OURS = ("qexp", "one_draw")
BASELINES = list(_TUNED)  # that see no public record
DESCENT = [name for name in BASELINES if name.startswith("dp_")]  # DP-SGD and its relatives
DEFAULT_METHODS = [*OURS, "zero_shot", "non_private", *BASELINES]
