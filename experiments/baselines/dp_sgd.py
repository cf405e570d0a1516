"""The baselines that take many noisy steps: DP-SGD, DP-Adam and full-batch DP-GD, with jax_privacy.

Poisson sampling, per-record clipping and noise are jax_privacy's, calibrated by dp_accounting's PLD accountant under
the zero-out relation (REPLACE_SPECIAL), which is also qexp_jax's default. Abadi et al., arXiv:1607.00133.

Steps are on the mean gradient divided by its clip norm, so that `length = steps * learning_rate` bounds how far the
noiseless parameters can travel (per coordinate for Adam, about): the setting that matters most.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import optax
from jax_privacy import clipped_grad, noise_addition
from jax_privacy.experimental.execution_plan import BandMFExecutionPlanConfig

from experiments.baselines.adapters import ADAPTERS
from experiments.benchmark import tasks
from experiments.data.splits import Records
from qexp_jax.model.convolutions import as_products

OPTIMIZERS = {"sgd": optax.identity(), "adam": optax.scale_by_adam()}
_BLOCK = 32  # more gradients at a time leave the cache, so that seeds or settings side by side would gain nothing


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


class _Scales(NamedTuple):
    """Numbers of a step: clip norm, noise on the sum of unit-norm gradients, expected batch, rate."""

    l2_clip_norm: float
    sigma: float
    expected: float
    learning_rate: float


def noise_multiplier(epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Standard deviation of the noise on a sum of unit-norm gradients; kept on disk, since it takes seconds."""
    # When it is asked for: at import a folder that cannot be made would end any script with a traceback.
    return joblib.Memory(tasks.cache_dir() / "calibration", verbose=0).cache(_calibrated)(
        epsilon, delta, sampling_prob, steps
    )


def _calibrated(epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
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
    step = functools.partial(
        _noisy_step,
        records=jax.tree.map(jnp.asarray, private),
        frozen=frozen,
        scales=_Scales(settings.l2_clip_norm, sigma, expected, settings.length / settings.steps),
        loss_fn=loss_fn,
        merge=merge,
        optimizer=optimizer,
    )
    for index in plan.batch_selection_strategy.batch_iterator(count, rng=np.random.default_rng(seed)):
        trainable, state = step(trainable, state, _padded(index, expected), len(index))
    return jax.block_until_ready(merge(trainable, frozen))


def _padded(index, expected):
    """A Poisson batch in room for almost any, so that one size is compiled; -1 is no record."""
    room = max(len(index), expected + 6 * math.sqrt(expected))
    return np.pad(index, (0, _BLOCK * math.ceil(room / _BLOCK) - len(index)), constant_values=-1)


@functools.partial(jax.jit, static_argnames=("loss_fn", "merge", "optimizer"))
def _noisy_step(trainable, state, index, count, records, frozen, scales, loss_fn, merge, optimizer):
    optimizer_state, noise_state = state
    total = _clipped_sum(trainable, frozen, records, index, count, scales.l2_clip_norm, loss_fn, merge)
    noisy, noise_state = noise_addition.gaussian_privatizer(stddev=scales.sigma).update(total, noise_state)
    gradient = jax.tree.map(lambda g: g / scales.expected, noisy)
    updates, optimizer_state = OPTIMIZERS[optimizer].update(gradient, optimizer_state, trainable)
    trainable = jax.tree.map(lambda p, u: p - scales.learning_rate * u, trainable, updates)
    return trainable, (optimizer_state, noise_state)


def _clipped_sum(trainable, frozen, records, index, count, l2_clip_norm, loss_fn, merge):
    """Sum over the first `count` of `index`, in blocks whose gradients stay in cache."""
    loss_fn = as_products(loss_fn)  # in a loop, as ours, XLA's convolutions on CPUs are slow
    clipped = clipped_grad(
        lambda trainable, record: loss_fn(merge(trainable, frozen), record),
        batch_argnums=1,
        keep_batch_dim=False,
        l2_clip_norm=l2_clip_norm,
        rescale_to_unit_norm=True,
    )

    def add_block(i, total):
        part = jax.lax.dynamic_slice_in_dim(index, i * _BLOCK, _BLOCK)
        batch = jax.tree.map(lambda x: x[jnp.maximum(part, 0)], records)
        return jax.tree.map(jnp.add, total, clipped(trainable, batch, is_padding_example=part < 0))

    blocks = (count + _BLOCK - 1) // _BLOCK
    return jax.lax.fori_loop(0, blocks, add_block, jax.tree.map(jnp.zeros_like, trainable))
