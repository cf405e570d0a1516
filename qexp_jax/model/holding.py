"""Coordinates of a whole space that stay where they are.

A pixel that is black in all public records gives a gradient of zero in each of them: nothing public says how far to go
there, and noise would be all that a step had. Such coordinates are held, without a copy of the parameters that move:
of a matrix the rows and columns that do are enough.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.model.factored_gradients import Outer, Rows
from qexp_jax.model.layout import Layout
from qexp_jax.model.operators import Operator, Subspace, concatenate, split


def _where_moved(moved: Any, x: jax.Array) -> jax.Array:
    """A leaf, zero where it is held; `moved` is an array like it, or the rows and columns of a matrix that move."""
    if isinstance(moved, Outer):
        return jnp.where(moved.left[:, None] & moved.right, x, 0)
    return jnp.where(moved.reshape(x.shape), x, 0)


def _moved_split(layout: Layout, moved: Rows, w: jax.Array) -> list[jax.Array]:
    return [_where_moved(m, x) for m, x in zip(moved, split(layout, None, w), strict=True)]


def _moved_concatenate(layout: Layout, moved: Rows, leaves: list[jax.Array]) -> jax.Array:
    return concatenate(layout, None, [_where_moved(m, x) for m, x in zip(moved, leaves, strict=True)])


HELD_IN_PART = Operator(lift=_moved_split, project=_moved_concatenate)


def holding(subspace: Subspace, moved: Rows) -> Subspace:
    """A whole space of which some coordinates are held: gradients have no part there, and no step goes there.

    Args:
      subspace: whole.
      moved: for each tuned leaf bools, flat; or an `Outer` of those of a matrix's rows and columns.
    """
    return dataclasses.replace(subspace, operator=HELD_IN_PART, arrays=moved)


def num_moved(subspace: Subspace) -> int:
    """How many of its coordinates are not held; on the host."""
    if subspace.operator != HELD_IN_PART:
        return subspace.dim
    return sum(math.prod(int(np.sum(x)) for x in jax.tree.leaves(m)) for m in subspace.arrays)


def without_held(subspace: Subspace, x: jax.Array) -> jax.Array:
    """A vector (k,) with zeros where the subspace holds its coordinates."""
    if subspace.operator != HELD_IN_PART:
        return x
    leaves = _moved_split(subspace.layout, subspace.arrays, x)
    return concatenate(subspace.layout, None, leaves)


def rows_without_held(subspace: Subspace, rows: Rows) -> Rows:
    """The same of gradients in parts, one of each tuned leaf."""
    if subspace.operator != HELD_IN_PART:
        return rows
    return [_row_without_held(m, x) for m, x in zip(subspace.arrays, rows, strict=True)]


def _row_without_held(moved: Any, part: Any) -> Any:
    """Of one leaf's part of the gradients, whole (n, size) or in factors."""
    # Gradients in factors are those of a wide matrix, for which what moves is in factors as well.
    if isinstance(part, Outer):
        return Outer(*(jnp.where(m, x, 0) for m, x in zip(moved, part, strict=True)))

    def row_without_held(x: jax.Array) -> jax.Array:
        leaf = x.reshape(len(moved.left), len(moved.right)) if isinstance(moved, Outer) else x
        return _where_moved(moved, leaf).ravel()

    return jax.vmap(row_without_held)(part)
