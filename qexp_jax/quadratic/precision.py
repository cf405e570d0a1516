"""The public precision `H = R R^T`: symmetric positive definite, as an operator.

Precision is the matrix that is factored; the draw has covariance `H^{-1} / beta`. One interface for all forms:

    whiten(H, g)    R^{-1} g      a gradient into the norm in which it is clipped
    color(H, x)     R^{-T} x      white noise into N(0, H^{-1}); a whitened gradient into a Newton step
    uncolor(H, w)   R^T w         |R^T w|^2 = w^T H w
    whitened_norms  |R^{-1} g|    of many gradients, at about half the cost of whitening where H is low rank

`dense` factors a k x k matrix by Cholesky; `spectral` and `low_rank` are a scaled identity plus low rank on the whole
parameter space, in O(d r) time and memory; `leading` is infinite outside a few directions, which alone it moves. The
mechanism depends on H alone, not on which root R is taken.

**Coordinates.** A sum of gradients is taken in coordinates of the precision's choice (`coordinates`): whitened ones
where each gradient is whitened anyway, those along the few directions, or the gradients themselves where a product with
H^{-1/2} would cost more than the gradient. Noise is added in the same coordinates (`shaped_noise`), and what comes out
is whitened after it (`whiten_sum`), so that the rounding of whitening never meets a sum without noise. `spread` says
how rounding in coordinates compares with rounding in the whitened norm.

How each form computes is its `roots.Root`: `dense_root` and `low_rank_root`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qexp_jax.model.factored_gradients import Rows
from qexp_jax.numerics import integers
from qexp_jax.numerics.integers import Words
from qexp_jax.quadratic.dense_root import DENSE, factor
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.low_rank_root import LEADING, LOW_RANK
from qexp_jax.quadratic.roots import Root


# The root is static, so that each form has a program of its own without a branch; the numbers are traced.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "log_det"],
    meta_fields=["dim", "num_coordinates", "root"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """A public SPD operator on R^dim; use it through `whiten`, `color`, `uncolor` and `draw`.

    Attributes:
      dim: k.
      num_coordinates: c, of a sum of gradients.
      root: its functions.
      arrays: its numbers, a pytree.
      log_det: log det H; not finite where H is not SPD (`is_spd`).
    """

    dim: int
    num_coordinates: int
    root: Root
    arrays: Any
    log_det: jax.Array


def whiten(precision: Precision, gradient: jax.Array) -> jax.Array:
    """R^{-1} g, (k,) -> (k,): where H is M, v of (1), up to a rotation."""
    return precision.root.whiten(precision.arrays, gradient)


def coordinates(precision: Precision, rows: Rows, scale: jax.Array | float = 1.0) -> tuple[Rows, jax.Array]:
    """What is added of m gradients, and bounds on their whitened norms.

    Args:
      precision: public.
      rows: m gradients.
      scale: > 0, public; one over the size of the norms that matter, so that no square leaves float32.

    Returns:
      The coordinates, (m, c) in parts, and (m,) numbers that are never below `scale` times the norms |R^{-1} g| of
      these coordinates in real arithmetic, whatever cancels; not finite where an entry is not, or a square
      overflows.
    """
    return precision.root.coordinates(precision.arrays, rows, scale)


def whitened_norms(precision: Precision, rows: Rows) -> jax.Array:
    """|R^{-1} g| (m,) of m gradients, never below it."""
    return coordinates(precision, rows)[1]


def spread(precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Largest and smallest norm of coordinates whose whitened norm is 1."""
    return precision.root.spread(precision.arrays)


def shaped_noise(precision: Precision, x: jax.Array) -> jax.Array:
    """Standard normal noise (c,) as noise in coordinates that is standard normal once it is whitened."""
    return precision.root.shape(precision.arrays, x)


def whiten_sum(precision: Precision, total: Words, step: jax.Array | float) -> jax.Array:
    """A sum in coordinates, in steps of a grid, as a whitened vector (k,): S of (1).

    Args:
      precision: public.
      total: (c,) whole numbers.
      step: of the grid, in units of coordinates.
    """
    in_coordinates = integers.to_float(total, precision.log_det.dtype) * step
    return precision.root.whiten_sum(precision.arrays, in_coordinates)


