"""The rivals that take many noisy steps: DP-SGD, DP-Adam and full-batch DP-GD, with jax_privacy.

Poisson sampling, per-record clipping and noise are jax_privacy's, calibrated by dp_accounting's PLD accountant under
the zero-out relation (REPLACE_SPECIAL), which is also qexp_jax's default. Abadi et al., arXiv:1607.00133.

Steps are on the mean gradient divided by its clip norm, so that `length = steps * learning_rate` bounds how far the
noiseless parameters can travel (per coordinate for Adam, about): the setting that matters most.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import optax
from jax_privacy import batch_selection, clipped_grad, noise_addition
from jax_privacy.experimental.execution_plan import BandMFExecutionPlanConfig

from experiments import tasks
from experiments.adapters import ADAPTERS
from experiments.data import Records

OPTIMIZERS = {"sgd": optax.identity(), "adam": optax.scale_by_adam()}
_BLOCK = 64  # the gradients of one block stay in cache


class Settings(NamedTuple):
    """Hyperparameters of one run.

    Attributes:
      sampling_prob: of Poisson sampling; 1 is full-batch gradient descent.
      steps: noisy steps.
      length: steps times learning rate, on gradients of unit clip norm.
      l2_clip_norm: of per-record gradients.
    """

    sampling_prob: float
    steps: int
    length: float
    l2_clip_norm: float


@joblib.Memory(tasks.cache_dir() / "calibration", verbose=0).cache
def noise_multiplier(epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Standard deviation of the noise on a sum of unit-norm gradients; kept on disk, since it takes seconds."""
    plan = _config(sampling_prob, steps, epsilon=epsilon, delta=delta).plan
    return float(plan.dp_event.event.event.noise_multiplier)


def _config(sampling_prob: float, steps: int, **budget: Any) -> BandMFExecutionPlanConfig:
    """jax_privacy's DP-SGD (one band is no correlation) on rescaled gradients, hence of sensitivity 1."""
    unset = {"epsilon": None, "delta": None, "noise_multiplier": None}
    return BandMFExecutionPlanConfig(
        iterations=steps, strategy=np.ones(1), sampling_prob=sampling_prob, noise_seed=0, **(unset | budget)
    )


def train(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    *,
    optimizer: str,
    adapter: str,
    settings: Settings,
    epsilon: float,
    delta: float,
) -> Any:
    """Fine-tunes `params` on the private records under (epsilon, delta)-DP; returns the last iterate.

    Formal guarantee: that of jax_privacy's DP-SGD, zero-out relation, record level.
    """
    split, merge = ADAPTERS[adapter]
    adapter_key, noise_key = jax.random.split(jax.random.key(seed))
    trainable, frozen = split(adapter_key, params)
    sigma = noise_multiplier(epsilon, delta, settings.sampling_prob, settings.steps)
    plan = _config(settings.sampling_prob, settings.steps, noise_multiplier=sigma).plan
    count = len(private["label"])
    expected = settings.sampling_prob * count
    state = (
        OPTIMIZERS[optimizer].init(trainable),
        noise_addition.gaussian_privatizer(stddev=sigma, prng_key=noise_key).init(trainable),
    )
    records = jax.tree.map(jnp.asarray, private)
    for index in plan.batch_selection_strategy.batch_iterator(count, rng=np.random.default_rng(seed)):
        total = _clipped_sum(trainable, frozen, records, index, settings.l2_clip_norm, loss_fn, merge, expected)
        rate = settings.length / settings.steps
        trainable, state = _noisy_step(trainable, state, total, sigma, expected, rate, optimizer)
    return jax.block_until_ready(merge(trainable, frozen))


def _clipped_sum(trainable, frozen, records, index, l2_clip_norm, loss_fn, merge, expected):
    """Sum over one Poisson batch, in blocks of one size so that nothing is compiled twice."""
    block = min(_BLOCK, int(2 ** np.ceil(np.log2(max(1.2 * expected, 16)))))
    blocks = batch_selection.split_and_pad_global_batch(np.asarray(index), block)
    sums = [_block_sum(trainable, frozen, records, part, l2_clip_norm, loss_fn, merge) for part in blocks]
    return functools.reduce(_add, sums)


@jax.jit
def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnames=("loss_fn", "merge"))
def _block_sum(trainable, frozen, records, index, l2_clip_norm, loss_fn, merge):
    batch = jax.tree.map(lambda x: x[jnp.maximum(index, 0)], records)
    clipped = clipped_grad(
        lambda trainable, record: loss_fn(merge(trainable, frozen), record),
        batch_argnums=1,
        keep_batch_dim=False,
        l2_clip_norm=l2_clip_norm,
        rescale_to_unit_norm=True,
    )
    return clipped(trainable, batch, is_padding_example=index < 0)


@functools.partial(jax.jit, static_argnames="optimizer")
def _noisy_step(trainable, state, total, sigma, expected, learning_rate, optimizer):
    optimizer_state, noise_state = state
    privatizer = noise_addition.gaussian_privatizer(stddev=sigma)
    noisy, noise_state = privatizer.update(total, noise_state)
    gradient = jax.tree.map(lambda g: g / expected, noisy)
    updates, optimizer_state = OPTIMIZERS[optimizer].update(gradient, optimizer_state, trainable)
    trainable = jax.tree.map(lambda p, u: p - learning_rate * u, trainable, updates)
    return trainable, (optimizer_state, noise_state)
