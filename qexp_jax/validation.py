"""Checks of public and static input, before any private value is read.

Each raises ValueError with the offending value or shape. None looks at a private value: of the private records only
structure, shapes and dtypes are checked.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from qexp_jax.records import LossFn, Params, Record, held, num_records
from qexp_jax.subspace import Layout

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


def check_key(key: Any) -> None:
    """Raises unless `key` is one typed key; never prints it."""
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape != ():
        found = f"dtype {key.dtype}, shape {key.shape}" if hasattr(key, "dtype") else type(key).__name__
        raise ValueError(f"Expected one typed key from jax.random.key, not a seed or an array; found {found}.")


def check_records(name: str, records: Record, *, allow_empty: bool = False, hide_length: bool = False) -> int:
    """The number of records; raises if they are empty or their leading axes differ.

    Args:
      name: `"public"` or `"private"`.
      records: pytree with a leading axis.
      allow_empty: whether there may be none.
      hide_length: leave lengths out of the error, where the number of records is private.
    """
    try:
        n = num_records(records, hide_length=hide_length)
    except ValueError as error:
        raise ValueError(f"{name} records: {error}") from None
    if n == 0 and not allow_empty:
        raise ValueError(f"Expected at least one {name} record, found leading axis 0.")
    return n


def check_same_structure(public: Record, private: Record) -> None:
    """Raises unless the private records are the same pytree as the public ones; shapes and dtypes may differ.

    Of the private ones it says the type alone: keys of a dictionary may be names, and a list as long as there are
    records.
    """
    expected: Any = jax.tree.structure(public)
    try:
        found: Any = jax.tree.structure(private)
    except Exception:  # of keys that have no order, or of a class that takes itself apart
        found = None
    if found is None or found != expected:
        kind = f"{type(private).__module__}.{type(private).__qualname__}"
        raise ValueError(
            f"Expected private records of the public ones' structure {expected}, found another structure in a {kind}."
        )


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _is_on_host(leaf: Any) -> bool:
    """NumPy arrays are looked at where they are: to copy all records to a device can take longer than a release."""
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"


def _is_finite_on_host(x: np.ndarray) -> bool:
    """In one pass: a sum tells, unless it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(x)) or np.all(np.isfinite(x)))


def check_finite(name: str, tree: Any) -> None:
    """Raises, with the path and shape of the leaf, if a floating-point leaf of a **public** tree is not finite."""
    named = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(held(tree, name, hide_length=False))
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    on_device = [leaf for _, leaf in named if not _is_on_host(leaf)]
    if all(_is_finite_on_host(x) for _, x in named if _is_on_host(x)) and (not on_device or _all_finite(on_device)):
        return
    bad = next((path, leaf) for path, leaf in named if not jnp.all(jnp.isfinite(leaf)))
    value = np.asarray(bad[1])
    raise ValueError(
        f"Expected finite {name}, found {value[~np.isfinite(value)].flat[0]} in leaf "
        f"{jax.tree_util.keystr(bad[0])} of shape {value.shape}."
    )


def check_apart(public: Any, private: Any) -> None:
    """Raises if private records are public ones: the same object, or arrays with a number of their memory in common.

    Looks at where the arrays lie, and at no value: copies of public records go unnoticed.
    """
    pairs = itertools.product(_leaves(public), _leaves(private))
    if public is private or any(_is_shared(a, b) for a, b in pairs):
        raise ValueError(
            "Expected private records apart from the public ones, found the same arrays in both: no private unit may "
            "contribute to the public data, and records that are public need no privacy."
        )


def _leaves(tree):
    try:
        return jax.tree.leaves(tree)
    except Exception:  # what cannot be taken apart `check_same_structure` refuses
        return []


def _is_shared(a, b):
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        is_text_or_number = isinstance(a, bool | int | float | complex | str)
        return not is_text_or_number and (a is b or _is_same_stream(a, b))
    if _is_constant(a) or _is_constant(b):
        return False
    try:
        # The bound is on the work of an exact answer, which any two tables of rows need little of.
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def _is_same_stream(a, b):
    return hasattr(a, "begin") and a.begin is getattr(b, "begin", None)


def _is_constant(x):
    """Whether the records hold one row in common, such as a graph, which `np.broadcast_to` lays out so."""
    return x.ndim > 0 and len(x) > 1 and x.strides[0] == 0


def check_devices(**trees: Any) -> None:
    """Raises if arrays that were put on devices were put on different ones, with the arguments' names and the devices.

    JAX moves no such array by itself; it would raise in the middle of a release.
    """
    found = [(name, devices) for name, tree in trees.items() for devices in _devices(tree)]
    if len({devices for _, devices in found}) > 1:
        places = ", ".join(f"{name} on {sorted(map(str, devices))}" for name, devices in found)
        raise ValueError(f"Expected all arrays on the same devices, found {places}: move them with jax.device_put.")


