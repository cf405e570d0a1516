"""The private pass of a hardened release: each unit alone, in integers of bounded norm; see `hardened`."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, is_key, num_records
from qexp_jax.model.factored_gradients import norms
from qexp_jax.model.gradients import Mode, projected_gradients
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics.compilation import compiled
from qexp_jax.privacy.discrete import INTEGER_CLIP_NORM
from qexp_jax.private_pass.clipping import ClipInfo, clip
from qexp_jax.quadratic.precision import Precision, whiten

_MOST_UNITS = 2**40  # sums over units stay below 2^63


@functools.partial(compiled, static_argnames=("loss_fn", "mode"))
def unit_steps(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    precision: Precision,
    unit: Record,
    l2_clip_norm: float,
    mode: Mode = "reverse",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One unit's whitened, clipped gradient in steps of the grid; one program for all units, whatever their number.

    Args:
      loss_fn: loss of one unit.
      params: where gradients are taken: public, or an earlier release.
      subspace: public.
      precision: public.
      unit: without a leading axis.
      l2_clip_norm: C > 0, public, in the whitened norm.
      mode: see `gradients.projected_gradients`.

    Returns:
      int32 (k,), **not private**; whether it was clipped; whether it was finite.
    """
    record = jax.tree.map(lambda x: jnp.asarray(x)[None], unit)
    whitened = whiten(precision, projected_gradients(loss_fn, params, subspace, record, mode=mode)[0])
    clipped, was_clipped, finite = clip(whitened, norms([whitened[None]])[0], l2_clip_norm)
    steps = jnp.round(clipped * (INTEGER_CLIP_NORM / l2_clip_norm))
    steps = jnp.nan_to_num(steps, nan=0.0, posinf=0.0, neginf=0.0)
    return jnp.clip(steps, -INTEGER_CLIP_NORM, INTEGER_CLIP_NORM).astype(jnp.int32), was_clipped, finite


def within_norm(steps: np.ndarray) -> np.ndarray:
    """Rows of norm at most 2^20, exactly: a longer row is multiplied by 2^20 / (floor(norm) + 1), towards zero.

    Args:
      steps: integers (m, k), each at most 2^20 in absolute value, k <= 2^22.

    >>> within_norm(np.array([[3, -4], [2**20, 2**20]])).tolist()
    [[3, -4], [741454, 741454]]
    """
    steps = np.asarray(steps, np.int64)
    squares = np.einsum("ij,ij->i", steps, steps)
    for i in np.flatnonzero(squares > INTEGER_CLIP_NORM**2):
        longer = math.isqrt(int(squares[i])) + 1
        steps[i] = np.sign(steps[i]) * (np.abs(steps[i]) * INTEGER_CLIP_NORM // longer)
    return steps


def integer_sum(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    precision: Precision,
    units: Record,
    *,
    l2_clip_norm: float,
    microbatch_size: int | None = None,
    mode: Mode = "reverse",
) -> tuple[np.ndarray, ClipInfo]:
    """The exact sum over units of their clipped gradients in steps of the grid.

    Args:
      loss_fn: loss of one unit.
      params: where gradients are taken: public, or an earlier release.
      subspace: public.
      precision: public.
      units: pytree with leading axis n < 2^40.
      l2_clip_norm: C > 0, public, in the whitened norm; 2^20 steps.
      microbatch_size: units whose integers are held at a time, by default 32.
      mode: see `gradients.projected_gradients`.

    Returns:
      int64 (k,), **not private** without noise, and `ClipInfo`, not private at all. Sums of several parts of the
      units, from any devices, add up to the same integers.

    Formal guarantee: between neighbouring datasets the sum differs by an integer vector of norm at most 2^20 (2^21 for
    replace-one), exactly, provided that `unit_steps` depends on its unit and on public values alone. A unit whose
    gradient is not finite contributes zero.
    """
    n = num_records(units)
    if n > _MOST_UNITS:
        raise ValueError(f"Expected at most {_MOST_UNITS} units, found {n}.")
    units = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), units)
    total = np.zeros(subspace.dim, np.int64)
    counts = np.zeros(2, np.int64)
    size = microbatch_size or 32
    for start in range(0, n, size):
        members = [jax.tree.map(operator.itemgetter(i), units) for i in range(start, min(n, start + size))]
        # All are launched before the first is waited for.
        launched = [unit_steps(loss_fn, params, subspace, precision, unit, l2_clip_norm, mode) for unit in members]
        steps, clipped, finite = (np.stack([np.asarray(x) for x in part]) for part in zip(*launched, strict=True))
        total += np.sum(within_norm(steps), axis=0)
        counts += np.sum(clipped), np.sum(~finite)
    return total, ClipInfo(*map(jnp.asarray, (n, *counts)))
