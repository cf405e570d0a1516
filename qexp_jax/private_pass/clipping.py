"""The private pass: `S = sum_i vbar_i`, the only function of the library that reads private records.

Each unit's projected gradient is clipped **in the whitened norm, after projecting**: `v_i = R^{-1} P^T grad loss_i`
becomes `vbar_i = v_i min(1, C/|v_i|)`. So |vbar_i| <= C, and S moves by at most `sensitivity(C, relation)` between
neighbours: all that the guarantee of `mechanism` rests on (T1). An L2 clip of the gradient to C, with noise shaped by
H, would have sensitivity C/sqrt(lambda_min(H)) instead.

**In floating point.** What is bounded is what is *added*, not what was meant:

* A unit adds whole numbers, its clipped coordinates (`precision.coordinates`) in steps of a public grid, and integers
  add up exactly: no other unit, and no order, decides what of it is rounded away. What whitening or projecting takes
  away is no coordinate, and never reaches the sum.
* Gradients that are outer products are added in floats, 32 units at a time, and each such sum is rounded to the grid
  once. A unit decides the rounding of the 31 others of its place alone. Where units have no places of their own
  (`ADD_OR_REMOVE_ONE`, under which one unit less moves all others), pass `exact`, and each is rounded by itself.
* Norms are bounds from above, of numbers that are scaled before they are squared.
* What rounding can add to a unit's part, `rounding` of C at most, is taken off the clip norm beforehand: units are
  clipped at C (1 - rounding), and C is what holds.

The grid, the places and the bound are ours.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.data.records import LossFn, Params, Record, microbatches, num_records, vary
from qexp_jax.model.factored_gradients import Outer, Rows, grouped_sums, whole
from qexp_jax.model.gradients import Mode, at_a_time, gradient_rows
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics import integers
from qexp_jax.numerics.integers import Words
from qexp_jax.numerics.rounding import UNIT
from qexp_jax.quadratic.precision import Precision, coordinates, spread, whiten_sum

STEPS = 2**20  # of the grid in the clip norm
_TOGETHER = 32  # outer products that one float sum takes
_OF_A_PRODUCT = 8 * UNIT  # rounding of a share, and of a coordinate times it


class ClipInfo(NamedTuple):
    """**Not private**: counts over all units, for debugging on open data only."""

    num_units: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array


def clip(
    gradient: jax.Array, norm: jax.Array, l2_clip_norm: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clips one gradient whose (whitened) norm is given.

    | gradient                              | result          |
    | ------------------------------------- | --------------- |
    | norm <= C                             | gradient        |
    | norm > C                              | gradient C/norm |
    | any NaN or inf, or the norm is inf    | 0               |
    | 0                                     | 0               |

    Formal guarantee: the result has norm at most C, but for the rounding of one product, whatever the gradient is.

    Returns:
      The clipped vector, whether it was clipped, whether it was finite.
    """
    factor, was_clipped, finite = _share(norm, l2_clip_norm)
    # A select, not a product: 0 * NaN is NaN.
    return jnp.where(finite, gradient * factor, 0), was_clipped, finite