def _devices(tree):
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    return {frozenset(x.sharding.device_set) for x in arrays if x.committed}


def check_configuration() -> None:
    """Raises where JAX is told to raise at a value that is not finite: such a value may be private."""
    for name in ("jax_debug_nans", "jax_debug_infs"):
        if getattr(jax.config, name):
            raise ValueError(f"Expected {name} to be off, found it on: it raises where a private value is not finite.")


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
    anchor = jax.tree.unflatten(jax.tree.structure(params), list(map(jax.ShapeDtypeStruct, layout.shapes, dtypes)))
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), records)
    leaves, treedef = jax.tree.flatten((anchor, record))
    moves = layout.tuned + (False,) * (len(leaves) - len(layout.tuned))
    try:
        hash(loss_fn)
    except TypeError:
        raise ValueError(f"Expected a hashable loss_fn, found {type(loss_fn).__name__}.") from None
    avals = tuple((x.shape, x.dtype) for x in leaves)
    key_dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    _check_traced(loss_fn, treedef, moves, avals, key_dtype)


@functools.lru_cache(maxsize=256)
def _check_traced(loss_fn, treedef, moves, avals, key_dtype) -> None:
    """`key_dtype`, of the keys that a loss makes, is there for the cache: the same loss is another under another."""
    loss = _loss_of_leaves(loss_fn, treedef, moves)
    moving = [jax.ShapeDtypeStruct(*aval) for aval, moved in zip(avals, moves, strict=True) if moved]
    fixed = [jax.ShapeDtypeStruct(*aval) for aval, moved in zip(avals, moves, strict=True) if not moved]

    def derivative(leaves, others, tangents):
        return jax.jvp(lambda x: loss(x, others), (leaves,), (tangents,))

    _isolated(loss, moving, fixed)
    _isolated(derivative, moving, fixed, moving)
    first, second = (_isolated(jax.value_and_grad(loss), moving, fixed) for _ in range(2))
    if not _are_same(first, second):
        raise ValueError(f"loss_fn: {_ISOLATION}; two traces of it differ, so that it reads a changing state.")


def _loss_of_leaves(loss_fn, treedef, moves):
    """The loss as a function of the leaves that it is differentiated by, and of the others."""

    def loss(moving, fixed):
        leaves, others = iter(moving), iter(fixed)
        anchor, record = jax.tree.unflatten(treedef, [next(leaves if moved else others) for moved in moves])
        value = loss_fn(anchor, record)
        _check_scalar(value)
        return value

    return loss


def _check_scalar(value):
    is_traced = isinstance(value, jax.core.Tracer)
    if is_traced and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        return
    is_constant = jax.tree_util.all_leaves([value]) and not is_traced
    reason = ", which does not depend on the parameters" if is_constant else ""
    raise ValueError(f"Expected loss_fn to return one floating-point scalar, found {_described(value)}{reason}.")


def _described(value):
    """Structure, types and shapes; no values."""
    leaves, structure = jax.tree.flatten(value)
    found = [f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__ for x in leaves]
    return found[0] if jax.tree_util.all_leaves([value]) else f"{structure} of {found}"


def _isolated(run, *arguments):
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


def _are_same(first, second):
    """Whether two traces are equal; their text says nothing of constants."""
    a, b = list(_constants(first)), list(_constants(second))
    return str(first) == str(second) and len(a) == len(b) and all(map(_is_same, a, b))


def _refused(closed):
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
        dtypes = {getattr(variable.aval, "dtype", None) for variable in variables}
        yield from (str(x) for x in dtypes if _is_key(x) and x != threefry)


def _constants(closed):
    """All arrays that a trace holds, also in the functions that it calls and as literals."""
    for jaxpr, constants in _jaxprs(closed):
        yield from constants
        for equation in jaxpr.eqns:
            yield from (x.val for x in equation.invars if isinstance(x, jax_core.Literal))
            yield from (x for x in _parts(equation) if isinstance(x, np.ndarray | jax.Array))


def _is_same(a, b):
    """Bit by bit, as NaN may be a constant too; what is one object is not looked at."""
    if a is b:
        return True
    a, b = _on_host(a), _on_host(b)
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def _on_host(x):
    data = jax.random.key_data(x) if _is_key(getattr(x, "dtype", None)) else x
    return np.ascontiguousarray(data)


def _is_key(dtype):
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _jaxprs(closed):
    """A jaxpr and all that its equations call, each once, with the constants of each."""
    seen, waiting = set(), [closed]
    while waiting:
        part = waiting.pop()
        jaxpr, constants = (part.jaxpr, part.consts) if isinstance(part, jax_core.ClosedJaxpr) else (part, ())
        if id(jaxpr) in seen:
            continue
        seen.add(id(jaxpr))
        yield jaxpr, constants
        for equation in jaxpr.eqns:
            waiting += [x for x in _parts(equation) if _is_jaxpr(x)]


def _parts(equation):
    return jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)


def _is_jaxpr(x):
    return isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr)
