"""The private pass over data of any size on any devices: batch by batch, device by device, process by process.

    in memory      one `unit_sum`
    a stream       a `unit_sum` a batch into a partial sum; memory is that of two batches, whatever n is
    a mesh         each device sums its share of a batch, and c integers are added over the devices
    processes      each sums its own units on its own devices; c integers a process are gathered once a round

Every unit is clipped by one device, before anything is added, and noise is added once, after the last sum (`rounds`).
Sums are of integers, so that no order, split or length rounds anything away. Partial sums, counts and digests are
**not private**.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from qexp_jax.data import records as record_trees
from qexp_jax.data import stream as streams
from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.model.gradients import Mode
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics import integers
from qexp_jax.numerics.compilation import compiled
from qexp_jax.numerics.integers import Words
from qexp_jax.private_pass import devices
from qexp_jax.private_pass.clipping import ClipInfo, unit_sum
from qexp_jax.private_pass.exact_clipping import integer_sum
from qexp_jax.quadratic.precision import Precision


class Partial(NamedTuple):
    """**Not private**: the sum over the batches read so far.

    Attributes:
      total: (c,) `Words` in steps; of a hardened release (k,) int64 on the host.
      info: counts.
    """

    total: Any
    info: ClipInfo


class Linearisation(NamedTuple):
    """Where a pass takes gradients and how it clips them; public, or an earlier release."""

    params: Params
    subspace: Subspace
    precision: Precision
    l2_clip_norm: jax.Array | float


class BatchSum(Protocol):
    """The exact sum over a batch of units, **not private**, and its counts."""

    def __call__(
        self,
        loss_fn: LossFn,
        linearisation: Linearisation,
        units: Record,
        mask: Any,
        *,
        microbatch_size: int | None,
        mode: Mode,
        exact: bool,
        mesh: Mesh | None,
    ) -> tuple[Any, ClipInfo]:
        """See `device_sum`."""
        ...


def empty(zeros: Any) -> Partial:
    """The sum over no batch.

    Args:
      zeros: total of no unit, `Noise.zeros`.
    """
    return Partial(zeros, ClipInfo(*[jnp.zeros((), int)] * 3))


def resized(partial: Partial, num_coordinates: int) -> Partial:
    """A partial sum with zeros added to its coordinates, or taken away again."""

    def to_size(x: Any) -> np.ndarray:
        x = np.asarray(x)[:num_coordinates]
        return np.pad(x, (0, num_coordinates - len(x)))

    total = jax.tree.map(to_size, partial.total)
    return partial._replace(total=total if isinstance(total, np.ndarray) else jax.tree.map(jnp.asarray, total))


@functools.partial(compiled, static_argnames=("loss_fn", "microbatch_size", "mode", "exact", "mesh"))
def device_sum(
    loss_fn: LossFn,
    linearisation: Linearisation,
    units: Record,
    mask: jax.Array | None,
    *,
    microbatch_size: int | None,
    mode: Mode,
    exact: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Words, ClipInfo]:
    """`clipping.unit_sum` of units that lie on one device, or along the axis `devices.AXIS` of a local mesh.

    Other axes of the mesh are left to the compiler, so that parameters may be sharded over them.

    Args:
      loss_fn: loss of one unit.
      linearisation: where gradients are taken and how they are clipped; public.
      units: pytree with a leading axis n.
      mask: bool (n,), which of them count; None where all do.
      microbatch_size: see `clipping.unit_sum`.
      mode: see `gradients.projected_gradients`.
      exact: whether each unit is rounded by itself, see `clipping.unit_sum`.
      mesh: a local mesh, or None.

    Returns:
      The sum in whole steps, and counts; **not private** both.
    """

    def shard(
        linearisation: Linearisation, units: Record, mask: jax.Array | None, axis_name: str | None = devices.AXIS
    ) -> tuple[Words, ClipInfo]:
        return unit_sum(
            loss_fn,
            linearisation.params,
            linearisation.subspace,
            linearisation.precision,
            units,
            l2_clip_norm=linearisation.l2_clip_norm,
            mask=mask,
            microbatch_size=microbatch_size,
            mode=mode,
            axis_name=axis_name,
            exact=exact,
        )

    if mesh is None:
        return shard(linearisation, units, mask, None)
    whole = PartitionSpec()
    split = PartitionSpec(devices.AXIS)
    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=(whole, split, split), out_specs=whole, axis_names=frozenset({devices.AXIS})
    )
    return sharded(linearisation, units, mask)


def host_sum(
    loss_fn: LossFn,
    linearisation: Linearisation,
    units: Record,
    mask: Any,
    *,
    microbatch_size: int | None,
    mode: Mode,
    exact: bool = True,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, ClipInfo]:
    """`exact_clipping.integer_sum` of the units that the mask keeps; one unit after the other, on one device.

    Args:
      loss_fn: loss of one unit.
      linearisation: where gradients are taken and how they are clipped; public.
      units: pytree with a leading axis n.
      mask: bool (n,), which of them count; None where all do.
      microbatch_size: units whose integers are held at a time.
      mode: see `gradients.projected_gradients`.
      exact: each unit is rounded by itself in any case.
      mesh: each process uses one device, whatever it has.

    Returns:
      The sum (k,) int64 in whole steps, and counts; **not private** both.
    """
    if mask is not None:
        units = record_trees.take(units, np.flatnonzero(mask))
    return integer_sum(
        loss_fn,
        linearisation.params,
        linearisation.subspace,
        linearisation.precision,
        units,
        l2_clip_norm=float(linearisation.l2_clip_norm),
        microbatch_size=microbatch_size,
        mode=mode,
    )


def add(partial: Partial, total: Any, info: ClipInfo) -> Partial:
    """One batch more."""
    if isinstance(total, np.ndarray):
        return Partial(partial.total + total, jax.tree.map(jnp.add, partial.info, info))
    return _add_words(partial, total, info)


@compiled
def _add_words(partial: Partial, total: Words, info: ClipInfo) -> Partial:
    return Partial(integers.add(partial.total, total), jax.tree.map(jnp.add, partial.info, info))


def partial_sums(
    batch_sum: Callable[..., tuple[Any, ClipInfo]],
    linearisation: Linearisation,
    stream: Iterable[Record],
    mesh: Mesh | None,
    partial: Partial,
    skip: int = 0,
) -> Iterator[tuple[int, Partial, tuple[Record, np.ndarray]]]:
    """The pass over a stream: after each batch, how many are read, the sum so far and the batch.

    Args:
      batch_sum: `(linearisation, units, mask) -> (sum, info)`: `device_sum` with its static arguments.
      linearisation: where.
      stream: re-iterable of batches.
      mesh: a local mesh.
      partial: `empty`, or what `skip` batches have given.
      skip: batches that `partial` holds already; they are read and passed over.
    """
    for i, (units, mask) in enumerate(streams.batches(stream, devices.num_shares(mesh)), start=1):
        if i > skip:
            ahead = add(partial, *batch_sum(linearisation, *devices.place(mesh, units, mask)))
            # One batch computes while the next is read: without this wait all of them would queue on the device.
            jax.block_until_ready(partial)
            partial = ahead
        yield i, partial, (units, mask)


def whole_sum(total: Any, info: ClipInfo, mesh: Mesh | None) -> tuple[Any, ClipInfo]:
    """A sum and its counts over all processes of a mesh."""
    total, info = devices.over_processes((total, info), mesh)
    # Of one process the words are in their range already.
    is_many = devices.spans_processes(mesh) and isinstance(total, Words)
    return integers.normalised(total) if is_many else total, info