def color(precision: Precision, x: jax.Array) -> jax.Array:
    """R^{-T} x, (k,) -> (k,)."""
    return precision.root.color(precision.arrays, x)


def uncolor(precision: Precision, w: jax.Array) -> jax.Array:
    """R^T w, (k,) -> (k,), the inverse of `color`."""
    return precision.root.uncolor(precision.arrays, w)


def draw(key: jax.Array, precision: Precision) -> jax.Array:
    """One exact draw of N(0, H^{-1}), (k,): the noise of (3) over C z / N, where H is both A and M."""
    return color(precision, jax.random.normal(key, (precision.dim,), precision.log_det.dtype))


def draws(key: jax.Array, precision: Precision, num_draws: int) -> jax.Array:
    """Independent exact draws of N(0, H^{-1}), (num_draws, k), in the matrix products of one solve."""
    noise = jax.random.normal(key, (num_draws, precision.dim), precision.log_det.dtype)
    return jax.vmap(lambda x: color(precision, x))(noise)


def is_spd(precision: Precision) -> jax.Array:
    """Whether the factorisation worked: under jit Cholesky returns NaN silently, so ask before the private pass."""
    return jnp.isfinite(precision.log_det)


@jax.jit
def dense(matrix: jax.Array) -> Precision:
    """H (k, k) by Cholesky: R is its lower triangular factor.

    >>> H = dense(jnp.array([[4.0, 2.0], [2.0, 3.0]]))
    >>> bool(is_spd(H)), float(jnp.exp(H.log_det).round(4))
    (True, 8.0)
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Expected a square matrix, found {matrix.shape=}.")
    # By default an accelerator's products have few bits, and a Cholesky factor of an ill-conditioned H may fail.
    with jax.default_matmul_precision("highest"):
        lower = jnp.linalg.cholesky(matrix)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(lower)))
    return Precision(dim=len(matrix), num_coordinates=len(matrix), root=DENSE, arrays=factor(lower), log_det=log_det)


@jax.jit
def spectral(rest: jax.Array, vectors: Directions | jax.Array, eigenvalues: jax.Array) -> Precision:
    """H = rest (I - V^T V) + sum_j eigenvalues_j v_j v_j^T on R^d.

    Args:
      rest: positive scalar, the eigenvalue of all directions orthogonal to the v_j.
      vectors: (r, d) orthonormal rows v_j.
      eigenvalues: (r,) positive.
    """
    _check_shapes(vectors, eigenvalues)
    r, d = vectors.shape
    rest = jnp.asarray(rest, vectors.dtype)
    log_det = (d - r) * jnp.log(rest) + jnp.sum(jnp.log(eigenvalues))
    return Precision(dim=d, num_coordinates=d, root=LOW_RANK, arrays=(rest, vectors, eigenvalues), log_det=log_det)


def low_rank(scale: jax.Array, vectors: Directions | jax.Array, values: jax.Array) -> Precision:
    """H = scale I + sum_j values_j v_j v_j^T on R^d, `spectral` by another name.

    Args:
      scale: positive scalar, the damping.
      vectors: (r, d) orthonormal rows v_j.
      values: (r,) non-negative.
    """
    return spectral(scale, vectors, scale + values)


@jax.jit
def leading(vectors: Directions | jax.Array, eigenvalues: jax.Array) -> Precision:
    """H = sum_j eigenvalues_j v_j v_j^T, infinite outside the span of the v_j: gradients count, and draws move, there.

    Args:
      vectors: (r, d) orthonormal rows v_j.
      eigenvalues: (r,) positive.
    """
    _check_shapes(vectors, eigenvalues)
    r, d = vectors.shape
    log_det = jnp.sum(jnp.log(eigenvalues))
    return Precision(dim=d, num_coordinates=r, root=LEADING, arrays=(vectors, eigenvalues), log_det=log_det)


def _check_shapes(vectors: Directions | jax.Array, eigenvalues: jax.Array) -> None:
    if len(vectors.shape) != 2 or eigenvalues.shape != vectors.shape[:1]:
        raise ValueError(f"Expected vectors (r, d) and values (r,), found {vectors.shape=}, {eigenvalues.shape=}.")
