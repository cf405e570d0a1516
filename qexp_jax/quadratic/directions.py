"""Orthonormal directions U (r, k) in which public gradients are large: an array, or outer products in wide matrices.

The gradient of a dense layer is the outer product x y^T of its input and the derivative by its output
(`factored_gradients`). With p_i and q_j the principal axes of x and of y over public records, the products p_i q_j^T
are orthonormal directions along which it costs (p_i . x)(q_j . y): as many multiplications as the axes are long, where
an array of r directions takes r times as many as the layer has parameters. Of these products, and of the principal
directions of all parameters that are in no wide matrix, the r of largest second moments are taken, as in a
Kronecker-factored curvature with rescaled eigenvalues (George et al., arXiv:1806.03884). The 64 leading axes of x and
of y are looked at.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.model.factored_gradients import Outer, Rows, whole
from qexp_jax.numerics.rounding import of_sum
from qexp_jax.quadratic.eigenspace import leading_basis

_HIGHEST = jax.lax.Precision.HIGHEST
_AXES = 64


class _Axis(NamedTuple):
    """One factor of each direction: the columns of B C.

    Attributes:
      basis: B (a, p), orthonormal columns; None for the identity, of a short axis.
      picks: C (p, r); zero for a direction of other parameters.
    """

    basis: jax.Array | None
    picks: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["others", "factors"], meta_fields=["shapes"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Directions:
    """Rows of U that are outer products in wide matrices; use it through `along` and `combine`, as an array (r, k).

    Attributes:
      others: (r, c) what they are in all other parameters.
      factors: of each part of the k coordinates its two axes, or None where it is one of the others.
      shapes: of each part: (a, b), or (size,).
    """

    others: jax.Array
    factors: tuple[tuple[_Axis, _Axis] | None, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(r, k)."""
        return len(self.others), sum(math.prod(s) for s in self.shapes)

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return self.others.dtype

    def __len__(self) -> int:
        """Give r."""
        return len(self.others)


def along(directions: Directions | jax.Array, x: jax.Array) -> jax.Array:
    """U x, (k,) -> (r,)."""
    if isinstance(directions, Directions):
        return along_each(directions, [x[None]])[0]
    return _product(directions, x)


def combine(directions: Directions | jax.Array, coefficients: jax.Array) -> jax.Array:
    """U^T c, (r,) -> (k,)."""
    # From the left: XLA's CPU product with the transpose takes up to ten times as long.
    if not isinstance(directions, Directions):
        return _product(coefficients, directions)
    in_others = _product(coefficients, directions.others)
    others = iter(_split(in_others, _other_sizes(directions)))
    parts = []
    for axes in directions.factors:
        if axes is None:
            part = next(others)
        else:
            left, right = axes
            part = _sum_of_products(left, right, coefficients).ravel()
        parts.append(part)
    return jnp.concatenate(parts)


def along_each(directions: Directions | jax.Array, rows: Rows) -> jax.Array:
    """U g of each of m gradients, (m, r)."""
    # Directions from the left: XLA's CPU product takes two thirds of the time.
    if not isinstance(directions, Directions):
        return _product(directions, whole(rows).T).T
    if len(rows) == 1 < len(directions.shapes):
        # Formed gradients come in one part.
        rows = _split(rows[0], [math.prod(s) for s in directions.shapes])
    parts = list(zip(rows, directions.factors, directions.shapes, strict=True))
    others = [part for part, axes, _ in parts if axes is None]
    found = [_along_products(part, axes, shape) for part, axes, shape in parts if axes is not None]
    start: Any = 0
    if others:
        start = _product(directions.others, whole(others).T).T
    return sum(found, start=start)


def rounding(directions: Directions | jax.Array, rows: Rows) -> float:
    """A bound on the error of `along_each` over a gradient's norm, |U g computed - U g| / |g|; of shapes alone."""
    rank = len(directions)
    if not isinstance(directions, Directions):
        return _rounding(directions.shape[1], rank)
    num_others = directions.others.shape[1]
    found = []
    if num_others:
        found.append(_rounding(num_others, rank))
    for i, axes in enumerate(directions.factors):
        if axes:
            is_outer = len(rows) > 1 and isinstance(rows[i], Outer)
            found.append(_rounding_along_products(axes, rank, is_outer))
    # Each part's error is met by the gradient's norm in that part, and by Cauchy and Schwarz these bound the sum.
    return math.hypot(*found)


def _rounding(length: int, rank: int) -> float:
    """Of products with `rank` vectors of length 1, whose absolute values have a norm of at most sqrt(rank) together."""
    return math.sqrt(min(length, rank)) * of_sum(length)


def _rounding_along_products(axes: tuple[_Axis, _Axis], rank: int, is_outer: bool) -> float:
    """Products of orthonormal axes: the error of one factor is met by the whole of the other."""
    lengths = [0 if axis.basis is None else len(axis.basis) for axis in axes]
    dims = [len(axis.picks) for axis in axes]
    found = sum(_rounding(length, dim) for length, dim in zip(lengths, dims, strict=True))
    if is_outer:
        return found + sum(_rounding(dim, dim) for dim in dims)
    return found + _rounding(math.prod(dims), rank)


