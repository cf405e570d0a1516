"""Public curvature: `P^T Curv P` at the anchor, the mean over **public** records.

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
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, microbatches, num_records, vary
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.gradients import HELD_BYTES, bytes_of_one, projected_gradients
from qexp_jax.model.subspace import Subspace, tuned_leaves, with_tuned_leaves

_HIGHEST = jax.lax.Precision.HIGHEST
_BATCH, _COLUMNS, _GGN_BATCH = 256, 16, 32
_OVERSAMPLED = 64


def mean_over_records(
    batch_sum: Callable[[Record, jax.Array], Any],
    records: Record,
    *,
    mask: jax.Array | None = None,
    microbatch_size: int = _BATCH,
    axis_name: str | None = None,
    column_axis: str | None = None,
) -> Any:
    """Mean over records of a pytree, from `batch_sum(batch, mask) -> sums over one microbatch`.

    With `axis_name`, over the records of all devices; with `column_axis`, each device has the same records and sums of
    its own.
    """
    batches, masks = microbatches(records, min(microbatch_size, max(1, num_records(records))), mask)
    first = jax.tree.map(lambda x: x[0], (batches, masks))
    if len(masks) == 1:  # XLA's CPU convolutions are ten times slower inside a scan, even of one step
        total = batch_sum(*first)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(batch_sum, *first))

        def step(total, batch):
            return jax.tree.map(jnp.add, total, batch_sum(*batch)), None

        total, _ = jax.lax.scan(step, vary(zeros, axis_name or column_axis), (batches, masks))
    count = jnp.sum(masks)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return jax.tree.map(lambda x: x / jnp.maximum(1, count).astype(x.dtype), total)


def _batch_loss(loss_fn, params, layout):
    """Sum of losses over a microbatch, as a function of the tuned leaves."""

    @as_products
    def record_loss(leaves, record):
        return loss_fn(with_tuned_leaves(layout, params, leaves), record).astype(layout.dtype)

    def loss(leaves, records, mask):
        return jnp.sum(jnp.where(mask, jax.vmap(record_loss, in_axes=(None, 0))(leaves, records), 0))

    return loss


def mean_loss(loss_fn: LossFn, params: Params, records: Record, **batching: Any) -> jax.Array:
    """Mean loss over records; `batching` as in `mean_over_records`."""
    record_loss = as_products(loss_fn)

    def batch_sum(batch, mask):
        return jnp.sum(jnp.where(mask, jax.vmap(record_loss, in_axes=(None, 0))(params, batch), 0))

    return mean_over_records(batch_sum, records, **batching)


def mean_gradient(loss_fn: LossFn, params: Params, subspace: Subspace, records: Record, **batching: Any) -> jax.Array:
    """P^T grad of the mean loss (k,); `batching` as in `mean_over_records`."""
    layout = subspace.layout
    leaves = vary(tuned_leaves(layout, params), batching.get("axis_name"))
    loss = _batch_loss(loss_fn, params, layout)
    gradient = mean_over_records(lambda batch, mask: jax.grad(loss)(leaves, batch, mask), records, **batching)
    return subspace.operator.project(layout, subspace.arrays, gradient)


def hessian(loss_fn: LossFn, params: Params, subspace: Subspace, records: Record) -> jax.Array:
    """P^T H P (k, k) by `jax.hessian` of `w -> mean loss(theta + P w)` at 0; for small k and few records."""

    def loss(w):
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(subspaces.displace(subspace, params, w), records))

    return jax.hessian(loss)(jnp.zeros(subspace.dim, subspace.layout.dtype))


def hessian_product(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    direction: jax.Array,
    records: Record,
    **batching: Any,
) -> jax.Array:
    """P^T H P e (k,) for one direction e (k,), forward over reverse; `batching` as in `mean_over_records`."""
    layout, axis_name = subspace.layout, batching.get("axis_name") or batching.get("column_axis")
    leaves = vary(tuned_leaves(layout, params), axis_name)
    tangent = vary(subspace.operator.lift(layout, subspace.arrays, direction), axis_name)
    loss = _batch_loss(loss_fn, params, layout)

    def batch_sum(batch, mask):
        return jax.jvp(lambda x: jax.grad(loss)(x, batch, mask), (leaves,), (tangent,))[1]

    return subspace.operator.project(layout, subspace.arrays, mean_over_records(batch_sum, records, **batching))


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
    faster); nothing of size d x k beyond what the subspace itself stores. `batching` as in `mean_over_records`. Where
    nothing is said an accelerator follows as many records and directions together as a gibibyte holds.
    """
    stored = subspace.arrays if subspace.operator.lift is subspaces._combine else None
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
    records, and nothing crosses devices but the result. `batching` as in `mean_over_records`.
    """
    return _columns(loss_fn, params, subspace, records, directions, None, columns_per_batch, **batching)


def _columns(loss_fn, params, subspace, records, directions, lifted, size, **batching):
    """P^T H P e for rows e, lifted where `lifted` does not hold P e already."""
    layout, axis_name = subspace.layout, batching.get("axis_name") or batching.get("column_axis")
    leaves = vary(tuned_leaves(layout, params), axis_name)
    loss = _batch_loss(loss_fn, params, layout)
    in_turn = jax.default_backend() == "cpu"
    size = size or _columns_at_a_time(loss_fn, params, layout, records, num_records(directions))
    batching = {"microbatch_size": _records_at_a_time(loss_fn, params, records, size, _BATCH)} | batching

    def batch_sum(batch, mask):
        _, push = jax.linearize(lambda x: jax.grad(loss)(x, batch, mask), leaves)

        def rows(chunk):
            tangents = vary(_lift_each(subspace, chunk) if lifted is None else chunk, axis_name)
            products = jax.lax.map(push, tangents) if in_turn else jax.vmap(push)(tangents)
            return jax.vmap(lambda x: subspace.operator.project(layout, subspace.arrays, x))(products)

        return _in_chunks(rows, directions if lifted is None else lifted, size)

    return mean_over_records(batch_sum, records, **batching)


# Records and directions that are followed together where nobody says how many, from static shapes alone: a CPU has what
# stays in cache; an accelerator waits for the next kernel instead, and gets as many pairs as a gibibyte holds, at twice
# what the function forms. The Hessian of 10,000 parameters in 256 directions takes an eighth of its time on an H200.


def _columns_at_a_time(loss_fn, params, layout, records, num_directions):
    if jax.default_backend() == "cpu":
        return _COLUMNS
    each = _pairs_held(loss_fn, params, records) // max(1, num_records(records))
    return max(1, min(num_directions, HELD_BYTES // (16 * layout.num_params), max(_COLUMNS, each)))


def _records_at_a_time(function, params, records, num_directions, on_cpu):
    if jax.default_backend() == "cpu":
        return on_cpu
    return max(1, min(num_records(records), _pairs_held(function, params, records) // num_directions))


def _pairs_held(function, params, records):
    return HELD_BYTES // (2 * bytes_of_one(function, params, records))


def _lift_each(subspace, directions):
    """P e for rows e, as leaves with a leading axis."""
    return jax.vmap(lambda e: subspace.operator.lift(subspace.layout, subspace.arrays, e))(directions)


def _in_chunks(rows, xs, size):
    """`rows` of chunks of the leading axis, one chunk after the other."""
    count = num_records(xs)
    size = min(size, count)
    whole = count // size * size
    found = jax.lax.map(rows, jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs))
    found = found.reshape(whole, *found.shape[2:])
    return found if whole == count else jnp.concatenate([found, rows(jax.tree.map(lambda x: x[whole:], xs))])


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
      params: the anchor.
      subspace: k directions.
      records: public records.
      **batching: as in `mean_over_records`.
    """
    layout, axis_name = subspace.layout, batching.get("axis_name")
    leaves = vary(tuned_leaves(layout, params), axis_name)
    stored = subspace.operator.lift is subspaces._combine  # then P lies in memory as leaves (k, *shape)
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
    """

    def batch_sum(batch, mask):
        g = projected_gradients(loss_fn, params, subspace, batch, axis_name=batching.get("axis_name"))
        g = jnp.where(mask[:, None], g, 0)
        return jnp.matmul(g.T, g, precision=_HIGHEST)

    return mean_over_records(batch_sum, records, **({"microbatch_size": 64} | batching))


def top_eigenspace(
    loss_fn: LossFn,
    params: Params,
    records: Record,
    dim: int,
    *,
    within: Subspace | None = None,
    microbatch_size: int = 64,
) -> tuple[Subspace, jax.Array]:
    """The leading eigenvectors of the second moment of public gradients.

    Costs one gradient per record, stores (n, d) numbers, plus the (k, d) basis that it returns, and factors one matrix
    of min(n, d) rows. Where min(n, d) is at least 4 (k + 64), the space is one of k directions in which the gradients
    have all but a few ten-thousandths of the energy that they have in the leading k, found by random sketches (Halko,
    Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4 with one power) in half the time.

    Args:
      loss_fn: loss of one record.
      params: the anchor.
      records: n public records; with labels drawn from the model the matrix is the Fisher information.
      dim: k <= min(n, d).
      within: the space that is searched; by default all parameters.
      microbatch_size: gradients held at a time.

    Returns:
      The subspace, with orthonormal columns where `within` has them, and its k eigenvalues in descending order.
    """
    within = subspaces.full(params) if within is None else within
    n = num_records(records)
    if not 1 <= dim <= min(n, within.dim):
        raise ValueError(f"Expected 1 <= dim <= min({n} records, {within.dim} dimensions), found {dim=}.")
    batches, _ = microbatches(records, microbatch_size)
    rows = jax.lax.map(lambda batch: projected_gradients(loss_fn, params, within, batch), batches)
    rows = rows.reshape(-1, within.dim)[:n]
    basis = leading_basis(rows, dim)
    values = jnp.sum(_product(rows, basis / np.sqrt(n)) ** 2, axis=0)
    return subspaces.compose(within, basis, orthonormal=True, name=f"top eigenspace in {within.name}"), values


def leading_basis(rows: jax.Array, dim: int) -> jax.Array:
    """Orthonormal columns (d, dim) that span where rows (n, d) have most energy; how, static shapes decide.

    Where min(n, d) is at least 4 (dim + 64), all but a few ten-thousandths of the most, see `top_eigenspace`.
    """
    n, d = rows.shape
    if min(n, d) >= 4 * (dim + _OVERSAMPLED):
        return _leading_sketched(rows, dim)
    return _leading_columns(rows, dim) if n >= d else _leading_rows(rows, dim)


def _leading_columns(rows, dim):
    """Eigenvectors of rows^T rows, itself small."""
    _, vectors = jnp.linalg.eigh(_product(rows.T, rows))
    return vectors[:, : -dim - 1 : -1]


def _leading_rows(rows, dim):
    """The same from rows rows^T, the Gram trick."""
    _, vectors = jnp.linalg.eigh(_product(rows, rows.T))
    return _orthonormal(_product(rows.T, vectors[:, : -dim - 1 : -1]))


def _leading_sketched(rows, dim):
    """The same within the span of a few random combinations of rows, to which rows rows^T was applied."""
    sketch = jax.random.normal(jax.random.key(0), (dim + _OVERSAMPLED, len(rows)), rows.dtype)
    span = jnp.linalg.qr(_product(_product(sketch, rows), rows.T).T)[0]
    return _leading_rows(_product(span.T, rows), dim)


def _orthonormal(columns):
    """Restores the orthogonality that float32 loses on small eigenvalues.

    By Cholesky, in a quarter of a QR's time, where each unit column has nine tenths of its length outside the span of
    those before it, so that rounding is not amplified; else by QR, which dependent columns need.
    """
    unit = columns / jnp.linalg.norm(columns, axis=0)
    lower = jnp.linalg.cholesky(_product(unit.T, unit))
    inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(len(lower), dtype=lower.dtype), left_side=True, lower=True)
    independent = jnp.min(jnp.diagonal(lower)) > 0.9  # false where Cholesky failed
    return jax.lax.cond(independent, lambda: _product(unit, inverse.T), lambda: jnp.linalg.qr(columns)[0])


def _product(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def psd_part(matrix: jax.Array) -> jax.Array:
    """The symmetric matrix with each eigenvalue replaced by its absolute value.

    A direction of strong *negative* curvature is one where the gradient changes fast, so that a long step is as
    ill-advised there as along strong positive curvature (saddle-free Newton, Dauphin et al., arXiv:1406.2572).
    """
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return jnp.matmul(vectors * jnp.abs(values), vectors.T, precision=_HIGHEST)
