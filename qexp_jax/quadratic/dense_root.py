"""The root of a dense precision: a triangular factor in blocks, whose solves are matrix products.

A triangular solve of one column by LAPACK or cuBLAS takes ten times as long as the products with inverted blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.model.factored_gradients import Rows, whole
from qexp_jax.quadratic.roots import Root, as_it_is, of_one_size, with_norms

_HIGHEST = jax.lax.Precision.HIGHEST
# Rows of a block. One block is solved after the other: an accelerator needs few and large ones.
_ON_CPU = 256
_ON_ACCELERATOR = 2048


class Factor(NamedTuple):
    """U = R^T, upper triangular, in blocks of rows.

    Attributes:
      inverses: U_ii^{-1}, the inverse of each diagonal block.
      panels: what lies right of it, contiguous, so that a solve reads nothing but the triangle.
    """

    inverses: tuple[jax.Array, ...]
    panels: tuple[jax.Array, ...]


def factor(lower: jax.Array) -> Factor:
    """That of R = `lower` (k, k)."""
    size = _ON_CPU if jax.default_backend() == "cpu" else _ON_ACCELERATOR
    upper = lower.T
    starts = range(0, len(lower), size)
    blocks = [upper[i : i + size, i : i + size] for i in starts]
    return Factor(
        inverses=tuple(_inverse(block) for block in blocks),
        panels=tuple(upper[i : i + size, i + size :] for i in starts),
    )


def _inverse(upper: jax.Array) -> jax.Array:
    return jax.lax.linalg.triangular_solve(upper, jnp.eye(len(upper), dtype=upper.dtype), left_side=True)


def _whiten(factor: Factor, g: jax.Array) -> jax.Array:
    """U^{-T} g, forward: each solved block is taken out of all that follow."""
    solved: list[jax.Array] = []
    for block, panel in zip(factor.inverses, factor.panels, strict=True):
        size = len(block)
        part = jnp.matmul(g[:size], block, precision=_HIGHEST)
        solved.append(part)
        g = g[size:] - jnp.matmul(part, panel, precision=_HIGHEST)
    return jnp.concatenate(solved)


def _color(factor: Factor, x: jax.Array) -> jax.Array:
    """U^{-1} x, backward: all that is solved is taken out of the block before."""
    solved = x[:0]
    end = len(x)
    for block, panel in zip(factor.inverses[::-1], factor.panels[::-1], strict=True):
        start = end - len(block)
        rest = x[start:end] - jnp.matmul(panel, solved, precision=_HIGHEST)
        part = jnp.matmul(block, rest, precision=_HIGHEST)
        solved = jnp.concatenate([part, solved])
        end = start
    return solved


def _uncolor(factor: Factor, w: jax.Array) -> jax.Array:
    """U w; the diagonal blocks are kept as inverses alone, so their products are solves."""
    parts: list[jax.Array] = []
    start = 0
    for block, panel in zip(factor.inverses, factor.panels, strict=True):
        end = start + len(block)
        own = jax.lax.linalg.triangular_solve(block, w[start:end, None], left_side=True)[:, 0]
        parts.append(own + jnp.matmul(panel, w[end:], precision=_HIGHEST))
        start = end
    return jnp.concatenate(parts)


def _coordinates(factor: Factor, rows: Rows, scale: jax.Array | float) -> tuple[Rows, jax.Array]:
    """Whitened vectors: what is added is what the norm is taken of."""
    whitened = jax.vmap(lambda g: _whiten(factor, g))(whole(rows))
    return with_norms(whitened, scale)


DENSE = Root(
    whiten=_whiten,
    color=_color,
    uncolor=_uncolor,
    coordinates=_coordinates,
    shape=as_it_is,
    whiten_sum=as_it_is,
    spread=of_one_size,
)
