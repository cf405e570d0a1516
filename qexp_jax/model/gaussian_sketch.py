"""Random Gaussian directions, iid entries N(0, 1/d), made again from their key; see `panels`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qexp_jax.model import panels
from qexp_jax.model.panels import Shapes, size_of, sizes_and_offsets

_HIGHEST = jax.lax.Precision.HIGHEST


def _slabs(shapes: Shapes, dim: int) -> list[tuple[int, int, int]]:
    """Per array: its size, coordinates a slab, slabs."""
    width = max(1, panels.PANEL // dim)
    return [(size, min(width, size), -(-size // width)) for size, _ in sizes_and_offsets(shapes)]


def _entries(key: jax.Array, array: int, slab: Any, dim: int, width: int, dtype: DTypeLike) -> jax.Array:
    """Columns of P^T (k, width) for one slab of one array."""
    # A key for each slab, so that lift, project and gram, which take them in different loops, see the same P.
    slab_key = jax.random.fold_in(jax.random.fold_in(key, array), slab)
    return jax.random.normal(slab_key, (dim, width), dtype)


def lift(shapes: Shapes, key: jax.Array, w: jax.Array) -> list[jax.Array]:
    """P w for iid entries N(0, 1/d)."""
    dim = len(w)
    arrays = []
    for i, (shape, (size, width, slabs)) in enumerate(zip(shapes, _slabs(shapes, dim), strict=True)):

        def product(j: jax.Array, i: int = i, width: int = width) -> jax.Array:
            return jnp.matmul(w, _entries(key, i, j, dim, width, w.dtype), precision=_HIGHEST)

        rows = jax.lax.map(product, jnp.arange(slabs))
        arrays.append(rows.ravel()[:size].reshape(shape) / np.sqrt(size_of(shapes)))
    return arrays


def project(shapes: Shapes, key: jax.Array, dim: int, arrays: list[jax.Array]) -> jax.Array:
    """P^T x, the exact adjoint of the lift.

    Args:
      shapes: of the arrays.
      key: of P.
      dim: k.
      arrays: x, in this order.
    """
    total = jnp.zeros(dim, arrays[0].dtype)
    for i, (x, (size, width, slabs)) in enumerate(zip(arrays, _slabs(shapes, dim), strict=True)):
        if not size:
            continue
        rows = jnp.pad(x.ravel(), (0, slabs * width - size)).reshape(slabs, width)

        def product(j: Any, i: int = i, rows: jax.Array = rows) -> jax.Array:
            return jnp.matmul(_entries(key, i, j, dim, rows.shape[1], rows.dtype), rows[j], precision=_HIGHEST)

        # The carry starts from a product, not from zeros, so that it varies over a mapped axis where the rows do.
        step = lambda part, j, product=product: (part + product(j), None)
        part, _ = jax.lax.scan(step, product(0), jnp.arange(1, slabs))
        total += part
    return total / np.sqrt(size_of(shapes))


def columns(shapes: Shapes, key: jax.Array, dim: int, dtype: DTypeLike) -> list[jax.Array]:
    """The columns of P, an array (k, *shape) for each shape: what lift and project make again at each call.

    Args:
      shapes: of the arrays.
      key: of P.
      dim: k.
      dtype: of the entries.
    """
    columns = []
    for i, (shape, (size, width, slabs)) in enumerate(zip(shapes, _slabs(shapes, dim), strict=True)):
        slab = lambda j, i=i, width=width: _entries(key, i, j, dim, width, dtype)
        entries = jax.lax.map(slab, jnp.arange(slabs))
        rows = jnp.moveaxis(entries, 1, 0).reshape(dim, -1)[:, :size]
        columns.append(rows.reshape(dim, *shape) / np.sqrt(size_of(shapes)))
    return columns


def gram(shapes: Shapes, key: jax.Array, dim: int, dtype: DTypeLike) -> jax.Array:
    """P^T P (k, k), each entry of P made once.

    Args:
      shapes: of the arrays.
      key: of P.
      dim: k.
      dtype: of the entries.
    """
    total = jnp.zeros((dim, dim), dtype)
    for i, (size, width, slabs) in enumerate(_slabs(shapes, dim)):

        def step(
            total: jax.Array, j: jax.Array, i: int = i, size: int = size, width: int = width
        ) -> tuple[jax.Array, None]:
            # The last slab is longer than what is left of the array.
            is_in_array = j * width + jnp.arange(width) < size
            x = _entries(key, i, j, dim, width, dtype) * is_in_array
            return total + jnp.matmul(x, x.T, precision=_HIGHEST), None

        total, _ = jax.lax.scan(step, total, jnp.arange(slabs))
    return total / size_of(shapes)
