"""What public records say of the loss around theta_0: leading directions, curvature, how large gradients are.

Everything here is public, and it is deterministic given its keys. The curvature is diagonal in directions where
public gradients are large (`directions`), with their second moments on *other* public records, and equal in all other
directions; a few Hessian-vector products give its scale.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, microbatches, num_records, take
from qexp_jax.model import factored_gradients
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.factored_gradients import Rows
from qexp_jax.model.gradients import at_a_time, gradient_rows, moved_coordinates
from qexp_jax.model.subspace import Layout, Subspace
from qexp_jax.numerics.compilation import compiled
from qexp_jax.quadratic import directions as directions_of
from qexp_jax.quadratic.curvature import hessian_product
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.public_samples import samples
from qexp_jax.quadratic.tuned_space import held_where_still, orthonormal_space

_SCALED_DIRECTIONS = 8  # that the scale of the curvature is measured with
_SCALING_RECORDS = 256  # and records


class Measurement(NamedTuple):
    """The public second-order picture of a space: r leading directions, then the block of all others.

    Attributes:
      subspace: P, with orthonormal columns.
      directions: (r, k) orthonormal leading directions.
      curvature: (r + 1,) of the loss of one record.
      leading: (n, r) gradients of public units along the leading directions.
      squares: (n, r + 1) of these gradients: in each leading direction, and the mean of all others.
      dims: (r + 1,) how many coordinates each entry stands for: 1, ..., 1, k - r.
      held_out: public records that did not choose the directions; trials of noise take a few.
      losses: (n,) of these at theta_0.
    """

    subspace: Subspace
    directions: Directions | jax.Array
    curvature: np.ndarray
    leading: np.ndarray
    squares: np.ndarray
    dims: np.ndarray
    held_out: Record
    losses: np.ndarray


def measure(
    keys: Any,
    loss_fn: LossFn,
    params: Params,
    public: Record,
    clip_loss_fn: LossFn,
    public_units: Record,
    *,
    precision_rank: int,
    layout: Layout | None = None,
    subspace: Subspace | None = None,
    subspace_dim: int | None = None,
    weights: np.ndarray | None = None,
    unit_weights: np.ndarray | None = None,
) -> Measurement:
    """Measures the space that a plan may tune in.

    Args:
      keys: three, public randomness: which records, which units, which sketch.
      loss_fn: loss of one record, for the curvature.
      params: initial parameters theta_0.
      public: public records.
      clip_loss_fn: loss of one unit, whose gradients are clipped.
      public_units: public units; the same as `public` where a unit is a record.
      precision_rank: at most how many leading directions; as many public gradients.
      layout: says which leaves are tuned where no subspace does; by default all.
      subspace: public subspace; by default all parameters, or a count-sketch of them where a sample of gradients would
        not fit.
      subspace_dim: the leading public eigenspace of this dimension.
      weights: (n,) of the public records, which are drawn by them; by default equal.
      unit_weights: of the public units, the same.

    Raises:
      ValueError: if the public curvature is unusable, public losses are not finite, or public gradients vanish.
    """
    record_key, unit_key, sketch_key = keys
    curved, held_out = samples(record_key, public, weights)
    if layout is None:
        layout = subspaces.layout_of(params)
    space = orthonormal_space(sketch_key, loss_fn, params, layout, curved, public, subspace, subspace_dim)
    _finite_losses(loss_fn, params, space, curved)
    losses = _finite_losses(loss_fn, params, space, held_out)
    rank = min(precision_rank, space.dim, num_records(curved))
    directions, moved = leading_directions(loss_fn, params, curved, rank, space)
    # Second moments of the records that chose the directions would be too large: they are those of others.
    leading, totals, moved_too = _gradients(loss_fn, params, space, directions, held_out)
    space = held_where_still(space, jax.tree.map(np.logical_or, jax.device_get(moved), moved_too))
    # Where few parameters move there are fewer directions; the last ones are the least.
    rank = min(rank, max(1, subspaces.num_moved(space)))
    directions = directions_of.first(directions, rank)
    leading = leading[:, :rank]
    others = subspaces.num_moved(space) - rank
    squares = _squares(leading, totals, others)
    curvature = _curvature(loss_fn, params, space, directions, squares, held_out)
    if clip_loss_fn is not loss_fn:
        _, units = samples(unit_key, public_units, unit_weights)
        leading, totals, _ = _gradients(clip_loss_fn, params, space, directions, units)
        squares = _squares(leading, totals, others)
    dims = np.append(np.ones(rank), others)
    return Measurement(space, directions, curvature, leading, squares, dims, held_out, losses)


def _finite_losses(loss_fn: LossFn, params: Params, space: Subspace, records: Record) -> np.ndarray:
    """(n,) at theta_0; raises if one is not finite. `space` says how many records are held together."""
    losses = np.asarray(_losses(loss_fn, params, space, records))
    finite = np.isfinite(losses)
    if not np.all(finite):
        raise ValueError(
            f"Expected finite losses of public records at the pretrained parameters, found {np.sum(~finite)} of "
            f"{len(finite)} that are not."
        )
    return losses


@functools.partial(compiled, static_argnums=(0, 3))
def leading_directions(
    loss_fn: LossFn, params: Params, records: Record, rank: int, space: Subspace
) -> tuple[Directions | jax.Array, Rows]:
    """Those of `directions.leading`, of the records' gradients, and `gradients.moved_coordinates` of a whole space.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      records: n public records.
      rank: r <= min(n, k).
      space: k directions.
    """
    batches, _ = microbatches(records, at_a_time(loss_fn, params, space, records))
    rows = jax.lax.map(lambda batch: gradient_rows(loss_fn, params, space, batch), batches)
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[: num_records(records)], rows)
    # Coordinates of a projection belong to no parameter that could be held.
    moved = moved_coordinates(space, rows) if subspaces.is_whole(space) else []
    return directions_of.leading(rows, rank), moved


@functools.partial(compiled, static_argnums=0)
def curvature_along(
    loss_fn: LossFn, params: Params, space: Subspace, directions: Directions | jax.Array, index: int, records: Record
) -> jax.Array:
    """v^T H v of one of the directions, by `curvature.hessian_product` with microbatches that fit.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      space: k directions.
      directions: (r, k).
      index: of v.
      records: public, of which a few are taken.
    """
    records = take(records, slice(0, _SCALING_RECORDS))
    size = at_a_time(loss_fn, params, space, records)
    # The index is traced, so that one program serves all directions.
    coefficients = jax.nn.one_hot(index, len(directions), dtype=directions.dtype)
    v = directions_of.combine(directions, coefficients)
    product = hessian_product(loss_fn, params, space, v, records, microbatch_size=size)
    return jnp.vdot(v, product, precision=jax.lax.Precision.HIGHEST)


@functools.partial(compiled, static_argnums=0)
def surveyed_gradients(
    loss_fn: LossFn, params: Params, space: Subspace, directions: Directions | jax.Array, records: Record
) -> tuple[jax.Array, jax.Array, Rows]:
    """Of each microbatch: gradients along the directions (batches, r, size), norms, and where they are not zero."""
    batches, _ = microbatches(records, at_a_time(loss_fn, params, space, records))

    def along(batch):
        rows = gradient_rows(loss_fn, params, space, batch)
        moved = moved_coordinates(space, rows) if subspaces.is_whole(space) else []
        leading = directions_of.along_each(directions, rows).T
        return leading, factored_gradients.norms(rows), moved

    return jax.lax.map(along, batches)


def _gradients(
    loss_fn: LossFn, params: Params, space: Subspace, directions: Directions | jax.Array, records: Record
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Each record's gradient along the leading directions (n, r), its square (n,), and where any is not zero."""
    leading, norms, moved = jax.device_get(surveyed_gradients(loss_fn, params, space, directions, records))
    n = num_records(records)  # the last microbatch is padded
    leading = np.concatenate(leading.astype(np.float64), axis=1).T[:n]
    norms = norms.astype(np.float64).ravel()[:n]
    return leading, norms**2, jax.tree.map(lambda x: np.any(x, axis=0), moved)


