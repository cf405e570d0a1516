"""Checks of public and static input, before any private value is read.

Each raises ValueError with the offending value or shape. None looks at a private value: of the private records only
structure, shapes and dtypes are checked.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Record, held, num_records
from qexp_jax.numerics.compilation import compiled


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


@compiled
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
    on_host = [leaf for _, leaf in named if _is_on_host(leaf)]
    on_device = [leaf for _, leaf in named if not _is_on_host(leaf)]
    # One program for all leaves on devices, so that the host waits once.
    if all(map(_is_finite_on_host, on_host)) and (not on_device or _all_finite(on_device)):
        return
    path, leaf = next((path, leaf) for path, leaf in named if not jnp.all(jnp.isfinite(leaf)))
    value = np.asarray(leaf)
    raise ValueError(
        f"Expected finite {name}, found {value[~np.isfinite(value)].flat[0]} in leaf "
        f"{jax.tree_util.keystr(path)} of shape {value.shape}."
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


def _leaves(tree: Any) -> list[Any]:
    try:
        return jax.tree.leaves(tree)
    except Exception:  # what cannot be taken apart `check_same_structure` refuses
        return []


def _is_shared(a: Any, b: Any) -> bool:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        # Python holds one object for many equal numbers and texts.
        is_text_or_number = isinstance(a, bool | int | float | complex | str)
        return not is_text_or_number and (a is b or _is_same_stream(a, b))
    if _is_constant(a) or _is_constant(b):
        return False
    try:
        # The bound is on the work of an exact answer, which any two tables of rows need little of.
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def _is_same_stream(a: Any, b: Any) -> bool:
    """Two `stream.Stream` of one function."""
    return hasattr(a, "begin") and a.begin is getattr(b, "begin", None)


def _is_constant(x: np.ndarray) -> bool:
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


def _devices(tree: Any) -> set[frozenset[Any]]:
    """The sets of devices that arrays were put on; what JAX put somewhere by default it also moves."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    return {frozenset(x.sharding.device_set) for x in arrays if x.committed}


def check_configuration() -> None:
    """Raises where JAX is told to raise at a value that is not finite: such a value may be private."""
    for name in ("jax_debug_nans", "jax_debug_infs"):
        if getattr(jax.config, name):
            raise ValueError(f"Expected {name} to be off, found it on: it raises where a private value is not finite.")
