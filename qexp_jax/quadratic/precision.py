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
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.model.factored_gradients import BLOCK, Rows, squares, sum_of_squares, whole
from qexp_jax.numerics import integers
from qexp_jax.numerics.integers import Words
from qexp_jax.numerics.rounding import of_sum
from qexp_jax.quadratic import directions as directions_of
from qexp_jax.quadratic.directions import Directions, along, along_each, combine

_HIGHEST = jax.lax.Precision.HIGHEST


class _Root(NamedTuple):
    """A precision's functions of (arrays, argument), at module level, so that equal precisions compile once.

    Attributes:
      whiten: R^{-1} x.
      color: R^{-T} x.
      uncolor: R^T x.
      coordinates: of (arrays, rows, scale), see `coordinates`.
      shape: noise N(0, I) -> noise in coordinates whose whitened covariance is I.
      whiten_sum: coordinates -> whitened vector.
      spread: see `spread`.
    """

    whiten: Callable[[Any, jax.Array], jax.Array]
    color: Callable[[Any, jax.Array], jax.Array]
    uncolor: Callable[[Any, jax.Array], jax.Array]
    coordinates: Callable[[Any, Rows, jax.Array | float], tuple[Rows, jax.Array]]
    shape: Callable[[Any, jax.Array], jax.Array]
    whiten_sum: Callable[[Any, jax.Array], jax.Array]
    spread: Callable[[Any], tuple[jax.Array, jax.Array]]


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
    root: _Root
    arrays: Any
    log_det: jax.Array


def whiten(precision: Precision, gradient: jax.Array) -> jax.Array:
    """R^{-1} g, (k,) -> (k,)."""
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
    """A sum in coordinates, in steps of a grid, as a whitened vector (k,)."""
    return precision.root.whiten_sum(precision.arrays, integers.to_float(total, precision.log_det.dtype) * step)


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
    for block, panel in zip(factor.inverses, factor.panels, strict=True):
        size = len(block)
        solved.append(jnp.matmul(g[:size], block, precision=_HIGHEST))
        g = g[size:] - jnp.matmul(solved[-1], panel, precision=_HIGHEST)
    return jnp.concatenate(solved)


def _dense_color(factor, x):
    """U^{-1} x, backward: all that is solved is taken out of the block before."""
    solved, end = x[:0], len(x)
    for block, panel in zip(factor.inverses[::-1], factor.panels[::-1], strict=True):
        start = end - len(block)
        rest = x[start:end] - jnp.matmul(panel, solved, precision=_HIGHEST)
        solved = jnp.concatenate([jnp.matmul(block, rest, precision=_HIGHEST), solved])
        end = start
    return solved


def _dense_uncolor(factor, w):
    """U w."""
    parts, start = [], 0
    for block, panel in zip(factor.inverses, factor.panels, strict=True):
        end = start + len(block)
        own = jax.lax.linalg.triangular_solve(block, w[start:end, None], left_side=True)[:, 0]
        parts.append(own + jnp.matmul(panel, w[end:], precision=_HIGHEST))
        start = end
    return jnp.concatenate(parts)


def _dense_coordinates(factor, rows, scale):
    """Whitened vectors: what is added is what the norm is taken of."""
    return _with_norms(jax.vmap(lambda g: _dense_whiten(factor, g))(whole(rows)), scale)


def _with_norms(vectors, scale):
    """Of vectors that are whitened already."""
    error = 2 * of_sum(vectors.shape[1], BLOCK)
    return [vectors], jnp.sqrt((1 + error) * sum_of_squares(vectors * _opaque(scale)) + _lost(vectors.shape[1]))


def _opaque(scale):
    """Not a constant to the compiler, which would take it out of the squares that it keeps within float32."""
    return jax.lax.optimization_barrier(jnp.asarray(scale))


def _lost(num_terms):
    """What squares may lose that are too small for float32."""
    return 2 * num_terms * float(np.finfo(np.float32).tiny)


def _as_it_is(_, x):
    return x


def _of_one_size(arrays):
    one = jnp.ones((), jax.tree.leaves(arrays)[0].dtype)
    return one, one


