"""The count-sketch, a random projection with orthonormal columns, made again from its key; see `panels`.

The d coordinates, one array after the other, are cut into blocks of k. Block j is dealt to the k buckets by one random
cyclic shift, with random signs: no bucket is empty, columns have disjoint supports, and two coordinates of different
blocks collide with probability 1/k, so that E|P^T g|^2 and its variance are those of Charikar, Chen and Farach-Colton
(2002), up to the scale k/d of an orthonormal basis. Signs are the bits of d/32 random words: a random number a
coordinate would cost more than the gradient. Of gradients that are outer products, the two factors are dealt to the
buckets and their products never formed.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qexp_jax.model import panels
from qexp_jax.model.factored_gradients import Outer, Rows
from qexp_jax.model.panels import Shapes, size_of, sizes_and_offsets


class _Run(NamedTuple):
    """Coordinates `start, ..., start + length` of one array that lie in consecutive blocks.

    A partial block begins at `position` of block `block`; whole blocks have position 0 and a length of blocks times k.
    """

    start: int
    length: int
    block: int
    position: int


def _runs(size: int, offset: int, dim: int) -> Iterator[_Run]:
    """An array of `size` coordinates that begins at coordinate `offset`: a partial block, whole blocks, another one."""
    start = 0
    while start < size:
        block, position = divmod(offset + start, dim)
        left = size - start
        length = min(left, dim - position) if position or left < dim else left // dim * dim
        yield _Run(start, length, block, position)
        start += length


class _Deal(NamedTuple):
    """Sign bits (blocks, k/32), shifts (blocks,) and the norm of each column (k,)."""

    words: jax.Array
    shifts: jax.Array
    scale: jax.Array


def _deal(key: jax.Array, size: int, dim: int, dtype: DTypeLike) -> _Deal:
    """The count-sketch of `size` coordinates in `dim` buckets."""
    sign_key, shift_key = jax.random.split(key)
    num_blocks = -(-size // dim)
    words = jax.random.bits(sign_key, (num_blocks, -(-dim // 32)), jnp.uint32)
    shifts = jax.random.randint(shift_key, (num_blocks,), 0, dim)
    # Every whole block puts one coordinate into each bucket, the last block only `rest` of them.
    rest = size - (num_blocks - 1) * dim
    counts = num_blocks - 1 + ((jnp.arange(dim) - shifts[-1]) % dim < rest)
    return _Deal(words, shifts, 1 / jnp.sqrt(counts.astype(dtype)))


def _signs_and_shifts(deal: _Deal, block: Any, count: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Signs (count, k) and shifts (count, 1) of consecutive blocks."""
    # By dynamic slices, as the first block may be a traced loop index.
    words = jax.lax.dynamic_slice(deal.words, (block, 0), (count, deal.words.shape[1]))
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    signs = 1 - 2 * bits.reshape(count, -1)[:, : len(deal.scale)].astype(dtype)
    shifts = jax.lax.dynamic_slice(deal.shifts, (block,), (count,))
    return signs, shifts[:, None]


def _into_buckets(deal: _Deal, rows: jax.Array, block: Any) -> jax.Array:
    """The sum of blocks (count, k), signed and shifted, (k,)."""
    dim = rows.shape[1]
    signs, shifts = _signs_and_shifts(deal, block, len(rows), rows.dtype)
    source = (jnp.arange(dim) - shifts) % dim
    return jnp.sum(_turned(rows * signs, source), axis=0)