def _share(norm: jax.Array, l2_clip_norm: jax.Array | float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is kept of a gradient that is finite, whether that is less than all, and whether it is finite."""
    finite = jnp.isfinite(norm)
    # A norm of zero divides nothing; all its gradient is kept.
    factor = jnp.minimum(1, l2_clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return jnp.where(finite, factor, 0), finite & (norm > l2_clip_norm), finite


def step_size(precision: Precision, l2_clip_norm: jax.Array | float) -> jax.Array:
    """What one step of the grid is worth in the coordinates of `unit_sum`."""
    largest, _ = spread(precision)
    return largest * jnp.asarray(l2_clip_norm, largest.dtype) / STEPS


@functools.partial(jax.jit, static_argnames="exact")
def rounding(precision: Precision, exact: bool = True) -> jax.Array:
    """A bound, in units of C, on what rounding adds to how far one unit moves the whitened sum.

    Args:
      precision: public; the more its eigenvalues differ, the more the rounding of one direction weighs in another.
      exact: whether each unit is rounded by itself, as all are that are not `Outer`.
    """
    largest, smallest = spread(precision)
    # Half a step in each coordinate; of sums that are rounded, with the unit and without it.
    grid = math.sqrt(precision.num_coordinates) / (2 * STEPS)
    if exact:
        return largest / smallest * (grid + _OF_A_PRODUCT)
    # 32 terms of norm C at most, and as many roundings of each, with the unit and without it.
    return largest / smallest * (2 * grid + _OF_A_PRODUCT + 2 * _TOGETHER**2 * UNIT)


def unit_sum(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    precision: Precision,
    units: Record,
    *,
    l2_clip_norm: jax.Array | float,
    mask: jax.Array | None = None,
    microbatch_size: int | None = None,
    mode: Mode = "auto",
    axis_name: str | None = None,
    exact: bool = False,
) -> tuple[Words, ClipInfo]:
    """The exact sum over units of their clipped gradients, in steps of a grid, in microbatches.

    Args:
      loss_fn: loss of one unit (`records.unit_loss` for units of several records). It sees no other unit, which is
        what isolates them from each other.
      params: theta_t, where gradients are taken: public, or an earlier release.
      subspace: public.
      precision: public.
      units: pytree with leading axis n.
      l2_clip_norm: C > 0, public, in the whitened norm.
      mask: bool (n,); False contributes zero.
      microbatch_size: at most so many units per step of the scan; memory is that of one microbatch, whatever n is. By
        default `gradients.at_a_time`.
      mode: see `gradients.projected_gradients`.
      axis_name: with it, `units` are one device's, and the sum is over all devices.
      exact: each unit is rounded by itself, for a relation under which a unit less moves the others to other places.

    Returns:
      The sum (c,) in the precision's coordinates, `step_size` each, **not private** without noise, and `ClipInfo`, not
      private at all.

    Formal guarantee: between neighbouring datasets the sum, whitened in real arithmetic, differs by at most
    `sensitivity(C, relation)` in Euclidean norm, rounding included, under the assumption of `rounding.of_sum` on
    matrix products and provided that a unit's gradient does not depend on other units. Under ADD_OR_REMOVE_ONE that
    asks for `exact`. A unit whose gradient is not finite contributes zero; nothing raises or branches on a private
    value.
    """
    n = num_records(units)
    size = min(microbatch_size or at_a_time(loss_fn, params, subspace, units, formed=exact), max(1, n))
    batches, masks = microbatches(units, size, mask)

    def step(carry: tuple[Words, ClipInfo], batch: tuple[Record, jax.Array]) -> tuple[tuple[Words, ClipInfo], None]:
        total, info = carry
        records, keep = batch
        rows = gradient_rows(loss_fn, params, subspace, records, mode=mode, axis_name=axis_name)
        parts, norms = coordinates(precision, rows, 1 / jnp.asarray(l2_clip_norm, subspace.layout.dtype))
        parts = [whole(parts)] if exact else parts
        # Rounding has its part of C beforehand, so that C is what holds.
        kept = 1 - rounding(precision, exact or not any(isinstance(x, Outer) for x in parts))
        shares, was_clipped, finite = _share(norms, jnp.maximum(kept, 0))
        counts = ClipInfo(jnp.sum(keep), jnp.sum(keep & was_clipped), jnp.sum(keep & ~finite))
        added = _in_steps(parts, shares / step_size(precision, l2_clip_norm), keep & finite)
        return (integers.add(total, added), jax.tree.map(jnp.add, info, counts)), None

    # A zero of the mask has the mask's sharding, which the carry of a scan must have from the start.
    zero = jnp.sum(masks[:0], dtype=int)
    zeros = integers.zeros(precision.num_coordinates), ClipInfo(zero, zero, zero)
    result, _ = jax.lax.scan(step, vary(zeros, axis_name), (batches, masks))
    total, info = result if axis_name is None else jax.lax.psum(result, axis_name)
    return integers.normalised(total), info


def _in_steps(parts: Rows, weights: jax.Array, keep: jax.Array) -> Words:
    """The sum of the rows times `weights` (m,), in whole steps; of rows that are not kept nothing is looked at."""

    def total(part: Any) -> Words:
        if isinstance(part, Outer):
            return integers.total_of_floats(grouped_sums(part, weights, keep, _TOGETHER))
        # A select, not a product: 0 * NaN is NaN.
        steps = jnp.where(keep[:, None], part * weights[:, None], 0)
        return integers.total(jnp.rint(steps).astype(jnp.int32))

    return Words(*(jnp.concatenate(x) for x in zip(*map(total, parts), strict=True)))


def clipped_sum(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    precision: Precision,
    units: Record,
    *,
    l2_clip_norm: jax.Array | float,
    **options: Any,
) -> tuple[jax.Array, ClipInfo]:
    """`unit_sum`, whitened: S (k,), **not private** without noise, and `ClipInfo`, not private at all.

    Args:
      loss_fn: loss of one unit.
      params: theta_t, where gradients are taken: public, or an earlier release.
      subspace: public.
      precision: public.
      units: pytree with leading axis n.
      l2_clip_norm: C > 0, public, in the whitened norm.
      **options: of `unit_sum`.

    Formal guarantee: that of `unit_sum`, and the rounding of S to floats on top, up to 2^-23 |S| for float32. Noise
    that is added before that rounding pays nothing for it: `mechanism.noisy_whitened_sum`.
    """
    total, info = unit_sum(loss_fn, params, subspace, precision, units, l2_clip_norm=l2_clip_norm, **options)
    return whiten_sum(precision, total, step_size(precision, l2_clip_norm)), info