def _squares(leading: np.ndarray, totals: np.ndarray, num_others: int) -> np.ndarray:
    """Squares (n, r + 1) of each gradient: in each leading direction, and their mean in all others."""
    with np.errstate(invalid="ignore"):  # what is not finite is refused by `_curvature`
        others = np.maximum(totals - np.sum(leading**2, axis=1), 0) / max(1, num_others)
    return np.column_stack([leading**2, others])


def _curvature(
    loss_fn: LossFn,
    params: Params,
    space: Subspace,
    directions: Directions | jax.Array,
    squares: np.ndarray,
    records: Record,
) -> np.ndarray:
    """Curvature (r + 1,): second moments of the gradients, scaled to the Hessian along the steepest directions.

    For the likelihood of a model that fits, the two agree (Fisher); for other losses only their shape does. A host
    loop: batched over directions, convolutions that are no products (`convolutions`) are ten times slower on CPUs.
    """
    moments = squares.mean(axis=0)
    steepest = np.argsort(-moments[:-1])[:_SCALED_DIRECTIONS]
    along = [curvature_along(loss_fn, params, space, directions, j, records) for j in steepest]
    curved = np.asarray(jax.device_get(along), np.float64)
    if not (np.all(np.isfinite(curved)) and np.all(np.isfinite(moments))):
        raise ValueError(f"The public curvature is not finite at the pretrained parameters, {moments.shape=}.")
    energy = max(np.sum(moments[steepest]), np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):  # refused below
        # A step is as ill-advised along a strong negative curvature, as in `curvature.psd_part`.
        scale = np.sum(np.abs(curved)) / energy
    if not (0 < scale < np.inf and moments.max() > 0):
        raise ValueError(
            f"Public gradients or curvature vanish at the pretrained parameters, {moments.shape=}: no quadratic."
        )
    return scale * moments


@functools.partial(compiled, static_argnums=0)
def _losses(loss_fn: LossFn, params: Params, space: Subspace, records: Record) -> jax.Array:
    """(n,) at theta_0."""
    size = at_a_time(loss_fn, params, space, records)
    return jax.lax.map(lambda record: loss_fn(params, record), records, batch_size=size)
