"""Projected gradients of single records: `g_i = P^T grad loss_i(theta)`, in reverse or forward mode."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, vary
from qexp_jax.model import factored_gradients
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.factored_gradients import Rows
from qexp_jax.model.operations import count_bytes, count_flops, has_reverse_rule, moving_arguments
from qexp_jax.model.subspace import Layout, Subspace, is_whole, rows_without_held, tuned_leaves, with_tuned_leaves

Mode = Literal["auto", "reverse", "forward"]
# Forming one number of a record's gradient takes the time of so many floating-point operations; measured on a CPU.
_TRAFFIC = 24
# Directions of which forward mode takes the time of reverse mode, beside d/D and the traffic; on a GPU from an H200.
_EVEN_ON_CPU = 0.9
_EVEN_ON_ACCELERATOR = 1.2
# The most records at a time.
_ON_CPU = 32
_ON_CPU_IN_FACTORS = 128
_ON_ACCELERATOR = 8192
# What the gradients of so many records may take: in factors, whole, and on any device.
_FAST_BYTES = 2**23
_CACHED_BYTES = 2**27
HELD_BYTES = 2**30


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
        other through all m records and holds one tangent of them, whatever d is. Both give the same numbers. `"auto"`
        is `faster_mode`.
      axis_name: mapped device axis, if any; see `records.vary`.
    """
    layout = subspace.layout
    leaves = vary(tuned_leaves(layout, params), axis_name)
    loss = _loss_of_leaves(loss_fn, params, layout)
    if mode == "auto":
        mode = faster_mode(loss_fn, params, subspace, records)
    if mode == "reverse":

        def gradient(record: Record) -> jax.Array:
            return subspace.operator.project(layout, subspace.arrays, jax.grad(loss)(leaves, record))

        return jax.vmap(gradient)(records)
    if mode != "forward":
        raise ValueError(f"Expected mode 'auto', 'reverse' or 'forward', found {mode=}.")

    def losses(tuned: list[jax.Array]) -> jax.Array:
        return jax.vmap(loss, in_axes=(None, 0))(tuned, records)

    def derivative(direction: jax.Array) -> jax.Array:
        tangent = vary(subspace.operator.lift(layout, subspace.arrays, direction), axis_name)
        _, slopes = jax.jvp(losses, (leaves,), (tangent,))
        return slopes

    # One direction after the other: all at once would hold k tangents of all that the loss forms.
    return jax.lax.map(derivative, jnp.eye(subspace.dim, dtype=layout.dtype)).T


def gradient_rows(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    records: Record,
    *,
    mode: Mode = "auto",
    axis_name: str | None = None,
) -> Rows:
    """The gradients of `projected_gradients` in parts, of wide matrices as outer products.

    That is in a whole space and in reverse mode; else they are one part. The count-sketch of a wide matrix's gradient
    is made of its two factors.

    Args:
      loss_fn: loss of one record.
      params: where the gradients are taken.
      subspace: k directions.
      records: pytree with leading axis m.
      mode: of `projected_gradients`.
      axis_name: mapped device axis, if any; see `records.vary`.

    Returns:
      Parts of (m, k), side by side: one for each tuned leaf of a whole space, else a single one.
    """
    layout = subspace.layout
    if mode == "auto":
        mode = faster_mode(loss_fn, params, subspace, records)
    if mode != "reverse" or not is_in_factors(subspace):
        return [projected_gradients(loss_fn, params, subspace, records, mode=mode, axis_name=axis_name)]
    leaves = vary(tuned_leaves(layout, params), axis_name)
    loss = _loss_of_leaves(loss_fn, params, layout)
    rows = jax.vmap(lambda record: factored_gradients.gradient(loss, leaves, record, axis_name))(records)
    project_rows = subspace.operator.project_rows
    if project_rows is None:
        return rows_without_held(subspace, rows)
    return [project_rows(layout, subspace.arrays, rows)]


def is_in_factors(subspace: Subspace) -> bool:
    """Whether gradients may be outer products: in a whole space, or a count-sketch of it, with a wide matrix."""
    takes_rows = is_whole(subspace) or subspace.operator.project_rows is not None
    return takes_rows and any(map(factored_gradients.is_wide, subspace.layout.tuned_shapes))


def moving_leaves(loss_fn: LossFn, params: Params, layout: Layout, records: Record) -> tuple[bool, ...]:
    """Of each tuned leaf, whether the loss's derivative by it can be anything but zero; of shapes alone.

    It is zero behind `stop_gradient`, or of a head that the loss does not use.

    Args:
      loss_fn: loss of one record, hashable.
      params: all parameters.
      layout: says which leaves are tuned.
      records: pytree with a leading axis.
    """
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), records)
    leaves, treedef = jax.tree.flatten((params, record))
    avals = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _moving_leaves(loss_fn, layout, treedef, avals)


