"""Projected gradients of single records: `g_i = P^T grad loss_i(theta)`, in reverse or forward mode."""

from typing import Literal

import jax
import jax.numpy as jnp

from qexp_jax.convolutions import as_products
from qexp_jax.records import LossFn, Params, Record, vary
from qexp_jax.subspace import Subspace, tuned_leaves, with_tuned_leaves

Mode = Literal["auto", "reverse", "forward"]
_FORWARD_UP_TO = 4


def projected_gradients(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    records: Record,
    *,
    mode: Mode = "auto",
    axis_name: str | None = None,
) -> jax.Array:
    """Gradients of one microbatch, (m, k).

    Args:
      loss_fn: loss of one record.
      params: where the gradient is taken.
      subspace: k directions.
      records: pytree with leading axis m.
      mode: `"reverse"` holds m gradients of the tuned leaves at a time; `"forward"` follows one direction after the
        other through all m records and holds one tangent of them, whatever d is. Both give the same numbers.
      axis_name: mapped device axis, if any; see `records.vary`.
    """
    layout = subspace.layout
    leaves = vary(tuned_leaves(layout, params), axis_name)
    record_loss = as_products(loss_fn)

    def loss(tuned, record):
        return record_loss(with_tuned_leaves(layout, params, tuned), record).astype(layout.dtype)

    if mode == "auto":
        mode = "forward" if subspace.dim <= _FORWARD_UP_TO else "reverse"
    if mode == "reverse":

        def gradient(record):
            return subspace.operator.project(layout, subspace.arrays, jax.grad(loss)(leaves, record))

        return jax.vmap(gradient)(records)
    if mode != "forward":
        raise ValueError(f"Expected mode 'auto', 'reverse' or 'forward', found {mode=}.")

    def derivative(direction):
        tangent = vary(subspace.operator.lift(layout, subspace.arrays, direction), axis_name)
        return jax.jvp(lambda tuned: jax.vmap(loss, in_axes=(None, 0))(tuned, records), (leaves,), (tangent,))[1]

    return jax.lax.map(derivative, jnp.eye(subspace.dim, dtype=layout.dtype)).T