def leading(rows: Rows, rank: int) -> Directions | jax.Array:
    """Directions of much energy: where gradients are outer products, `Directions`, else `eigenspace.leading_basis`.

    Args:
      rows: of n gradients.
      rank: r <= min(n, k).
    """
    if not any(isinstance(x, Outer) for x in rows):
        return leading_basis(whole(rows), rank).T
    others: Rows = [x for x in rows if not isinstance(x, Outer)]
    blocks: list[Any] = [_principal_products(x, rank) for x in rows if isinstance(x, Outer)]
    if others:
        blocks.append(_principal_directions(whole(others), rank))
    energies = [energy for energy, _ in blocks]
    _, chosen = jax.lax.top_k(jnp.concatenate(energies), rank)
    starts = np.cumsum([0, *map(len, energies)])
    # Every block has a column for each direction, zero where another block holds it: shapes must not depend on values.
    columns = [_picked(vectors, chosen - start) for start, (_, vectors) in zip(starts, blocks, strict=False)]
    picked = iter(columns)
    factors = tuple(next(picked) if isinstance(x, Outer) else None for x in rows)
    in_others = next(picked).T if others else jnp.zeros((rank, 0), energies[0].dtype)
    return Directions(others=in_others, factors=factors, shapes=tuple(_part_shape(x) for x in rows))


def _part_shape(part: jax.Array | Outer) -> tuple[int, ...]:
    """(a, b) of gradients of a wide matrix, or (size,)."""
    if isinstance(part, Outer):
        return part.left.shape[1], part.right.shape[1]
    return part.shape[1:]


def _principal_directions(rows: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Second moments (c,) in descending order, and the directions (k, c) of which they are, c <= rank."""
    basis = leading_basis(rows, min(rank, *rows.shape))
    energies, rotation = _eigen(_product(rows, basis))
    return energies, _product(basis, rotation)


def _principal_products(part: Outer, rank: int) -> tuple[jax.Array, tuple[_Axis, ...]]:
    """Those of the products of two principal axes: second moments (c,), and the axes, with a column for each."""
    dim = max(_AXES, -(-rank // min(x.shape[1] for x in part)))  # as many as leave the rank
    # A record counts in one factor as much as its gradient is long, and so with the norm of the other.
    left = _principal_axes(part.left * _norm(part.right), dim)
    right = _principal_axes(part.right * _norm(part.left), dim)
    left_squares = _product(_inside(left.basis, part.left), left.picks) ** 2
    right_squares = _product(_inside(right.basis, part.right), right.picks) ** 2
    moments = _product(left_squares.T, right_squares)
    energies, chosen = jax.lax.top_k(moments.ravel(), min(rank, moments.size))
    of_left, of_right = jnp.divmod(chosen, moments.shape[1])
    return energies, (_Axis(left.basis, left.picks[:, of_left]), _Axis(right.basis, right.picks[:, of_right]))


def _principal_axes(x: jax.Array, dim: int) -> _Axis:
    """Of rows x (n, a), in descending order."""
    basis = leading_basis(x, min(dim, *x.shape)) if x.shape[1] > dim else None
    _, rotation = _eigen(_inside(basis, x))
    return _Axis(basis, rotation)


def _eigen(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of x^T x, descending."""
    values, vectors = jnp.linalg.eigh(_product(x.T, x))
    return values[::-1], vectors[:, ::-1]


def _picked(vectors: Any, at: jax.Array) -> Any:
    """Columns, zero where `at` (r,) is outside."""
    if isinstance(vectors, tuple):
        return tuple(_Axis(axis.basis, _picked(axis.picks, at)) for axis in vectors)
    count = vectors.shape[1]
    inside = (at >= 0) & (at < count)
    columns = vectors[:, jnp.clip(at, 0, count - 1)]
    return jnp.where(inside, columns, 0)


def first(directions: Directions | jax.Array, count: int) -> Directions | jax.Array:
    """The first `count` of them, of most energy."""
    if not isinstance(directions, Directions):
        return directions[:count]

    def cut(axes):
        return axes and tuple(_Axis(axis.basis, axis.picks[:, :count]) for axis in axes)

    factors = tuple(cut(axes) for axes in directions.factors)
    return dataclasses.replace(directions, others=directions.others[:count], factors=factors)


# --- what directions are made of ---


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x, axis=1, keepdims=True)


def _split(x: Any, sizes: list[int]) -> list[Any]:
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=-1)


def _other_sizes(directions: Directions) -> list[int]:
    return [math.prod(s) for s, axes in zip(directions.shapes, directions.factors, strict=True) if axes is None]


def _inside(basis: jax.Array | None, x: jax.Array) -> jax.Array:
    """B^T x of each row."""
    return x if basis is None else _product(x, basis)


def _along_products(part: jax.Array | Outer, axes: tuple[_Axis, _Axis], shape: tuple[int, ...]) -> jax.Array:
    """(m, r) of gradients of a wide matrix."""
    left, right = axes
    if isinstance(part, Outer):
        # p^T x y^T q is a product of two numbers, and the matrix x y^T is never formed.
        along_left = _product(_inside(left.basis, part.left), left.picks)
        along_right = _product(_inside(right.basis, part.right), right.picks)
        return along_left * along_right
    x = part.reshape(-1, *shape)
    if left.basis is not None:
        x = jnp.einsum("mab,ap->mpb", x, left.basis, precision=_HIGHEST)
    x = _inside(right.basis, x).reshape(len(part), -1)
    products = left.picks[:, None, :] * right.picks[None]
    return _product(x, products.reshape(-1, left.picks.shape[1]))


def _sum_of_products(left: _Axis, right: _Axis, coefficients: jax.Array) -> jax.Array:
    """sum_j c_j p_j q_j^T (a, b)."""
    inside = _product(left.picks * coefficients, right.picks.T)
    if left.basis is not None:
        inside = _product(left.basis, inside)
    if right.basis is not None:
        inside = _product(inside, right.basis.T)
    return inside
