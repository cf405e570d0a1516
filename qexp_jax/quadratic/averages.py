"""Means over public records, a microbatch at a time: of losses, gradients, and whatever else sums over records.

All functions run under `jit`; with `axis_name` they take one device's public records and return the mean over all
devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qexp_jax.data.records import LossFn, Params, Record, microbatches, num_records, vary
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.subspace import Layout, Subspace, tuned_leaves, with_tuned_leaves

BATCH = 256  # records at a time where nothing is said


def mean_over_records(
    batch_sum: Callable[[Record, jax.Array], Any],
    records: Record,
    *,
    mask: jax.Array | None = None,
    microbatch_size: int = BATCH,
    axis_name: str | None = None,
    column_axis: str | None = None,
) -> Any:
    """Mean over records of a pytree, from `batch_sum(batch, mask) -> sums over one microbatch`.

    Args:
      batch_sum: a padded record of a microbatch has a mask of False and must count nothing.
      records: public records, pytree with a leading axis.
      mask: (n,) the records that count; by default all.
      microbatch_size: records in a microbatch.
      axis_name: of a mesh over whose devices the records are shared; the mean is over all of them.
      column_axis: of a mesh whose devices have the same records and sums of their own.
    """
    size = min(microbatch_size, max(1, num_records(records)))
    batches, masks = microbatches(records, size, mask)
    first = jax.tree.map(lambda x: x[0], (batches, masks))
    if len(masks) == 1:
        # XLA's CPU convolutions are ten times slower inside a scan, even of one step.
        total = batch_sum(*first)
    else:
        shapes = jax.eval_shape(batch_sum, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def step(total, batch):
            return jax.tree.map(jnp.add, total, batch_sum(*batch)), None

        # A carry must vary over the devices as what is added to it does.
        total, _ = jax.lax.scan(step, vary(zeros, axis_name or column_axis), (batches, masks))
    count = jnp.sum(masks)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    # Of no record the mean is 0, not a NaN.
    return jax.tree.map(lambda x: x / jnp.maximum(1, count).astype(x.dtype), total)


def mean_loss(loss_fn: LossFn, params: Params, records: Record, **batching: Any) -> jax.Array:
    """Mean loss over records; `batching` as in `mean_over_records`."""
    record_loss = as_products(loss_fn)

    def batch_sum(batch, mask):
        return jnp.sum(jnp.where(mask, jax.vmap(record_loss, in_axes=(None, 0))(params, batch), 0))

    return mean_over_records(batch_sum, records, **batching)


def mean_gradient(loss_fn: LossFn, params: Params, subspace: Subspace, records: Record, **batching: Any) -> jax.Array:
    """P^T grad of the mean loss (k,): (1) with neither metric nor clipping, for public records alone.

    Args:
      loss_fn: loss of one record.
      params: where it is taken.
      subspace: k directions.
      records: public records, pytree with a leading axis.
      **batching: as in `mean_over_records`.
    """
    layout = subspace.layout
    # Else the gradient by replicated leaves would be summed over the devices where it is formed.
    leaves = vary(tuned_leaves(layout, params), batching.get("axis_name"))
    loss = batch_loss(loss_fn, params, layout)
    gradient = mean_over_records(lambda batch, mask: jax.grad(loss)(leaves, batch, mask), records, **batching)
    return subspace.operator.project(layout, subspace.arrays, gradient)


def batch_loss(loss_fn: LossFn, params: Params, layout: Layout) -> Callable[[Any, Record, jax.Array], jax.Array]:
    """Sum of losses over a microbatch, as a function of the tuned leaves."""

    @as_products
    def record_loss(leaves, record):
        return loss_fn(with_tuned_leaves(layout, params, leaves), record).astype(layout.dtype)

    def loss(leaves, records, mask):
        return jnp.sum(jnp.where(mask, jax.vmap(record_loss, in_axes=(None, 0))(leaves, records), 0))

    return loss


def in_chunks(rows: Callable[[Any], jax.Array], xs: Any, size: int) -> jax.Array:
    """`rows` of chunks of the leading axis, one chunk after the other.

    Args:
      rows: `(size, ...) -> (size, ...)`; also of a last chunk that is shorter.
      xs: pytree with a leading axis (n, ...).
      size: of a chunk.
    """
    count = num_records(xs)
    size = min(size, count)
    whole = count // size * size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
    found = jax.lax.map(rows, chunks)
    found = found.reshape(whole, *found.shape[2:])
    if whole == count:
        return found
    # By itself: padding it would cost as many products as a whole chunk.
    last = jax.tree.map(lambda x: x[whole:], xs)
    return jnp.concatenate([found, rows(last)])