@functools.lru_cache(maxsize=256)  # a trace takes longer than a small release
def _moving_leaves(loss_fn: LossFn, layout: Layout, treedef: Any, avals: tuple[Any, ...]) -> tuple[bool, ...]:
    """`moving_leaves` of what can be hashed; `avals` are the shapes and dtypes of parameters and one record."""
    params, record = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*aval) for aval in avals])

    def loss(leaves: list[jax.Array], params: Params, record: Record) -> jax.Array:
        return _loss_of_leaves(loss_fn, params, layout)(leaves, record)

    tuned = jax.eval_shape(lambda p: tuned_leaves(layout, p), params)
    return moving_arguments(loss, tuned, params, record)


def moved_coordinates(subspace: Subspace, rows: Rows) -> Rows:
    """For each leaf of a whole space, where any gradient is not zero: bools, flat; of an `Outer` another of them."""
    moved: Any = jax.tree.map(lambda x: jnp.any(x != 0, axis=0), rows)
    sizes = [math.prod(s) for s in subspace.layout.tuned_shapes]
    if len(moved) < len(sizes):
        moved = jnp.split(moved[0], np.cumsum(sizes)[:-1])
    return moved


def _loss_of_leaves(loss_fn: LossFn, params: Params, layout: Layout) -> Callable[[list[jax.Array], Record], jax.Array]:
    @as_products
    def loss(tuned: list[jax.Array], record: Record) -> jax.Array:
        return loss_fn(with_tuned_leaves(layout, params, tuned), record).astype(layout.dtype)

    return loss


def faster_mode(loss_fn: LossFn, params: Params, subspace: Subspace, records: Record) -> Mode:
    """The mode that should take less time, from static shapes alone.

    With F the operations of one loss and d tuned of D parameters, forward mode takes (1 + k) F a record; reverse mode
    takes 2 F, another F d/D for the gradients of the tuned leaves, and the traffic of forming d numbers. So forward
    mode is for few directions, the fewer the more often the loss uses each parameter.

    Args:
      loss_fn: loss of one record.
      params: all parameters.
      subspace: k directions; its layout says which leaves are tuned.
      records: pytree with a leading axis; shapes and dtypes alone are looked at.
    """
    record = jax.tree.map(lambda x: x[0], records)
    flops = count_flops(loss_fn, params, record, products_only=True)
    tuned = subspace.layout.num_params
    total = sum(math.prod(shape) for shape in subspace.layout.shapes)
    even = _EVEN_ON_CPU if jax.default_backend() == "cpu" else _EVEN_ON_ACCELERATOR
    has_few = subspace.dim < even + tuned / total + _TRAFFIC * tuned / max(1, flops)
    # JAX has no forward mode of a `jax.custom_vjp`.
    return "forward" if has_few and not has_reverse_rule(loss_fn, params, record) else "reverse"


def at_a_time(loss_fn: LossFn, params: Params, subspace: Subspace, records: Record, *, formed: bool = False) -> int:
    """Records whose gradients are formed together where nobody says how many, from static shapes alone.

    On a CPU a power of two, 2 to 32, so few that they stay in cache: 32 at a time took three times as long as 8 at
    270,000 parameters, twice as long as 2 with a transformer of 256 tokens. Gradients in factors are small: up to 128
    at a time, a sixth less time of an MLP on images. An accelerator waits for the next kernel then, and gets
    thousands: on an H200 a pass takes a sixth of its time with 32. Of a large model or record as many as fit in a
    gibibyte, at four times the tuned parameters and twice what the loss forms.

    Args:
      loss_fn: loss of one record.
      params: all parameters.
      subspace: says which are tuned.
      records: pytree with a leading axis.
      formed: whether gradients in factors are formed all the same.
    """
    layout = subspace.layout
    used = 2 * bytes_of_one(loss_fn, params, records)
    held = 16 * layout.num_params + used
    if jax.default_backend() != "cpu":
        return max(1, min(HELD_BYTES // held, _ON_ACCELERATOR))
    most = min(_ON_CPU, _power_of_two(_CACHED_BYTES // held))
    if is_in_factors(subspace) and not formed:
        factors = sum(sum(s) if factored_gradients.is_wide(s) else math.prod(s) for s in layout.tuned_shapes)
        most = max(most, min(_ON_CPU_IN_FACTORS, _power_of_two(_FAST_BYTES // (16 * factors + used))))
    return max(1, min(HELD_BYTES // held, most))


def _power_of_two(most: int) -> int:
    """The largest up to `most`, at least 2."""
    return 2 ** int(math.log2(max(2, most)))


def bytes_of_one(function: LossFn, params: Params, records: Record) -> int:
    """Bytes of all that a loss or a model forms of one record, its convolutions as products."""
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), records)
    return max(1, int(count_bytes(as_products(function), params, record)))