_DENSE = _Root(
    whiten=_dense_whiten,
    color=_dense_color,
    uncolor=_dense_uncolor,
    coordinates=_dense_coordinates,
    shape=_as_it_is,
    whiten_sum=_as_it_is,
    spread=_of_one_size,
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
    return Precision(dim=len(matrix), num_coordinates=len(matrix), root=_DENSE, arrays=_factor(lower), log_det=log_det)


def _scale_by(power):
    """x -> H^power x for H = rest (I - V^T V) + V^T diag(eigenvalues) V with orthonormal rows V."""

    def apply(arrays, x):
        rest, vectors, eigenvalues = arrays
        change = eigenvalues**power - rest**power
        return rest**power * x + combine(vectors, change * along(vectors, x))

    return apply


_NOT_ORTHONORMAL = 1e-5  # how far V V^T may be from the identity


def _low_rank_coordinates(arrays, rows, scale):
    """The gradients as they are; norms from the r leading coordinates and the norm of g alone.

    Both are rounded in proportion to |g|, and where they cancel, what is left may be rounding alone. It counts with the
    weight of the smallest eigenvalue, with which it may come out of whitening.
    """
    rest, vectors, eigenvalues = arrays
    scale = _opaque(scale)
    inside, total = (along_each(vectors, rows) * scale) ** 2, squares(rows, scale)
    outside = jnp.maximum(total - jnp.sum(inside, axis=1), 0)
    error = _NOT_ORTHONORMAL + 4 * (directions_of.rounding(vectors, rows) + of_sum(max(vectors.shape), BLOCK))
    slack = (error * total + _lost(vectors.shape[1])) / jnp.minimum(rest, eigenvalues.min())
    return rows, jnp.sqrt(outside / rest + jnp.sum(inside / eigenvalues, axis=1) + slack)


def _low_rank_spread(arrays):
    rest, _, eigenvalues = arrays
    values = jnp.append(eigenvalues, rest)
    return jnp.sqrt(values.max()), jnp.sqrt(values.min())


# The symmetric root H^{1/2} is its own transpose, so whitening and coloring are one function.
_LOW_RANK = _Root(
    whiten=_scale_by(-0.5),
    color=_scale_by(-0.5),
    uncolor=_scale_by(0.5),
    coordinates=_low_rank_coordinates,
    shape=_scale_by(0.5),
    whiten_sum=_scale_by(-0.5),
    spread=_low_rank_spread,
)


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
    return Precision(dim=d, num_coordinates=d, root=_LOW_RANK, arrays=(rest, vectors, eigenvalues), log_det=log_det)


def _check_shapes(vectors, eigenvalues):
    if len(vectors.shape) != 2 or eigenvalues.shape != vectors.shape[:1]:
        raise ValueError(f"Expected vectors (r, d) and values (r,), found {vectors.shape=}, {eigenvalues.shape=}.")


def low_rank(scale: jax.Array, vectors: Directions | jax.Array, values: jax.Array) -> Precision:
    """H = scale I + sum_j values_j v_j v_j^T on R^d, `spectral` by another name.

    Args:
      scale: positive scalar, the damping.
      vectors: (r, d) orthonormal rows v_j.
      values: (r,) non-negative.
    """
    return spectral(scale, vectors, scale + values)


def _leading_scale_by(power):
    """x -> V^T diag(eigenvalues)^power V x, nothing outside."""

    def apply(arrays, x):
        vectors, eigenvalues = arrays
        return combine(vectors, eigenvalues**power * along(vectors, x))

    return apply


def _leading_coordinates(arrays, rows, scale):
    """Along the r directions, whitened: what a gradient is elsewhere is left behind before anything is added."""
    vectors, eigenvalues = arrays
    return _with_norms(along_each(vectors, rows) / jnp.sqrt(eigenvalues), scale)


_LEADING = _Root(
    whiten=_leading_scale_by(-0.5),
    color=_leading_scale_by(-0.5),
    uncolor=_leading_scale_by(0.5),
    coordinates=_leading_coordinates,
    shape=_as_it_is,
    whiten_sum=lambda arrays, x: combine(arrays[0], x),
    spread=lambda arrays: _of_one_size(arrays[1]),
)


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
    return Precision(dim=d, num_coordinates=r, root=_LEADING, arrays=(vectors, eigenvalues), log_det=log_det)
