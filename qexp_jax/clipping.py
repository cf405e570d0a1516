"""The private pass: `S = sum_i vbar_i`, the only function of the library that reads private records.

Each unit's projected gradient is whitened, `v_i = R^{-1} P^T grad loss_i`, and clipped **in the whitened norm, after
projecting**, to `vbar_i = v_i min(1, C/|v_i|)`; whitening is linear, so that records need its norm alone and the sum is
whitened once. So |vbar_i| <= C, and S moves by at most `sensitivity(C, relation)` between neighbours: all that the
guarantee of `mechanism` rests on (T1). An L2 clip of the gradient to C, with noise shaped by H, would have sensitivity
C/sqrt(lambda_min(H)) instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation

from qexp_jax.gradients import Mode, at_a_time, gradient_rows
from qexp_jax.outer_products import weighted_sum
from qexp_jax.precision import Precision, whiten, whitened_norms
from qexp_jax.records import LossFn, Params, Record, microbatches, num_records, vary
from qexp_jax.subspace import Subspace


class ClipInfo(NamedTuple):
    """**Not private**: counts over all units, for debugging on open data only."""

    num_units: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array


def sensitivity(l2_clip_norm: float, relation: NeighboringRelation) -> float:
    """Largest |S - S'| between neighbours: C for zero-out and add/remove, 2 C for replace-one."""
    return 2 * l2_clip_norm if relation is NeighboringRelation.REPLACE_ONE else l2_clip_norm


def clip(
    gradient: jax.Array, norm: jax.Array, l2_clip_norm: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Clips one gradient whose (whitened) norm is given.

    | gradient                              | result          |
    | ------------------------------------- | --------------- |
    | norm <= C                             | gradient        |
    | norm > C                              | gradient C/norm |
    | any NaN or inf, or the norm overflows | 0               |
    | 0                                     | 0               |

    Formal guarantee: the result has norm at most C, up to rounding, whatever the gradient is.

    Returns:
      The clipped vector, whether it was clipped, whether it was finite.
    """
    factor, was_clipped, finite = _share(norm, l2_clip_norm)
    # A select, not a product: 0 * NaN is NaN.
    return jnp.where(finite, gradient * factor, 0), was_clipped, finite


def _share(norm, l2_clip_norm):
    """What is kept of a gradient that is finite, whether that is less than all, and whether it is finite."""
    finite = jnp.isfinite(norm)
    factor = jnp.minimum(1, l2_clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return jnp.where(finite, factor, 0), finite & (norm > l2_clip_norm), finite


def clipped_sum(
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
) -> tuple[jax.Array, ClipInfo]:
    """Sum of whitened, clipped gradients over units, in microbatches.

    Args:
      loss_fn: loss of one unit (`records.unit_loss` for units of several records). It sees no other unit, which is
        what isolates them from each other.
      params: the anchor theta_t: public, or an earlier release.
      subspace: public.
      precision: public.
      units: pytree with leading axis n.
      l2_clip_norm: C > 0, public, in the whitened norm.
      mask: bool (n,); False contributes zero.
      microbatch_size: at most so many units per step of the scan; memory is that of one microbatch, whatever n is. By
        default `gradients.at_a_time`.
      mode: see `gradients.projected_gradients`.
      axis_name: with it, `units` are one device's, and the sum is over all devices.

    Returns:
      S (k,), **not private** without noise, and `ClipInfo`, not private at all.

    Formal guarantee: between neighbouring datasets S differs by at most `sensitivity(C, relation)` in Euclidean norm,
    up to floating-point rounding. A unit whose gradient is not finite contributes zero; nothing raises or branches on a
    private value.
    """
    n = num_records(units)
    size = min(microbatch_size or at_a_time(loss_fn, params, subspace, units), max(1, n))
    batches, masks = microbatches(units, size, mask)

    def step(carry, batch):
        total, info = carry
        records, keep = batch
        rows = gradient_rows(loss_fn, params, subspace, records, mode=mode, axis_name=axis_name)
        shares, was_clipped, finite = _share(whitened_norms(precision, rows), l2_clip_norm)
        counts = ClipInfo(jnp.sum(keep), jnp.sum(keep & was_clipped), jnp.sum(keep & ~finite))
        total = total + weighted_sum(rows, shares, keep & finite)
        return (total, jax.tree.map(jnp.add, info, counts)), None

    zeros = jnp.zeros(subspace.dim, subspace.layout.dtype), ClipInfo(*[jnp.sum(masks[:0], dtype=int)] * 3)
    result, _ = jax.lax.scan(step, vary(zeros, axis_name), (batches, masks))
    total, info = result if axis_name is None else jax.lax.psum(result, axis_name)
    return whiten(precision, total), info
