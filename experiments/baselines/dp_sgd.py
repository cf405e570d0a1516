"""The baselines that take many noisy steps: DP-SGD, DP-Adam and full-batch DP-GD, with jax_privacy.

Poisson sampling, per-record clipping and noise are jax_privacy's, calibrated by dp_accounting's PLD accountant under
the zero-out relation (REPLACE_SPECIAL), which is also qexp_jax's default. Abadi et al., arXiv:1607.00133.

Steps are on the mean gradient divided by its clip norm, so that `length = steps * learning_rate` bounds how far the
noiseless parameters can travel (per coordinate for Adam, about): the setting that matters most.

Relatives that clip in other coordinates, or that step along public gradients too, are `Hooks` into the same steps:
`recipes`, `preconditioning`, `public_gradients`, `selection`.
"""

import functools
import math
from collections.abc import Callable, Iterator
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


def _tell_nothing(trainable: Any, step: int) -> Any:
    return ()


def _unchanged(gradient: Any, public: Any) -> Any:
    return gradient


class Hooks(NamedTuple):
    """What a relative of DP-SGD changes of a step; by default nothing.

    `before` and `after` are compiled once for all runs, so they are functions of a module; what differs between runs
    reaches them as `inform`'s data.

    Formal guarantee: that of DP-SGD, whatever the hooks are, as long as `inform` sees no private record. What `before`
    returns for a record is clipped; what `after` sees, and `trainable`, is already released.

    Attributes:
      inform: `(trainable, step) -> public`, a pytree of arrays.
      before: `(gradient, public) -> coordinates` of one record, in which gradients are clipped, summed and made noisy.
      after: `(direction, public) -> direction`, of the noisy mean in units of the clip norm.
    """

    inform: Callable[[Any, int], Any] = _tell_nothing
    before: Callable[[Any, Any], Any] = _unchanged
    after: Callable[[Any, Any], Any] = _unchanged


PLAIN = Hooks()


class _Scales(NamedTuple):
    """Numbers of a step: clip norm, noise on the sum of unit-norm gradients, expected batch, rate."""

    l2_clip_norm: float
    sigma: float
    expected: float
    learning_rate: float


