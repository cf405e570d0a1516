"""Training the pretrained model on weighted public records: post-processing of a tilt (T9).

The model is trained on the weighted loss less its unweighted slope at theta_0,

    L_w(theta) - <theta - theta_0, grad L_1(theta_0)>,

so that theta_0 is where training would stay if all weights were equal, however long or short it was pretrained: what
moves it is the shift alone. Training that does not lower this loss is undone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qexp_jax.data.records import LossFn, Params, Record, chunks, num_records, take
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.gradients import at_a_time
from qexp_jax.model.operations import count_flops
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics.compilation import compiled
from qexp_jax.numerics.keys import generator
from qexp_jax.quadratic.averages import mean_gradient

CHUNK = 4096  # public records on a device at a time, and those that say whether training worked
_MOST_STEPS = 1000
_LEAST_STEPS = 40
_MOST_PASSES = 9  # over the public records
_BATCH = 128
_LEARNING_RATE = 1e-3
_CHUNKS = 10  # of equal length, so that one program trains, and somebody sees how far it is
_FLOPS_ON_CPU = 5e11  # half a minute of a slow core
_FLOPS_ON_ACCELERATOR = 5e14


def num_steps(loss_fn: LossFn, params: Params, record: Record, num_public: int) -> int:
    """Steps of 128 records that training takes, from shapes alone: at most 1000, nine passes, and what a budget allows.

    The budget is half a minute of a slow core, more on accelerators; 0 where it allows less than 40 steps.

    Args:
      loss_fn: loss of one record.
      params: parameters or their shapes.
      record: one record or its shapes.
      num_public: public records.
    """
    # A gradient takes about three times the products of its loss.
    flops = 3 * count_flops(loss_fn, params, record, products_only=True)
    budget = _FLOPS_ON_CPU if jax.default_backend() == "cpu" else _FLOPS_ON_ACCELERATOR
    affordable = budget // max(1, flops * _BATCH)
    if affordable < _LEAST_STEPS:
        return 0
    wanted = min(_MOST_STEPS, affordable, _MOST_PASSES * num_public // _BATCH)
    return max(_CHUNKS, int(wanted) // _CHUNKS * _CHUNKS)


def num_gradients(steps: int, num_public: int) -> int:
    """Public gradients that training evaluates: the slope at theta_0, and a batch a step."""
    if steps == 0:
        return 0
    return num_public + _CHUNKS * math.prod(batch_shape(steps, num_public))


def train(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    space: Subspace,
    public: Record,
    weights: np.ndarray,
    steps: int,
    progress: Callable[[str], None] | None = None,
) -> Params:
    """The model trained on the weighted public records; `params` where that does not lower the weighted loss.

    Args:
      key: public randomness: the batches.
      loss_fn: loss of one record.
      params: pretrained, in working precision.
      space: what is tuned.
      public: public records, pytree with a leading axis.
      weights: (n,) mean one.
      steps: of Adam, with a cosine schedule.
      progress: called with the stage, ten times.
    """
    n = num_records(public)
    parts = chunks(public, CHUNK)
    slope = sum(count / n * public_slope(loss_fn, params, space, part, count) for part, count in parts)
    carry = start(space, steps)
    rng = generator(key)
    judged = rng.permutation(n)[:CHUNK]
    for i in range(_CHUNKS):
        if progress is not None:
            progress(f"tilt, step {i * steps // _CHUNKS} of {steps}")
        index = rng.integers(0, n, batch_shape(steps, n))
        batches = _batches(public, index)
        carry = train_steps(loss_fn, steps, carry, params, space, slope, batches, jnp.asarray(weights[index]))
    w, _ = carry
    # By the same records before and after: what they happen to be cancels.
    judge = functools.partial(
        _objective, loss_fn, params, space, slope, records=take(public, judged), weights=jnp.asarray(weights[judged])
    )
    before = float(judge(jnp.zeros_like(w)))
    after = float(judge(w))
    # Not a number is no improvement either.
    return _moved(params, space, w) if after < before else params


def _batches(public: Record, index: np.ndarray) -> Record:
    """The records at `index` (m, size), with two leading axes."""
    records = take(public, index.ravel())
    return jax.tree.map(lambda x: x.reshape(*index.shape, *x.shape[1:]), records)


@functools.partial(compiled, static_argnums=0)
def public_slope(
    loss_fn: LossFn, params: Params, space: Subspace, records: Record, count: jax.Array | int
) -> jax.Array:
    """Of the unweighted loss at theta_0 (k,), over the first `count` records.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      space: k directions.
      records: public, padded to the length that one program is compiled for.
      count: how many are no padding.
    """
    mask = jnp.arange(num_records(records)) < count
    size = at_a_time(loss_fn, params, space, records)
    return mean_gradient(loss_fn, params, space, records, mask=mask, microbatch_size=size)


def start(space: Subspace, steps: int) -> tuple[jax.Array, optax.OptState]:
    """No displacement w (k,), and the optimiser's state."""
    w = jnp.zeros(space.dim, space.layout.dtype)
    state = _optimizer(steps).init(w)
    return w, state


def batch_shape(steps: int, num_public: int) -> tuple[int, int]:
    """Batches that one program takes, and records in each."""
    return steps // _CHUNKS, min(_BATCH, num_public)


@functools.lru_cache(maxsize=16)
def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))


@compiled
def _moved(params: Params, space: Subspace, w: jax.Array) -> Params:
    return subspaces.displace(space, params, subspaces.without_held(space, w))


@functools.partial(compiled, static_argnums=(0, 1))
def train_steps(
    loss_fn: LossFn,
    steps: int,
    carry: Any,
    params: Params,
    space: Subspace,
    slope: jax.Array,
    batches: Record,
    weights: jax.Array,
) -> Any:
    """A step of Adam for each of the batches.

    Args:
      loss_fn: loss of one record.
      steps: of the whole schedule.
      carry: that of `start`, or of the batches before.
      params: initial parameters theta_0.
      space: k directions.
      slope: (k,) of the unweighted loss at theta_0.
      batches: public records, pytree with two leading axes (m, size).
      weights: (m, size) of them.

    Returns:
      The displacement w (k,) and the optimiser's state, as `start` gives them.
    """
    optimizer = _optimizer(steps)

    def step(carry, batch):
        w, state = carry
        records, of_records = batch
        gradient = jax.grad(_tilted_loss)(w, loss_fn, params, space, slope, records, of_records)
        updates, state = optimizer.update(subspaces.without_held(space, gradient), state, w)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, carry, (batches, weights))[0]


@functools.partial(compiled, static_argnums=0)
def _objective(
    loss_fn: LossFn,
    params: Params,
    space: Subspace,
    slope: jax.Array,
    w: jax.Array,
    records: Record,
    weights: jax.Array,
) -> jax.Array:
    """`_tilted_loss`, compiled."""
    return _tilted_loss(w, loss_fn, params, space, slope, records, weights)


def _tilted_loss(
    w: jax.Array,
    loss_fn: LossFn,
    params: Params,
    space: Subspace,
    slope: jax.Array,
    records: Record,
    weights: jax.Array,
) -> jax.Array:
    """L_w - <w, slope> of some records, at theta_0 moved by w (k,)."""
    moved = subspaces.displace(space, params, subspaces.without_held(space, w))
    losses = jax.vmap(as_products(loss_fn), in_axes=(None, 0))(moved, records)
    return jnp.mean(weights * losses) - jnp.vdot(w, slope)
