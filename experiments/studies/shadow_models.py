"""Many models fine-tuned side by side, each on the records of a pool that its coin flips include."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records
from qexp_jax import NeighboringRelation, clipping, mechanism, plan, precision, privacy
from qexp_jax import subspace as subspaces
from qexp_jax.fine_tuning import one_round, rounds

RELATION = NeighboringRelation.ADD_OR_REMOVE_ONE
BATCH = 8  # shadow models at a time


@functools.partial(jax.jit, static_argnames=("loss_fn", "learning_rate", "steps"))
def trained(
    params: Any,
    pool: Records,
    included: jax.Array,
    loss_fn: Callable[[Any, Any], jax.Array],
    learning_rate: float,
    steps: int,
) -> Any:
    """Parameters after full-batch AdamW, without privacy, along a leading axis.

    Args:
      params: before the first step.
      pool: (pool, ...) records.
      included: (shadows, pool) bool, the records that each model sees.
      loss_fn: of one record.
      learning_rate: of AdamW.
      steps: of AdamW.
    """
    optimizer = optax.adamw(learning_rate)

    def train(mask: jax.Array) -> Any:
        def mean_loss(params: Any) -> jax.Array:
            losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, pool)
            return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask)

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            params, inner = state
            updates, inner = optimizer.update(jax.grad(mean_loss)(params), inner, params)
            return (optax.apply_updates(params, updates), inner), None

        (last, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return last

    return jax.lax.map(train, included, batch_size=BATCH)


class _PublicSide(NamedTuple):
    """The arrays of a plan that a round reads."""

    subspace: Any
    estimate: Any
    preconditioners: Any


def released(
    key: jax.Array, pretrained: Pretrained, pool: Records, included: np.ndarray, epsilon: float, delta: float
) -> Any:
    """What `qexp_jax.fine_tune` releases, with one public plan and its rounds for all, along a leading axis.

    Args:
      key: of the noise of all models.
      pretrained: where they start, and the public records.
      pool: (pool, ...) records.
      included: (shadows, pool) bool, the records that each model sees; half of the pool is the public count.
      epsilon: of each release.
      delta: of each release.
    """
    loss_fn = pretrained.model.loss_fn
    public = pretrained.split.public
    layout = subspaces.layout_of(pretrained.params)
    start = subspaces.working(layout, pretrained.params)
    num_units = included.shape[1] // 2
    mu = privacy.mu_from_budget(epsilon, delta)
    made = plan.make_plan(
        jax.random.key(0), loss_fn, start, public, loss_fn, public,
        num_units=num_units, noise_multiplier=privacy.noise_multiplier(mu, RELATION),
    )  # fmt: skip
    round_of = functools.partial(
        _round,
        loss_fn=loss_fn,
        num_units=num_units,
        num_rounds=made.rounds,
        noise_multiplier=privacy.noise_multiplier(mu / made.rounds**0.5, RELATION),
    )

    # Plan and pool are arguments, since XLA would fold constants at compile time.
    @jax.jit
    def release(noise_keys: jax.Array, included: jax.Array, public_side: _PublicSide, pool: Records) -> Any:
        def one(shadow: tuple[jax.Array, jax.Array]) -> Any:
            noise_key, mask = shadow
            state = rounds.start(layout, start, public_side.estimate, made.rounds)
            step = lambda state, key: (round_of(key, state, public_side, pool, mask), None)
            last, _ = jax.lax.scan(step, state, jax.random.split(noise_key, made.rounds))
            return last.params

        return jax.lax.map(one, (noise_keys, included), batch_size=BATCH)

    public_side = _PublicSide(made.subspace, made.estimate, made.preconditioners)
    return release(jax.random.split(key, len(included)), included, public_side, pool)


def _round(
    key: jax.Array,
    state: one_round.State,
    public_side: _PublicSide,
    pool: Records,
    mask: jax.Array,
    *,
    loss_fn: Callable[[Any, Any], jax.Array],
    num_units: int,
    num_rounds: int,
    noise_multiplier: float,
) -> one_round.State:
    """One round of one model, on the records of `mask`; `noise_multiplier` is z of a round."""
    estimate = public_side.estimate
    preconditioner = plan.choose(
        state.posterior, estimate, public_side.preconditioners, noise_multiplier / num_rounds**0.5, num_units,
        num_rounds,
    ).preconditioner  # fmt: skip
    clip_norm = preconditioner.l2_clip_norm
    noise_std = clip_norm * noise_multiplier

    def sum_in(metric: Any) -> jax.Array:
        total, _ = clipping.clipped_sum(
            loss_fn, state.params, public_side.subspace, metric, pool, l2_clip_norm=clip_norm, mask=mask
        )
        return total

    leading = preconditioner.eigenvalues[:-1]
    metric = precision.spectral(preconditioner.eigenvalues[-1], estimate.directions, leading)
    total = jax.lax.cond(
        preconditioner.tuned[-1] > 0,
        lambda: sum_in(metric),
        lambda: sum_in(precision.leading(estimate.directions, leading)),
    )
    quadratic = mechanism.Quadratic(metric, total, num_units)
    noisy = mechanism.noisy_sum(key, total, noise_std)
    *_, state = one_round.follow(
        noisy, state, public_side.subspace, quadratic, noise_std, estimate, preconditioner, num_rounds
    )
    return state
