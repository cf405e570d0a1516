"""What keeps records apart: a loss sees one record, and `jax.vmap` does to each alone what it does to one.

A loss is traced, with its derivatives, before anything private is read. What is not known to work row by row is
refused.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.model.subspace import Layout

_ISOLATION = (
    "a loss must be a pure function of one record: no collective, callback or side effect, no custom_vmap or kernel of "
    "one's own, no random bits but threefry's, or records are not isolated from each other"
)
# What vmap does to each record alone, whatever the others hold. All else is refused, also what nobody here has heard
# of. Not in the list, though pure: rng_bit_generator, which takes the first record's key for all, and
# regularized_incomplete_beta, which goes on with all records until the slowest has converged. custom_lin stands for a
# jax.custom_vjp in forward mode, which JAX does not run.
_ROW_BY_ROW = frozenset(
    """
    abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type
    broadcast_in_dim cbrt ceil clamp clz complex concatenate conj conv_general_dilated convert_element_type copy cos
    cosh cumlogsumexp cummax cummin cumprod cumsum device_put digamma div dot_general dynamic_slice
    dynamic_update_slice empty2 eq eq_to erf erf_inv erfc exp exp2 expm1 fft floor gather ge gt igamma igamma_grad_a
    igammac imag integer_pow iota is_finite le le_to lgamma log log1p logistic lt lt_to max min mul name ne neg
    nextafter not optimization_barrier or pad platform_index polygamma population_count pow real reduce reduce_and
    reduce_max reduce_min reduce_or reduce_precision reduce_prod reduce_sum reduce_window reduce_window_max
    reduce_window_min reduce_window_sum reduce_xor rem reshape reshard rev round rsqrt scatter scatter-add scatter-max
    scatter-min scatter-mul scatter-sub select_and_gather_add select_and_scatter select_and_scatter_add select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh slice sort split sqrt
    square squeeze stack stop_gradient sub tan tanh tile transpose unstack xor zeta
    approx_top_k top_k
    cholesky eig eigh hessenberg householder_product lu lu_pivots_to_permutation qr schur svd triangular_solve
    tridiagonal tridiagonal_solve
    call closed_call cond custom_jvp_call custom_lin custom_linear_solve custom_vjp_call jit remat2 scan while
    random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap random_wrap
    threefry2x32
    """.split()
)


def check_loss(loss_fn: LossFn, layout: Layout, params: Params, records: Record) -> None:
    """Raises unless the loss is a pure scalar that leaves records isolated from each other.

    It is traced on one abstract record, outside any mapped axis: itself, and its derivatives as the private pass takes
    them, since the rules of `jax.custom_vjp` and `jax.custom_jvp` show in those alone.

    Args:
      loss_fn: loss of one record.
      layout: says which leaves are differentiated, and in which dtype.
      params: all parameters.
      records: pytree with a leading axis; shapes and dtypes alone are looked at.

    Raises:
      ValueError: if it is not hashable, returns anything but one floating-point scalar, reads a changing state, or does
        what `jax.vmap` may not do to each record alone.
    """
    dtypes = [layout.dtype if tuned else dtype for dtype, tuned in zip(layout.dtypes, layout.tuned, strict=True)]
    avals_of_params = list(map(jax.ShapeDtypeStruct, layout.shapes, dtypes))
    shapes = jax.tree.unflatten(jax.tree.structure(params), avals_of_params)
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), records)
    leaves, treedef = jax.tree.flatten((shapes, record))
    # The parameters' leaves come first; those of the record are never differentiated.
    moves = layout.tuned + (False,) * (len(leaves) - len(layout.tuned))
    try:
        hash(loss_fn)  # what is found of it is remembered
    except TypeError:
        raise ValueError(f"Expected a hashable loss_fn, found {type(loss_fn).__name__}.") from None
    avals = tuple((x.shape, x.dtype) for x in leaves)
    key_dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    _check_traced(loss_fn, treedef, moves, avals, key_dtype)


@functools.lru_cache(maxsize=256)
def _check_traced(
    loss_fn: LossFn, treedef: Any, moves: tuple[bool, ...], avals: tuple[Any, ...], key_dtype: Any
) -> None:
    """`check_loss` of what can be hashed.

    Args:
      loss_fn: loss of one record.
      treedef: of parameters and one record.
      moves: for each of their leaves, whether the loss is differentiated by it.
      avals: their shapes and dtypes.
      key_dtype: of the keys that a loss makes, for the cache alone: with another the same loss is another one.
    """
    loss = _loss_of_leaves(loss_fn, treedef, moves)
    moving = [jax.ShapeDtypeStruct(*aval) for aval, moved in zip(avals, moves, strict=True) if moved]
    fixed = [jax.ShapeDtypeStruct(*aval) for aval, moved in zip(avals, moves, strict=True) if not moved]

    def derivative(leaves: list[Any], others: list[Any], tangents: list[Any]) -> Any:
        return jax.jvp(lambda x: loss(x, others), (leaves,), (tangents,))

    _isolated(loss, moving, fixed)
    _isolated(derivative, moving, fixed, moving)
    # A counter or a generator outside the loss shows when it is traced twice.
    first = _isolated(jax.value_and_grad(loss), moving, fixed)
    second = _isolated(jax.value_and_grad(loss), moving, fixed)
    if not _are_same(first, second):
        raise ValueError(f"loss_fn: {_ISOLATION}; two traces of it differ, so that it reads a changing state.")


def _loss_of_leaves(loss_fn: LossFn, treedef: Any, moves: tuple[bool, ...]) -> Callable[..., jax.Array]:
    """The loss as a function of the leaves that it is differentiated by, and of the others."""

    def loss(moving: list[Any], fixed: list[Any]) -> jax.Array:
        leaves = iter(moving)
        others = iter(fixed)
        params, record = jax.tree.unflatten(treedef, [next(leaves if moved else others) for moved in moves])
        value = loss_fn(params, record)
        _check_scalar(value)
        return value

    return loss


def _check_scalar(value: Any) -> None:
    is_traced = isinstance(value, jax.core.Tracer)
    if is_traced and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        return
    is_constant = jax.tree_util.all_leaves([value]) and not is_traced
    reason = ", which does not depend on the parameters" if is_constant else ""
    raise ValueError(f"Expected loss_fn to return one floating-point scalar, found {_described(value)}{reason}.")


def _described(value: Any) -> str:
    """Structure, types and shapes; no values."""
    leaves, structure = jax.tree.flatten(value)
    found = [f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__ for x in leaves]
    return found[0] if jax.tree_util.all_leaves([value]) else f"{structure} of {found}"


def _isolated(run: Callable[..., Any], *arguments: Any) -> jax_core.ClosedJaxpr:
    """The trace; raises unless it does only what is done to each record alone."""
    try:
        # A new function each time, as JAX remembers the traces of old ones.
        closed = jax.make_jaxpr(lambda *a: run(*a))(*arguments)
    except NameError as error:  # an unbound axis name
        raise ValueError(f"loss_fn: {_ISOLATION}; {error}") from None
    refused = sorted({*_refused(closed)})
    if refused:
        raise ValueError(f"loss_fn: {_ISOLATION}; found {refused}.")
    return closed


def _are_same(first: jax_core.ClosedJaxpr, second: jax_core.ClosedJaxpr) -> bool:
    """Whether two traces are equal; their text says nothing of constants."""
    if str(first) != str(second):
        return False
    a = list(_constants(first))
    b = list(_constants(second))
    return len(a) == len(b) and all(map(_is_same, a, b))


def _refused(closed: jax_core.ClosedJaxpr) -> Iterator[str]:
    """Names of the primitives, effects and key types that may mix records, and what was kept from another trace."""
    threefry = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype
    for jaxpr, constants in _jaxprs(closed):
        yield from (type(x).__name__ for x in constants if isinstance(x, jax.core.Tracer))
        yield from (type(effect).__name__ for effect in jaxpr.effects)
        variables = [*jaxpr.invars, *jaxpr.constvars]
        for equation in jaxpr.eqns:
            variables += equation.outvars
            if equation.primitive.name not in _ROW_BY_ROW:
                yield equation.primitive.name
        # Other generators draw with the first record's key for all records under vmap.
        dtypes = {getattr(variable.aval, "dtype", None) for variable in variables}
        yield from (str(x) for x in dtypes if _is_key(x) and x != threefry)


def _constants(closed: jax_core.ClosedJaxpr) -> Iterator[Any]:
    """All arrays that a trace holds, also in the functions that it calls and as literals."""
    for jaxpr, constants in _jaxprs(closed):
        yield from constants
        for equation in jaxpr.eqns:
            yield from (x.val for x in equation.invars if isinstance(x, jax_core.Literal))
            yield from (x for x in _parts(equation) if isinstance(x, np.ndarray | jax.Array))


def _is_same(a: Any, b: Any) -> bool:
    """Bit by bit, as NaN may be a constant too; what is one object is not looked at."""
    if a is b:
        return True
    first = _on_host(a)
    second = _on_host(b)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return np.array_equal(first.reshape(-1).view(np.uint8), second.reshape(-1).view(np.uint8))


def _on_host(x: Any) -> np.ndarray:
    data = jax.random.key_data(x) if _is_key(getattr(x, "dtype", None)) else x
    return np.ascontiguousarray(data)


def _is_key(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _jaxprs(closed: jax_core.ClosedJaxpr) -> Iterator[tuple[jax_core.Jaxpr, Any]]:
    """A jaxpr and all that its equations call, each once, with the constants of each."""
    seen: set[int] = set()
    waiting: list[Any] = [closed]
    while waiting:
        part = waiting.pop()
        is_closed = isinstance(part, jax_core.ClosedJaxpr)
        jaxpr = part.jaxpr if is_closed else part
        constants = part.consts if is_closed else ()
        if id(jaxpr) in seen:
            continue
        seen.add(id(jaxpr))
        yield jaxpr, constants
        for equation in jaxpr.eqns:
            waiting += [x for x in _parts(equation) if _is_jaxpr(x)]


def _parts(equation: jax_core.JaxprEqn) -> list[Any]:
    """All that an equation holds: functions that it calls, alone or in tuples as branches are, and arrays."""
    return jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr)
