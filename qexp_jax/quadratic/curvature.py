"""Public curvature: `P^T Curv P` at theta_0, the mean over **public** records.

    hessian             by `jax.hessian` in w: small k
    projected_hessian   by Hessian-vector products along the k directions
    projected_ggn       generalised Gauss-Newton J^T (output Hessian) J: positive semi-definite, no reverse pass
    projected_fisher    second moment of gradients; with labels drawn from the model it is the Fisher information
    top_eigenspace      the leading eigenvectors of the whole-space Fisher, as a subspace
    psd_part            how an indefinite Hessian is made positive semi-definite

Private records, or private inputs without labels, must never reach this room: noise whose covariance depends on them
is not the mechanism of T1. All functions run under `jit`; with `axis_name` they take one device's public records and
return the mean over all devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qexp_jax.data.records import LossFn, Params, Record, num_records, vary
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.gradients import HELD_BYTES, bytes_of_one, projected_gradients
from qexp_jax.model.subspace import Layout, Subspace, tuned_leaves, with_tuned_leaves
from qexp_jax.quadratic.averages import BATCH, batch_loss, in_chunks, mean_gradient, mean_loss, mean_over_records
from qexp_jax.quadratic.eigenspace import top_eigenspace

__all__ = [
    "hessian",
    "hessian_columns",
    "hessian_product",
    "mean_gradient",
    "mean_loss",
    "mean_over_records",
    "projected_fisher",
    "projected_ggn",
    "projected_hessian",
    "psd_part",
    "top_eigenspace",
]

_HIGHEST = jax.lax.Precision.HIGHEST
_COLUMNS = 16  # directions that are followed together on a CPU
_GGN_BATCH = 32  # records at a time on a CPU
_FISHER_BATCH = 64  # records at a time


def hessian(loss_fn: LossFn, params: Params, subspace: Subspace, records: Record) -> jax.Array:
    """P^T H P (k, k) by `jax.hessian` of `w -> mean loss(theta + P w)` at 0; for small k and few records.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      subspace: k directions.
      records: public records, all of which are held at once.
    """

    def loss(w):
        moved = subspaces.displace(subspace, params, w)
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(moved, records))

    return jax.hessian(loss)(jnp.zeros(subspace.dim, subspace.layout.dtype))


def hessian_product(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    direction: jax.Array,
    records: Record,
    **batching: Any,
) -> jax.Array:
    """P^T H P e (k,) for one direction e (k,), forward over reverse.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      subspace: k directions.
      direction: (k,) e.
      records: public records.
      **batching: as in `averages.mean_over_records`.
    """
    layout = subspace.layout
    axis_name = batching.get("axis_name") or batching.get("column_axis")
    leaves = vary(tuned_leaves(layout, params), axis_name)
    tangent = vary(subspace.operator.lift(layout, subspace.arrays, direction), axis_name)
    loss = batch_loss(loss_fn, params, layout)

    def batch_sum(batch, mask):
        return jax.jvp(lambda x: jax.grad(loss)(x, batch, mask), (leaves,), (tangent,))[1]

    product = mean_over_records(batch_sum, records, **batching)
    return subspace.operator.project(layout, subspace.arrays, product)


def projected_hessian(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    records: Record,
    *,
    columns_per_batch: int | None = None,
    **batching: Any,
) -> jax.Array:
    """P^T H P (k, k) by Hessian-vector products, `columns_per_batch` directions at a time.

    The gradient of each microbatch is linearised once for all directions. Holds as many gradients of the tuned leaves,
    and as many times the activations of one microbatch (one time on a CPU, where one product after the other is
    faster); nothing of size d x k beyond what the subspace itself stores. Where nothing is said an accelerator follows
    as many records and directions together as a gibibyte holds.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      subspace: k directions.
      records: public records.
      columns_per_batch: directions that are followed together.
      **batching: as in `averages.mean_over_records`.
    """
    stored = subspace.arrays if subspaces.is_stored(subspace) else None
    eye = jnp.eye(subspace.dim, dtype=subspace.layout.dtype)
    columns = _columns(loss_fn, params, subspace, records, eye, stored, columns_per_batch, **batching)
    return (columns + columns.T) / 2


def hessian_columns(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    records: Record,
    directions: jax.Array,
    *,
    columns_per_batch: int | None = None,
    **batching: Any,
) -> jax.Array:
    """P^T H P e for each row e of `directions` (c, k): (c, k).

    Column-parallel curvature: with the rows shared over the devices of `column_axis`, each computes its columns on all
    records, and nothing crosses devices but the result.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      subspace: k directions.
      records: public records.
      directions: (c, k).
      columns_per_batch: directions that are followed together.
      **batching: as in `averages.mean_over_records`.
    """
    return _columns(loss_fn, params, subspace, records, directions, None, columns_per_batch, **batching)


def _columns(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    records: Record,
    directions: jax.Array,
    lifted: Any | None,
    size: int | None,
    **batching: Any,
) -> jax.Array:
    """P^T H P e for rows e of `directions`, lifted where `lifted` does not hold P e already."""
    layout = subspace.layout
    axis_name = batching.get("axis_name") or batching.get("column_axis")
    leaves = vary(tuned_leaves(layout, params), axis_name)
    loss = batch_loss(loss_fn, params, layout)
    in_turn = jax.default_backend() == "cpu"
    size = size or _columns_at_a_time(loss_fn, params, layout, records, num_records(directions))
    batching = {"microbatch_size": _records_at_a_time(loss_fn, params, records, size, BATCH)} | batching

    def batch_sum(batch, mask):
        _, push = jax.linearize(lambda x: jax.grad(loss)(x, batch, mask), leaves)

        def rows(chunk):
            tangents = _lift_each(subspace, chunk) if lifted is None else chunk
            tangents = vary(tangents, axis_name)
            products = jax.lax.map(push, tangents) if in_turn else jax.vmap(push)(tangents)
            return jax.vmap(lambda x: subspace.operator.project(layout, subspace.arrays, x))(products)

        return in_chunks(rows, directions if lifted is None else lifted, size)

    return mean_over_records(batch_sum, records, **batching)


# Records and directions that are followed together where nobody says how many, from static shapes alone: a CPU has what
# stays in cache; an accelerator waits for the next kernel instead, and gets as many pairs as a gibibyte holds, at twice
# what the function forms. The Hessian of 10,000 parameters in 256 directions takes an eighth of its time on an H200.


def _columns_at_a_time(loss_fn: LossFn, params: Params, layout: Layout, records: Record, num_directions: int) -> int:
    """Directions that are followed together: on an accelerator those that leave room for all records at once."""
    if jax.default_backend() == "cpu":
        return _COLUMNS
    of_all_records = _pairs_held(loss_fn, params, records) // max(1, num_records(records))
    wanted = max(_COLUMNS, of_all_records)
    gradients_held = HELD_BYTES // (16 * layout.num_params)
    return max(1, min(num_directions, gradients_held, wanted))


def _records_at_a_time(
    function: Callable[..., Any], params: Params, records: Record, num_directions: int, on_cpu: int
) -> int:
    """Records that are followed together, each in `num_directions`; `on_cpu` of them on a CPU."""
    if jax.default_backend() == "cpu":
        return on_cpu
    most = _pairs_held(function, params, records) // num_directions
    return max(1, min(num_records(records), most))


def _pairs_held(function: Callable[..., Any], params: Params, records: Record) -> int:
    """Pairs of a record and a direction."""
    return HELD_BYTES // (2 * bytes_of_one(function, params, records))


def _lift_each(subspace: Subspace, directions: jax.Array) -> Any:
    """P e for rows e, as leaves with a leading axis."""
    return jax.vmap(lambda e: subspace.operator.lift(subspace.layout, subspace.arrays, e))(directions)


def projected_ggn(
    model_fn: Callable[[Params, Any], jax.Array],
    output_loss_fn: Callable[[jax.Array, Any], jax.Array],
    params: Params,
    subspace: Subspace,
    records: Record,
    **batching: Any,
) -> jax.Array:
    """Generalised Gauss-Newton P^T J^T L'' J P (k, k), positive semi-definite where the output loss is convex.

    Args:
      model_fn: `(params, record) -> outputs`, an array.
      output_loss_fn: `(outputs, record) -> scalar`, convex in the outputs; the loss is their composition.
      params: initial parameters theta_0.
      subspace: k directions.
      records: public records.
      **batching: as in `averages.mean_over_records`.
    """
    layout = subspace.layout
    axis_name = batching.get("axis_name")
    leaves = vary(tuned_leaves(layout, params), axis_name)
    stored = subspaces.is_stored(subspace)  # then P lies in memory as leaves (k, *shape)
    lifted = subspace.arrays if stored else _lift_each(subspace, jnp.eye(subspace.dim, dtype=layout.dtype))
    tangents = vary(lifted, axis_name)

    def record_ggn(record):
        @as_products
        def outputs(x):
            return model_fn(with_tuned_leaves(layout, params, x), record).ravel().astype(layout.dtype)

        shape = jax.eval_shape(model_fn, params, record).shape
        value, push = jax.linearize(outputs, leaves)
        jacobian = jax.vmap(push)(tangents)
        curvature = jax.hessian(lambda y: output_loss_fn(y.reshape(shape), record))(value)
        return jnp.einsum("ia,ab,jb->ij", jacobian, curvature, jacobian, precision=_HIGHEST)

    def batch_sum(batch, mask):
        each = jax.vmap(record_ggn)(batch)
        return jnp.sum(jnp.where(mask[:, None, None], each, 0), axis=0)

    size = _records_at_a_time(model_fn, params, records, subspace.dim, _GGN_BATCH)
    matrix = mean_over_records(batch_sum, records, **({"microbatch_size": size} | batching))
    return (matrix + matrix.T) / 2


def projected_fisher(
    loss_fn: LossFn, params: Params, subspace: Subspace, records: Record, **batching: Any
) -> jax.Array:
    """Second moment of record gradients P^T E[g g^T] P (k, k): with model-drawn labels, the Fisher information.

    Replace the label of each public record by a draw from the model first (`jax.random.categorical` of the logits);
    with observed labels this is the *empirical* Fisher, which is not a curvature: for a squared loss it is off by
    the residual variance.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      subspace: k directions.
      records: public records.
      **batching: as in `averages.mean_over_records`.
    """

    def batch_sum(batch, mask):
        g = projected_gradients(loss_fn, params, subspace, batch, axis_name=batching.get("axis_name"))
        g = jnp.where(mask[:, None], g, 0)
        return jnp.matmul(g.T, g, precision=_HIGHEST)

    return mean_over_records(batch_sum, records, **({"microbatch_size": _FISHER_BATCH} | batching))


def psd_part(matrix: jax.Array) -> jax.Array:
    """The symmetric matrix with each eigenvalue replaced by its absolute value.

    A direction of strong *negative* curvature is one where the gradient changes fast, so that a long step is as
    ill-advised there as along strong positive curvature (saddle-free Newton, Dauphin et al., arXiv:1406.2572).
    """
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return jnp.matmul(vectors * jnp.abs(values), vectors.T, precision=_HIGHEST)
