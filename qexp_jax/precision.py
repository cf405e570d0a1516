"""The public precision `H = R R^T`: symmetric positive definite, as an operator.

Precision is the matrix that is factored; the draw has covariance `H^{-1} / beta`. One interface for all forms:

    whiten(H, g)    R^{-1} g      a gradient into the norm in which it is clipped
    color(H, x)     R^{-T} x      white noise into N(0, H^{-1}); a whitened gradient into a Newton step
    uncolor(H, w)   R^T w         |R^T w|^2 = w^T H w
    whitened_norms  |R^{-1} g|    of many gradients, at about half the cost of whitening where H is low rank

`dense` factors a k x k matrix by Cholesky; `spectral` and `low_rank` are a scaled identity plus low rank on the whole
parameter space, in O(d r) time and memory. The mechanism depends on H alone, not on which root R is taken.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.directions import Directions, along, along_each, combine
from qexp_jax.outer_products import Rows, squares, whole

_HIGHEST = jax.lax.Precision.HIGHEST


class _Root(NamedTuple):
    """R^{-1} x, R^{-T} x, R^T x of (arrays, x), and |R^{-1} g|^2 (m,) of (arrays, rows), as module-level functions."""

    whiten: Callable[[Any, jax.Array], jax.Array]
    color: Callable[[Any, jax.Array], jax.Array]
    uncolor: Callable[[Any, jax.Array], jax.Array]
    squares: Callable[[Any, Rows], jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays", "log_det"], meta_fields=["dim", "root"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A public SPD operator on R^dim; use it through `whiten`, `color`, `uncolor` and `draw`.

    Attributes:
      dim: k.
      root: its functions.
      arrays: its numbers, a pytree.
      log_det: log det H; not finite where H is not SPD (`is_spd`).
    """

    dim: int
    root: _Root
    arrays: Any
    log_det: jax.Array


def whiten(precision: Precision, gradient: jax.Array) -> jax.Array:
    """R^{-1} g, (k,) -> (k,)."""
    return precision.root.whiten(precision.arrays, gradient)


def whitened_norms(precision: Precision, rows: Rows) -> jax.Array:
    """|R^{-1} g| (m,) of m gradients, never less than it up to rounding; what clipping needs of a record."""
    return jnp.sqrt(precision.root.squares(precision.arrays, rows))


def color(precision: Precision, x: jax.Array) -> jax.Array:
    """R^{-T} x, (k,) -> (k,)."""
    return precision.root.color(precision.arrays, x)


def uncolor(precision: Precision, w: jax.Array) -> jax.Array:
    """R^T w, (k,) -> (k,), the inverse of `color`."""
    return precision.root.uncolor(precision.arrays, w)


def draw(key: jax.Array, precision: Precision) -> jax.Array:
    """One exact draw of N(0, H^{-1}), (k,)."""
    return color(precision, jax.random.normal(key, (precision.dim,), precision.log_det.dtype))


def draws(key: jax.Array, precision: Precision, num_draws: int) -> jax.Array:
    """Independent exact draws of N(0, H^{-1}), (num_draws, k), in the matrix products of one solve."""
    noise = jax.random.normal(key, (num_draws, precision.dim), precision.log_det.dtype)
    return jax.vmap(lambda x: color(precision, x))(noise)


def is_spd(precision: Precision) -> jax.Array:
    """Whether the factorisation worked: under jit Cholesky returns NaN silently, so ask before the private pass."""
    return jnp.isfinite(precision.log_det)


class _Factor(NamedTuple):
    """R^T, upper triangular, in blocks of rows.

    Attributes:
      inverses: U_ii^{-1}, the inverse of each diagonal block.
      panels: what lies right of it, contiguous, so that a solve reads nothing but the triangle, as matrix products: a
        triangular solve of one column by LAPACK or cuBLAS takes ten times as long.
    """

    inverses: tuple[jax.Array, ...]
    panels: tuple[jax.Array, ...]


# One block after the other: an accelerator needs few and large ones.
_ON_CPU, _ON_ACCELERATOR = 256, 2048


def _factor(lower):
    size = _ON_CPU if jax.default_backend() == "cpu" else _ON_ACCELERATOR
    upper, starts = lower.T, range(0, len(lower), size)
    blocks = [upper[i : i + size, i : i + size] for i in starts]
    invert = lambda u: jax.lax.linalg.triangular_solve(u, jnp.eye(len(u), dtype=u.dtype), left_side=True)
    return _Factor(
        tuple(invert(block) for block in blocks),
        tuple(upper[i : i + size, i + size :] for i in starts),
    )