def noise_multiplier(epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Standard deviation of the noise on a sum of unit-norm gradients; kept on disk, since it takes seconds."""
    return on_disk(_calibrated)(epsilon, delta, sampling_prob, steps)


def on_disk(calibration: Callable[..., float]) -> Callable[..., float]:
    """The same function, its results kept in the cache."""
    # When it is asked for: at import a folder that cannot be made would end any script with a traceback.
    return joblib.Memory(tasks.cache_dir() / "calibration", verbose=0).cache(calibration)


def _calibrated(epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    plan = _config(sampling_prob, steps, epsilon=epsilon, delta=delta).plan
    return float(plan.dp_event.event.event.noise_multiplier)


def _config(sampling_prob: float, steps: int, **budget: Any) -> BandMFExecutionPlanConfig:
    """jax_privacy's DP-SGD (one band is no correlation) on rescaled gradients, hence of sensitivity 1."""
    unset = {"epsilon": None, "delta": None, "noise_multiplier": None}
    return BandMFExecutionPlanConfig(
        iterations=steps, strategy=np.ones(1), sampling_prob=sampling_prob, noise_seed=0, **(unset | budget)
    )


def privacy_event(settings: Settings, sigma: float) -> Any:
    """dp_accounting's event of `descend`."""
    return _config(settings.sampling_prob, settings.steps, noise_multiplier=sigma).plan.dp_event


def last(iterates: Iterator[Any]) -> Any:
    """The last of the iterates."""
    final = next(iterates)
    for iterate in iterates:
        final = iterate
    return final


def train(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    *,
    settings: Settings,
    epsilon: float,
    delta: float,
    **how: Any,
) -> Any:
    """Fine-tunes `params` on the private records under (epsilon, delta)-DP; returns the last iterate.

    Formal guarantee: that of jax_privacy's DP-SGD, zero-out relation, record level.

    Args:
      seed: of adapter, sampling and noise.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      settings: hyperparameters.
      epsilon: > 0.
      delta: in (0, 1).
      **how: optimizer, adapter, hooks and summary, see `descend`.
    """
    sigma = noise_multiplier(epsilon, delta, settings.sampling_prob, settings.steps)
    return descend(seed, loss_fn, params, private, settings=settings, sigma=sigma, **how)


def descend(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    *,
    settings: Settings,
    sigma: float,
    optimizer: str = "sgd",
    adapter: str = "all",
    hooks: Hooks = PLAIN,
    summary: Callable[[Iterator[Any]], Any] = last,
) -> Any:
    """`train` with noise that was calibrated elsewhere; two releases of the same records need two seeds.

    Formal guarantee: that of `privacy_event(settings, sigma)`, zero-out relation, record level.

    Args:
      seed, loss_fn, params, private, settings: see `train`.
      sigma: standard deviation of the noise on a sum of unit-norm gradients.
      optimizer: key of `OPTIMIZERS`.
      adapter: key of `ADAPTERS`.
      hooks: what is changed of a step.
      summary: iterates of the trainable parameters -> those returned.
    """
    split, merge = ADAPTERS[adapter]
    adapter_key, noise_key = jax.random.split(jax.random.key(seed))
    trainable, frozen = split(adapter_key, params)
    privatizer = noise_addition.gaussian_privatizer(stddev=sigma, prng_key=noise_key)
    state = (OPTIMIZERS[optimizer].init(trainable), privatizer.init(trainable))
    count = len(private["label"])
    expected = settings.sampling_prob * count
    step = functools.partial(
        _noisy_step,
        records=jax.tree.map(jnp.asarray, private),
        frozen=frozen,
        scales=_Scales(settings.l2_clip_norm, sigma, expected, settings.length / settings.steps),
        loss_fn=loss_fn,
        merge=merge,
        optimizer=optimizer,
        before=hooks.before,
        after=hooks.after,
    )
    iterates = _iterates(step, hooks.inform, trainable, state, _batches(seed, count, settings), expected)
    return jax.block_until_ready(merge(summary(iterates), frozen))


def _batches(seed: int, count: int, settings: Settings) -> Iterator[np.ndarray]:
    """Poisson samples, one for each step."""
    # The sampling is the same whatever the noise.
    plan = _config(settings.sampling_prob, settings.steps, noise_multiplier=1.0).plan
    return plan.batch_selection_strategy.batch_iterator(count, rng=np.random.default_rng(seed))


def _iterates(
    step: Callable, inform: Callable, trainable: Any, state: Any, batches: Iterator[np.ndarray], expected: float
) -> Iterator[Any]:
    """The trainable parameters after each step."""
    for number, index in enumerate(batches):
        public = inform(trainable, number)
        trainable, state = step(trainable, state, _padded(index, expected), len(index), public)
        yield trainable


def _padded(index: np.ndarray, expected: float) -> np.ndarray:
    """A Poisson batch in room for almost any, so that one size is compiled; -1 is no record."""
    room = max(len(index), expected + 6 * math.sqrt(expected))
    return np.pad(index, (0, _BLOCK * math.ceil(room / _BLOCK) - len(index)), constant_values=-1)


@functools.partial(jax.jit, static_argnames=("loss_fn", "merge", "optimizer", "before", "after"))
def _noisy_step(
    trainable: Any,
    state: Any,
    index: jax.Array,
    count: jax.Array,
    public: Any,
    records: Any,
    frozen: Any,
    scales: _Scales,
    loss_fn: Callable,
    merge: Callable,
    optimizer: str,
    before: Callable,
    after: Callable,
) -> tuple[Any, Any]:
    optimizer_state, noise_state = state
    total = _clipped_sum(
        trainable, frozen, records, index, count, scales.l2_clip_norm, loss_fn, merge, lambda g: before(g, public)
    )
    noisy, noise_state = noise_addition.gaussian_privatizer(stddev=scales.sigma).update(total, noise_state)
    direction = after(jax.tree.map(lambda g: g / scales.expected, noisy), public)
    updates, optimizer_state = OPTIMIZERS[optimizer].update(direction, optimizer_state, trainable)
    trainable = jax.tree.map(lambda p, u: p - scales.learning_rate * u, trainable, updates)
    return trainable, (optimizer_state, noise_state)


def _clipped_sum(
    trainable: Any,
    frozen: Any,
    records: Any,
    index: jax.Array,
    count: jax.Array | int,
    l2_clip_norm: jax.Array | float,
    loss_fn: Callable,
    merge: Callable,
    coordinates: Callable[[Any], Any] = lambda gradient: gradient,
) -> Any:
    """Sum over the first `count` of `index`, in blocks whose gradients stay in cache."""
    loss_fn = as_products(loss_fn)  # in a loop, as ours, XLA's convolutions on CPUs are slow
    clipped = clipped_grad(
        lambda trainable, record: loss_fn(merge(trainable, frozen), record),
        batch_argnums=1,
        keep_batch_dim=False,
        l2_clip_norm=l2_clip_norm,  # type: ignore[arg-type]  # a traced number, so that one step serves all clip norms
        rescale_to_unit_norm=True,
        pre_clipping_transform=coordinates,
    )

    def add_block(i, total):
        part = jax.lax.dynamic_slice_in_dim(index, i * _BLOCK, _BLOCK)
        batch = jax.tree.map(lambda x: x[jnp.maximum(part, 0)], records)
        return jax.tree.map(jnp.add, total, clipped(trainable, batch, is_padding_example=part < 0))

    blocks = (count + _BLOCK - 1) // _BLOCK
    return jax.lax.fori_loop(0, blocks, add_block, jax.tree.map(jnp.zeros_like, trainable))
