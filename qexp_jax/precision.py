"""The public precision `H = R R^T`: symmetric positive definite, as an operator.

Precision is the matrix that is factored; the draw has covariance `H^{-1} / beta`. One interface for all forms:

    whiten(H, g)    R^{-1} g      a gradient into the norm in which it is clipped
    color(H, x)     R^{-T} x      white noise into N(0, H^{-1}); a whitened gradient into a Newton step
    uncolor(H, w)   R^T w         |R^T w|^2 = w^T H w
    whitened_norm   |R^{-1} g|    at about half the cost of whitening where H is low rank

`dense` factors a k x k matrix by Cholesky; `low_rank` is a scaled identity plus low rank on the whole parameter space,
in O(d r) time and memory. The mechanism depends on H alone, not on which root R is taken.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


class _Root(NamedTuple):
    """R^{-1} x, R^{-T} x, R^T x and |R^{-1} x|^2 as module-level functions of (arrays, x)."""

    whiten: Callable[[Any, jax.Array], jax.Array]
    color: Callable[[Any, jax.Array], jax.Array]
    uncolor: Callable[[Any, jax.Array], jax.Array]
    square: Callable[[Any, jax.Array], jax.Array]


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


def whitened_norm(precision: Precision, gradient: jax.Array) -> jax.Array:
    """|R^{-1} g|, never less than it up to rounding; what clipping needs of a record."""
    return jnp.sqrt(precision.root.square(precision.arrays, gradient))


def color(precision: Precision, x: jax.Array) -> jax.Array:
    """R^{-T} x, (k,) -> (k,)."""
    return precision.root.color(precision.arrays, x)


def uncolor(precision: Precision, w: jax.Array) -> jax.Array:
    """R^T w, (k,) -> (k,), the inverse of `color`."""
    return precision.root.uncolor(precision.arrays, w)


def draw(key: jax.Array, precision: Precision) -> jax.Array:
    """One exact draw of N(0, H^{-1}), (k,)."""
    return color(precision, jax.random.normal(key, (precision.dim,), precision.log_det.dtype))


def is_spd(precision: Precision) -> jax.Array:
    """Whether the factorisation worked: under jit Cholesky returns NaN silently, so ask before the private pass."""
    return jnp.isfinite(precision.log_det)


def _solve(factor, x, transpose):
    column = jax.lax.linalg.triangular_solve(factor, x[:, None], left_side=True, lower=True, transpose_a=transpose)
    return column[:, 0]


_DENSE = _Root(
    whiten=lambda factor, g: _solve(factor, g, transpose=False),
    color=lambda factor, x: _solve(factor, x, transpose=True),
    uncolor=lambda factor, w: jnp.matmul(factor.T, w, precision=_HIGHEST),
    square=lambda factor, g: jnp.sum(_solve(factor, g, transpose=False) ** 2),
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
        factor = jnp.linalg.cholesky(matrix)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    return Precision(dim=len(matrix), root=_DENSE, arrays=factor, log_det=log_det)


def _scale_by(power):
    """x -> H^power x for H = scale I + V^T diag(values) V with orthonormal rows V."""

    def apply(arrays, x):
        scale, vectors, values = arrays
        inside = jnp.matmul(vectors, x, precision=_HIGHEST)
        change = (scale + values) ** power - scale**power
        # From the left: XLA's CPU product with the transpose takes ten times as long.
        return scale**power * x + jnp.matmul(change * inside, vectors, precision=_HIGHEST)

    return apply


# Relative error of |x|^2 - |V x|^2 in float32, with room; it is added, so that a norm errs on the side of clipping.
_SLACK = 1e-5


def _low_rank_square(arrays, x):
    """x^T H^{-1} x, from the r leading coordinates and the norm of x alone."""
    scale, vectors, values = arrays
    inside = jnp.matmul(vectors, x, precision=_HIGHEST) ** 2
    total = jnp.sum(x**2)
    rest = jnp.maximum(total - jnp.sum(inside), 0) + _SLACK * total
    return rest / scale + jnp.sum(inside / (scale + values))


# The symmetric root H^{1/2} is its own transpose, so whitening and coloring are one function.
_LOW_RANK = _Root(_scale_by(-0.5), _scale_by(-0.5), _scale_by(0.5), _low_rank_square)


@jax.jit
def low_rank(scale: jax.Array, vectors: jax.Array, values: jax.Array) -> Precision:
    """H = scale I + sum_j values_j v_j v_j^T on R^d.

    Args:
      scale: positive scalar, the damping.
      vectors: (r, d) orthonormal rows v_j.
      values: (r,) non-negative.
    """
    if vectors.ndim != 2 or values.shape != vectors.shape[:1]:
        raise ValueError(f"Expected vectors (r, d) and values (r,), found {vectors.shape=}, {values.shape=}.")
    r, d = vectors.shape
    scale = jnp.asarray(scale, vectors.dtype)
    log_det = (d - r) * jnp.log(scale) + jnp.sum(jnp.log(scale + values))
    return Precision(dim=d, root=_LOW_RANK, arrays=(scale, vectors, values), log_det=log_det)
