"""How much noise the public loss tolerates: theta_0 moved by it, tried at several scales on a few public records."""

import functools

import jax
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, take
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import at_a_time
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics.compilation import FEW, compiled
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic.accuracy import noise_tolerance
from qexp_jax.quadratic.averages import mean_loss
from qexp_jax.quadratic.precision import Precision
from qexp_jax.quadratic.public_curvature import Measurement

_TRIED = 512  # records that a trial takes
_DRAWS = 3  # of noise


def tolerated_noise(
    key: jax.Array, loss_fn: LossFn, params: Params, measured: Measurement, shape: Precision, share: float
) -> tuple[float, float]:
    """The largest s for which theta_0 moved by s M^{-1/2} xi costs a `share` of the loss's scale, and that cost.

    Args:
      key: public randomness: xi.
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      measured: P, and the records that losses are of.
      shape: M.
      share: of the root mean square of the records' losses.
    """
    space = measured.subspace
    losses = measured.losses[:_TRIED].astype(np.float64)
    limit = share * float(np.sqrt(np.mean(losses**2)))
    moves = _noise_moves(key, shape, space)

    # The same moves at every scale, so that the cost is a smooth function of it.
    def cost(scale):
        moved = moved_losses(loss_fn, params, space, moves, scale, measured.held_out)
        return float(np.mean(np.asarray(moved))) - float(np.mean(losses))

    return noise_tolerance(cost, limit), limit


def moves_of(space: Subspace) -> jax.ShapeDtypeStruct:
    """The shape of the moves that a trial of noise makes."""
    return jax.ShapeDtypeStruct((_DRAWS, space.dim), space.layout.dtype)


@functools.partial(compiled, few=FEW)
def _noise_moves(key: jax.Array, shape: Precision, space: Subspace) -> jax.Array:
    """M^{-1/2} xi, three times, one after the other: (3, k)."""
    keys = jax.random.split(key, _DRAWS)

    def move(key):
        noise = jax.random.normal(key, (space.dim,), space.layout.dtype)
        return precisions.color(shape, noise)

    return jax.lax.map(move, keys)


@functools.partial(compiled, static_argnums=0)
def moved_losses(
    loss_fn: LossFn, params: Params, space: Subspace, moves: jax.Array, scale: float, records: Record
) -> jax.Array:
    """Mean losses of the parameters after each of several moves, times a scale; of a few of the records."""
    records = take(records, slice(0, _TRIED))
    size = at_a_time(loss_fn, params, space, records)

    def moved_loss(move):
        moved = subspaces.displace(space, params, scale * move)
        return mean_loss(loss_fn, moved, records, microbatch_size=size)

    return jax.lax.map(moved_loss, moves)
