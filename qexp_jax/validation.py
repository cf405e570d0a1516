"""Checks of public and static input, before any private value is read.

Each raises ValueError with the offending value or shape. None looks at a private value: of the private records only
structure, shapes and dtypes are checked.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from qexp_jax.records import LossFn, Params, Record, num_records
from qexp_jax.subspace import Layout

_ISOLATION = (
    "a loss must be a pure function of one record: no collective, callback or side effect, "
    "or records are not isolated from each other"
)
_REFUSED = (
    "psum",
    "pmean",
    "pmax",
    "pmin",
    "ppermute",
    "all_gather",
    "all_to_all",
    "reduce_scatter",
    "axis_index",
)


def check_key(key: Any) -> None:
    """Raises unless `key` is one typed key; never prints it."""
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape != ():
        found = f"dtype {key.dtype}, shape {key.shape}" if hasattr(key, "dtype") else type(key).__name__
        raise ValueError(f"Expected one typed key from jax.random.key, not a seed or an array; found {found}.")


def check_records(name: str, records: Record, *, allow_empty: bool = False) -> int:
    """The number of records; raises if they are empty or their leading axes differ."""
    try:
        n = num_records(records)
    except ValueError as error:
        raise ValueError(f"{name} records: {error}") from None
    if n == 0 and not allow_empty:
        raise ValueError(f"Expected at least one {name} record, found leading axis 0.")
    return n


def check_same_structure(public: Record, private: Record) -> None:
    """Raises unless the private records are the same pytree as the public ones; shapes and dtypes may differ."""
    expected: Any = jax.tree.structure(public)
    found: Any = jax.tree.structure(private)
    if found != expected:
        raise ValueError(f"Expected private records of the public ones' structure {expected}, found {found}.")


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _is_on_host(leaf: Any) -> bool:
    """NumPy arrays are looked at where they are: to copy all records to a device can take longer than a release."""
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"


def _as_held(leaf: Any) -> Any:
    """Of the precision that JAX will hold it in, where a large float64 is infinite."""
    with np.errstate(over="ignore"):
        return leaf.astype(jnp.result_type(leaf), copy=False) if _is_on_host(leaf) else leaf


def _is_finite_on_host(x: np.ndarray) -> bool:
    """In one pass: a sum tells, unless it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(x)) or np.all(np.isfinite(x)))


def check_finite(name: str, tree: Any) -> None:
    """Raises, with the path and shape of the leaf, if a floating-point leaf of a **public** tree is not finite."""
    named = [
        (path, _as_held(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    on_device = [leaf for _, leaf in named if not _is_on_host(leaf)]
    if all(_is_finite_on_host(x) for _, x in named if _is_on_host(x)) and (not on_device or _all_finite(on_device)):
        return
    bad = next((path, leaf) for path, leaf in named if not jnp.all(jnp.isfinite(leaf)))
    value = np.asarray(bad[1], np.float64)
    raise ValueError(
        f"Expected finite {name}, found {value[~np.isfinite(value)].flat[0]} in leaf "
        f"{jax.tree_util.keystr(bad[0])} of shape {value.shape}."
    )


def check_loss(loss_fn: LossFn, layout: Layout, params: Params, records: Record) -> None:
    """Traces the loss on one abstract record, outside any mapped axis, and raises unless it is a pure scalar."""
    dtypes = [layout.dtype if tuned else dtype for dtype, tuned in zip(layout.dtypes, layout.tuned, strict=True)]
    anchor = jax.tree.unflatten(jax.tree.structure(params), list(map(jax.ShapeDtypeStruct, layout.shapes, dtypes)))
    record = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), records)
    leaves, treedef = jax.tree.flatten((anchor, record))
    try:
        hash(loss_fn)
    except TypeError:
        raise ValueError(f"Expected a hashable loss_fn, found {type(loss_fn).__name__}.") from None
    _check_traced(loss_fn, treedef, tuple((x.shape, x.dtype) for x in leaves))


@functools.lru_cache(maxsize=256)
def _check_traced(loss_fn, treedef, avals) -> None:
    arguments = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(*aval) for aval in avals])
    try:
        first, second = (jax.make_jaxpr(lambda *a: loss_fn(*a))(*arguments) for _ in range(2))
    except NameError as error:  # an unbound axis name
        raise ValueError(f"loss_fn: {_ISOLATION}; {error}") from None
    outputs = first.out_avals
    if len(outputs) != 1 or outputs[0].shape != () or not jnp.issubdtype(outputs[0].dtype, jnp.floating):
        raise ValueError(f"Expected loss_fn to return one floating-point scalar, found {outputs}.")
    refused = sorted(name for name in set(_primitives(first.jaxpr)) if name.startswith(_REFUSED) or "callback" in name)
    if refused or first.effects:
        raise ValueError(f"loss_fn: {_ISOLATION}; found {refused or first.effects}.")
    same = str(first) == str(second) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(map(np.asarray, first.consts), map(np.asarray, second.consts), strict=True)
    )
    if not same:
        raise ValueError(f"loss_fn: {_ISOLATION}; two traces of it differ, so that it reads a changing state.")


def _primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr),
        ):
            if isinstance(inner, jax_core.ClosedJaxpr):
                yield from _primitives(inner.jaxpr)
            elif isinstance(inner, jax_core.Jaxpr):
                yield from _primitives(inner)