def _turned(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Each row at its own index, both (count, k)."""
    if jax.default_backend() != "gpu":
        return jnp.take_along_axis(rows, index, axis=1)
    # Under vmap a zero of the records' own gives each record indices of its own. With indices in common XLA lets
    # neighbouring threads read the same coordinate of all records, which lie far apart: four times as long on an H200.
    zero = jnp.asarray((rows[:1, :1] > 0) & False, index.dtype)
    return jnp.take_along_axis(rows, index + zero, axis=1, mode="promise_in_bounds")


def _out_of_buckets(deal: _Deal, w: jax.Array, block: Any, count: int) -> jax.Array:
    """The blocks (count, k) whose coordinates are w's, signed and shifted."""
    dim = len(w)
    signs, shifts = _signs_and_shifts(deal, block, count, w.dtype)
    bucket = (jnp.arange(dim) + shifts) % dim
    return w[bucket] * signs


def _panels(num_blocks: int, dim: int) -> tuple[int, int, int]:
    """Blocks a panel, panels, and blocks left over."""
    per_panel = min(num_blocks, max(1, panels.PANEL // dim))
    return per_panel, num_blocks // per_panel, num_blocks % per_panel


def _run_into_buckets(deal: _Deal, flat: jax.Array, run: _Run, dim: int) -> jax.Array:
    """The part (k,) of P^T x that comes from a run's coordinates `flat` (length,), not scaled yet."""
    if run.length < dim:
        end = run.position + run.length
        row = jnp.zeros((1, dim), flat.dtype).at[0, run.position : end].set(flat)
        return _into_buckets(deal, row, run.block)

    def add(total: Any, block: Any, count: int) -> jax.Array:
        rows = jax.lax.dynamic_slice(flat, (block * dim,), (count * dim,)).reshape(count, dim)
        return total + _into_buckets(deal, rows, run.block + block)

    return _add_panels(add, 0, run.length // dim, dim)


def _add_panels(add: Callable[[Any, Any, int], jax.Array], total: Any, num_blocks: int, dim: int) -> jax.Array:
    """All blocks added to a total, a panel at a time; `add(total, block, count)` adds `count` of them."""
    per_panel, panels, left = _panels(num_blocks, dim)
    # The carry starts from a panel, not from zeros, so that it varies over a mapped axis where the panels do.
    total = add(total, 0, per_panel)
    step = lambda total, i: (add(total, i * per_panel, per_panel), None)
    total, _ = jax.lax.scan(step, total, jnp.arange(1, panels))
    return add(total, panels * per_panel, left) if left else total


def _run_out_of_buckets(deal: _Deal, w: jax.Array, run: _Run) -> jax.Array:
    """A run's coordinates of P w, (length,)."""
    dim = len(w)
    if run.length < dim:
        row = _out_of_buckets(deal, w, run.block, 1)[0]
        return row[run.position : run.position + run.length]
    per_panel, panels, left = _panels(run.length // dim, dim)
    panel = lambda i: _out_of_buckets(deal, w, run.block + i * per_panel, per_panel)
    rows = jax.lax.map(panel, jnp.arange(panels)).reshape(-1)
    if not left:
        return rows
    last = _out_of_buckets(deal, w, run.block + panels * per_panel, left)
    return jnp.concatenate([rows, last.reshape(-1)])


def lift(shapes: Shapes, key: jax.Array, w: jax.Array) -> list[jax.Array]:
    """P w: from (k,) to arrays of the given shapes."""
    dim = len(w)
    deal = _deal(key, size_of(shapes), dim, w.dtype)
    w = w * deal.scale
    arrays = []
    for shape, (size, offset) in zip(shapes, sizes_and_offsets(shapes), strict=True):
        runs = [_run_out_of_buckets(deal, w, run) for run in _runs(size, offset, dim)]
        arrays.append(jnp.concatenate(runs).reshape(shape) if runs else jnp.zeros(shape, w.dtype))
    return arrays


def project(shapes: Shapes, key: jax.Array, dim: int, arrays: list[jax.Array]) -> jax.Array:
    """P^T x: from arrays to (k,), the exact adjoint of the lift.

    Args:
      shapes: of the arrays.
      key: of P.
      dim: k.
      arrays: x, in this order.
    """
    deal = _deal(key, size_of(shapes), dim, arrays[0].dtype)
    parts = zip(arrays, sizes_and_offsets(shapes), strict=True)
    return sum(_array_into_buckets(deal, x, *at, dim) for x, at in parts) * deal.scale


def _array_into_buckets(deal: _Deal, x: jax.Array, size: int, offset: int, dim: int) -> jax.Array:
    """The part (k,) of P^T x that comes from one array, whose first coordinate is number `offset`, not scaled yet."""
    flat = x.ravel()
    total = jnp.zeros(dim, x.dtype)
    for run in _runs(size, offset, dim):
        total += _run_into_buckets(deal, flat[run.start : run.start + run.length], run, dim)
    return total


def project_rows(shapes: Shapes, key: jax.Array, dim: int, rows: Rows) -> jax.Array:
    """P^T g of each of m gradients, (m, k).

    Args:
      shapes: of the arrays that the gradients belong to.
      key: of P.
      dim: k.
      rows: the gradients in parts, one for each array.
    """
    deal = _deal(key, size_of(shapes), dim, jax.tree.leaves(rows)[0].dtype)
    products = []
    total: Any = 0
    for part, (size, offset) in zip(rows, sizes_and_offsets(shapes), strict=True):
        if isinstance(part, Outer):
            # Records last: a coordinate of all of them is one stretch of memory.
            products += [(part.left.T, part.right.T, run) for run in _runs(size, offset, dim)]
        else:
            into_buckets = functools.partial(_array_into_buckets, deal, size=size, offset=offset, dim=dim)
            total += jax.vmap(into_buckets)(part).T
    # The longest loop last: what is added after it, XLA may do again wherever the result is used.
    for left, right, run in sorted(products, key=lambda x: x[2].length):
        total = _add_products(total, deal, left, right, run, dim)
    return total.T * deal.scale


def _add_products(total: Any, deal: _Deal, left: jax.Array, right: jax.Array, run: _Run, dim: int) -> jax.Array:
    """To a total (k, m) a run of the coordinates left_i right_j, of (a, m) and (b, m), one block after the other."""

    def add_block(total: Any, i: jax.Array, j: jax.Array, weights: jax.Array) -> jax.Array:
        return total + left[i] * right[j] * weights[:, None]

    def add(total: Any, block: Any, count: int) -> jax.Array:
        rows = _sources(deal, run, len(right), block, count)
        total = add_block(total, *(x[0] for x in rows))  # before the scan, as in `_add_panels`
        step = lambda total, row: (add_block(total, *row), None)
        total, _ = jax.lax.scan(step, total, [x[1:] for x in rows])
        return total

    return _add_panels(add, total, max(1, run.length // dim), dim)


def _sources(deal: _Deal, run: _Run, width: int, block: Any, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row, column and sign of the entry that each bucket gets from each of a run's blocks, (count, k); 0 for none."""
    dim = len(deal.scale)
    signs, shifts = _signs_and_shifts(deal, run.block + block, count, deal.scale.dtype)
    source = (jnp.arange(dim) - shifts) % dim
    place = (block + jnp.arange(count)[:, None]) * dim + source - run.position
    is_in_run = (place >= 0) & (place < run.length)
    # A bucket that gets nothing reads the run's first entry, with weight 0, rather than one of another run.
    i, j = jnp.divmod(run.start + jnp.where(is_in_run, place, 0), width)
    weights = jnp.where(is_in_run, jnp.take_along_axis(signs, source, axis=1), 0)
    return i, j, weights