def _dense_whiten(factor, g):
    """U^{-T} g, forward: each solved block is taken out of all that follow."""
    solved = []
    for inverse, panel in zip(factor.inverses, factor.panels, strict=True):
        size = len(inverse)
        solved.append(jnp.matmul(g[:size], inverse, precision=_HIGHEST))
        g = g[size:] - jnp.matmul(solved[-1], panel, precision=_HIGHEST)
    return jnp.concatenate(solved)


def _dense_color(factor, x):
    """U^{-1} x, backward: all that is solved is taken out of the block before."""
    solved, end = x[:0], len(x)
    for inverse, panel in zip(factor.inverses[::-1], factor.panels[::-1], strict=True):
        start = end - len(inverse)
        rest = x[start:end] - jnp.matmul(panel, solved, precision=_HIGHEST)
        solved = jnp.concatenate([jnp.matmul(inverse, rest, precision=_HIGHEST), solved])
        end = start
    return solved


def _dense_uncolor(factor, w):
    """U w."""
    parts, start = [], 0
    for inverse, panel in zip(factor.inverses, factor.panels, strict=True):
        end = start + len(inverse)
        own = jax.lax.linalg.triangular_solve(inverse, w[start:end, None], left_side=True)[:, 0]
        parts.append(own + jnp.matmul(panel, w[end:], precision=_HIGHEST))
        start = end
    return jnp.concatenate(parts)


_DENSE = _Root(
    whiten=_dense_whiten,
    color=_dense_color,
    uncolor=_dense_uncolor,
    squares=lambda factor, rows: jax.vmap(lambda g: jnp.sum(_dense_whiten(factor, g) ** 2))(whole(rows)),
)


@jax.jit
def dense(matrix: jax.Array) -> Precision:
    """H (k, k) by Cholesky: R is its lower triangular factor.

    >>> H = dense(jnp.array([[4.0, 2.0], [2.0, 3.0]]))
    >>> bool(is_spd(H)), float(jnp.exp(H.log_det).round(4))
    (True, 8.0)
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Expected a square matrix, found {matrix.shape=}.")
    with jax.default_matmul_precision("highest"):
        lower = jnp.linalg.cholesky(matrix)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(lower)))
    return Precision(dim=len(matrix), root=_DENSE, arrays=_factor(lower), log_det=log_det)


def _scale_by(power):
    """x -> H^power x for H = rest (I - V^T V) + V^T diag(eigenvalues) V with orthonormal rows V."""

    def apply(arrays, x):
        rest, vectors, eigenvalues = arrays
        change = eigenvalues**power - rest**power
        return rest**power * x + combine(vectors, change * along(vectors, x))

    return apply


# Relative error of |x|^2 - |V x|^2 in float32, with room; it is added, so that a norm errs on the side of clipping.
_SLACK = 1e-5


def _low_rank_squares(arrays, rows):
    """g^T H^{-1} g, from the r leading coordinates and the norm of g alone."""
    rest, vectors, eigenvalues = arrays
    inside, total = along_each(vectors, rows) ** 2, squares(rows)
    outside = jnp.maximum(total - jnp.sum(inside, axis=1), 0) + _SLACK * total
    return outside / rest + jnp.sum(inside / eigenvalues, axis=1)


# The symmetric root H^{1/2} is its own transpose, so whitening and coloring are one function.
_LOW_RANK = _Root(_scale_by(-0.5), _scale_by(-0.5), _scale_by(0.5), _low_rank_squares)


@jax.jit
def spectral(rest: jax.Array, vectors: Directions | jax.Array, eigenvalues: jax.Array) -> Precision:
    """H = rest (I - V^T V) + sum_j eigenvalues_j v_j v_j^T on R^d.

    Args:
      rest: positive scalar, the eigenvalue of all directions orthogonal to the v_j. A very large one (1e30 in float32)
        holds them: gradients are whitened to nothing there, and a draw does not move them.
      vectors: (r, d) orthonormal rows v_j.
      eigenvalues: (r,) positive.
    """
    if len(vectors.shape) != 2 or eigenvalues.shape != vectors.shape[:1]:
        raise ValueError(f"Expected vectors (r, d) and values (r,), found {vectors.shape=}, {eigenvalues.shape=}.")
    r, d = vectors.shape
    rest = jnp.asarray(rest, vectors.dtype)
    log_det = (d - r) * jnp.log(rest) + jnp.sum(jnp.log(eigenvalues))
    return Precision(dim=d, root=_LOW_RANK, arrays=(rest, vectors, eigenvalues), log_det=log_det)


def low_rank(scale: jax.Array, vectors: Directions | jax.Array, values: jax.Array) -> Precision:
    """H = scale I + sum_j values_j v_j v_j^T on R^d, `spectral` by another name.

    Args:
      scale: positive scalar, the damping.
      vectors: (r, d) orthonormal rows v_j.
      values: (r,) non-negative.
    """
    return spectral(scale, vectors, scale + values)
