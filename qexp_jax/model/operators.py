"""The linear map behind a `Subspace`: how P lifts coordinates to tuned leaves, and P^T takes gradients back.

One interface, an `Operator`, and a small implementation for each way to hold P:

    WHOLE       the identity: coordinates are the leaves, one after the other; but for some that stay: `holding`
    DENSE       a stored basis, one (k, *shape) array per tuned leaf
    from_key    a random projection, made again from its key at each call, see `panels`
    COMPOSED    directions inside another subspace

An operator holds no numbers, and is the same object for equal constructions, so that they compile once; the numbers are
the arrays of the `Subspace`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.model import count_sketch, gaussian_sketch
from qexp_jax.model.factored_gradients import Rows
from qexp_jax.model.layout import Layout

# P^T is the exact adjoint of P only where neither is computed with fewer bits, as accelerators do by default.
_HIGHEST = jax.lax.Precision.HIGHEST


class Operator(NamedTuple):
    """A linear map, as functions of (layout, arrays, argument) that compare equal where they are.

    Attributes:
      lift: from (k,) to the tuned leaves.
      project: its adjoint.
      gram: P^T P (k, k), where there is a way cheaper than k lifts.
      project_rows: the adjoint on `Rows`, where it need not form gradients.
    """

    lift: Callable[[Layout, Any, jax.Array], list[jax.Array]]
    project: Callable[[Layout, Any, list[jax.Array]], jax.Array]
    gram: Callable[[Layout, Any], jax.Array] | None = None
    project_rows: Callable[[Layout, Any, Rows], jax.Array] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["dim", "layout", "operator", "orthonormal", "name"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """A public subspace; use it through `lift`, `project`, `displace` and `gram`.

    Attributes:
      dim: k.
      layout: the parameters it belongs to.
      operator: the pair of functions on tuned leaves.
      orthonormal: whether P^T P is the identity by construction.
      name: what it is; the certificate holds its `certified_name`.
      arrays: its numbers (a basis, a key), a pytree.
    """

    dim: int
    layout: Layout
    operator: Operator
    orthonormal: bool
    name: str
    arrays: Any


# --- the whole space of the tuned leaves ---


def split(layout: Layout, _: None, w: jax.Array) -> list[jax.Array]:
    """Coordinates (d,) as the tuned leaves."""
    sizes = [int(np.prod(s)) for s in layout.tuned_shapes]
    parts = jnp.split(w, np.cumsum(sizes)[:-1])  # the last end is no cut
    return [x.reshape(s) for x, s in zip(parts, layout.tuned_shapes, strict=True)]


def concatenate(layout: Layout, _: None, leaves: list[jax.Array]) -> jax.Array:
    """The tuned leaves as coordinates (d,)."""
    return jnp.concatenate([x.ravel() for x in leaves])


WHOLE = Operator(lift=split, project=concatenate)


# --- dense bases, one (k, *shape) array per tuned leaf ---


def _combine(layout: Layout, basis: list[jax.Array], w: jax.Array) -> list[jax.Array]:
    return [jnp.tensordot(w, b, axes=1, precision=_HIGHEST) for b in basis]


def _inner(layout: Layout, basis: list[jax.Array], leaves: list[jax.Array]) -> Any:
    return sum(
        jnp.tensordot(b.reshape(len(b), -1), x.ravel(), axes=1, precision=_HIGHEST)
        for b, x in zip(basis, leaves, strict=True)
    )


DENSE = Operator(lift=_combine, project=_inner)


# --- random projections, made again from their keys at each call: see `panels` ---

_KINDS = {"count_sketch": count_sketch, "gaussian": gaussian_sketch}


@functools.cache
def from_key(kind: str, dim: int) -> Operator:
    """One operator for each kind and dimension, so that equal constructions compile once.

    Args:
      kind: key of `_KINDS`.
      dim: k.
    """
    module = _KINDS[kind]
    lift = module.lift
    project = module.project
    # Not every kind has these two.
    gram = getattr(module, "gram", None)
    project_rows = getattr(module, "project_rows", None)
    # Lambdas compare by identity, hence the cache: a new one would compile everything anew.
    return Operator(
        lift=lambda layout, key, w: lift(layout.tuned_shapes, key, w),
        project=lambda layout, key, leaves: project(layout.tuned_shapes, key, dim, leaves),
        gram=gram and (lambda layout, key: gram(layout.tuned_shapes, key, dim, layout.dtype)),
        project_rows=project_rows and (lambda layout, key, rows: project_rows(layout.tuned_shapes, key, dim, rows)),
    )


# --- directions inside another subspace ---


def _composed_lift(layout: Layout, arrays: tuple[Subspace, jax.Array], w: jax.Array) -> list[jax.Array]:
    outer, basis = arrays
    # Through the outer coordinates: the product of both maps, (d, k), is never formed.
    inside = jnp.matmul(basis, w, precision=_HIGHEST)
    return outer.operator.lift(layout, outer.arrays, inside)


def _composed_project(layout: Layout, arrays: tuple[Subspace, jax.Array], leaves: list[jax.Array]) -> jax.Array:
    outer, basis = arrays
    inside = outer.operator.project(layout, outer.arrays, leaves)
    return jnp.matmul(basis.T, inside, precision=_HIGHEST)


COMPOSED = Operator(lift=_composed_lift, project=_composed_project)
