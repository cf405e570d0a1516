"""The roots of precisions that are known along a few directions; all others have one eigenvalue, or an infinite one.

With orthonormal rows V (r, d) and eigenvalues (r,),

    LOW_RANK    H = rest (I - V^T V) + V^T diag(eigenvalues) V;     arrays are (rest, V, eigenvalues)
    LEADING     H = V^T diag(eigenvalues) V, infinite elsewhere;    arrays are (V, eigenvalues)

The symmetric root H^{1/2} is its own transpose, so whitening and coloring are one function, in O(d r).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qexp_jax.model.factored_gradients import BLOCK, Rows, squares
from qexp_jax.numerics.rounding import of_sum
from qexp_jax.quadratic import directions as directions_of
from qexp_jax.quadratic.components import scale
from qexp_jax.quadratic.directions import Directions, along, along_each, combine
from qexp_jax.quadratic.roots import Root, as_it_is, lost, of_one_size, opaque, with_norms

_LowRank = tuple[jax.Array, Directions | jax.Array, jax.Array]
_Leading = tuple[Directions | jax.Array, jax.Array]
_NOT_ORTHONORMAL = 1e-5  # how far V V^T may be from the identity


def _scale_by(power: float) -> Callable[[_LowRank, jax.Array], jax.Array]:
    """x -> H^power x."""

    def apply(arrays: _LowRank, x: jax.Array) -> jax.Array:
        rest, vectors, eigenvalues = arrays
        return scale(vectors, jnp.append(eigenvalues, rest) ** power, x)

    return apply


def _coordinates(arrays: _LowRank, rows: Rows, scale: jax.Array | float) -> tuple[Rows, jax.Array]:
    """The gradients as they are; norms from the r leading coordinates and the norm of g alone.

    Both are rounded in proportion to |g|, and where they cancel, what is left may be rounding alone. It counts with the
    weight of the smallest eigenvalue, with which it may come out of whitening.
    """
    rest, vectors, eigenvalues = arrays
    scale = opaque(scale)
    inside = (along_each(vectors, rows) * scale) ** 2
    total = squares(rows, scale)
    outside = jnp.maximum(total - jnp.sum(inside, axis=1), 0)
    relative = directions_of.rounding(vectors, rows) + of_sum(max(vectors.shape), BLOCK)
    error = _NOT_ORTHONORMAL + 4 * relative
    smallest = jnp.minimum(rest, eigenvalues.min())
    slack = (error * total + lost(vectors.shape[1])) / smallest
    whitened_inside = jnp.sum(inside / eigenvalues, axis=1)
    return rows, jnp.sqrt(outside / rest + whitened_inside + slack)


def _spread(arrays: _LowRank) -> tuple[jax.Array, jax.Array]:
    rest, _, eigenvalues = arrays
    values = jnp.append(eigenvalues, rest)
    return jnp.sqrt(values.max()), jnp.sqrt(values.min())


LOW_RANK = Root(
    whiten=_scale_by(-0.5),
    color=_scale_by(-0.5),
    uncolor=_scale_by(0.5),
    coordinates=_coordinates,
    shape=_scale_by(0.5),
    whiten_sum=_scale_by(-0.5),
    spread=_spread,
)


def _leading_scale_by(power: float) -> Callable[[_Leading, jax.Array], jax.Array]:
    """x -> V^T diag(eigenvalues)^power V x, nothing outside."""

    def apply(arrays: _Leading, x: jax.Array) -> jax.Array:
        vectors, eigenvalues = arrays
        return combine(vectors, eigenvalues**power * along(vectors, x))

    return apply


def _leading_coordinates(arrays: _Leading, rows: Rows, scale: jax.Array | float) -> tuple[Rows, jax.Array]:
    """Along the r directions, whitened: what a gradient is elsewhere is left behind before anything is added."""
    vectors, eigenvalues = arrays
    whitened = along_each(vectors, rows) / jnp.sqrt(eigenvalues)
    return with_norms(whitened, scale)


def _leading_whiten_sum(arrays: _Leading, total: jax.Array) -> jax.Array:
    vectors, _ = arrays
    return combine(vectors, total)


def _leading_spread(arrays: _Leading) -> tuple[jax.Array, jax.Array]:
    _, eigenvalues = arrays
    return of_one_size(eigenvalues)


LEADING = Root(
    whiten=_leading_scale_by(-0.5),
    color=_leading_scale_by(-0.5),
    uncolor=_leading_scale_by(0.5),
    coordinates=_leading_coordinates,
    shape=as_it_is,
    whiten_sum=_leading_whiten_sum,
    spread=_leading_spread,
)
