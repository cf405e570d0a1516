"""The private pass over data of any size on any devices: batch by batch, device by device, process by process.

    in memory      one `clipped_sum`
    a stream       a `clipped_sum` a batch into a compensated partial sum; memory is that of two batches, whatever n is
    a mesh         each device sums its share of a batch, and k numbers are added over the devices
    processes      each sums its own units on its own devices; k numbers a process are gathered once a round

Every unit is clipped by one device, before anything is added, and noise is added once, after the last sum (`finetune`).
Partial sums, counts and digests are **not private**.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qexp_jax import records as record_trees
from qexp_jax import stream as streams
from qexp_jax.clipping import ClipInfo, clipped_sum
from qexp_jax.gradients import Mode
from qexp_jax.hardened import integer_sum
from qexp_jax.precision import Precision
from qexp_jax.records import LossFn, Params, Record
from qexp_jax.subspace import Subspace

AXIS = "data"


class Partial(NamedTuple):
    """**Not private**: the sum over the batches read so far.

    Attributes:
      total: (k,) compensated sum; int64 on the host where it is exact (`hardened`).
      lost: (k,) what rounding has cost it (Kahan).
      info: counts.
    """

    total: Any
    lost: jax.Array
    info: ClipInfo


class Target(NamedTuple):
    """Where a pass takes gradients and how it clips them; public, or an earlier release."""

    params: Params
    subspace: Subspace
    precision: Precision
    l2_clip_norm: jax.Array | float


def empty(subspace: Subspace, exact: bool = False) -> Partial:
    """The sum over no batch."""
    zeros = jnp.zeros(subspace.dim, subspace.layout.dtype)
    total = np.zeros(subspace.dim, np.int64) if exact else zeros
    return Partial(total, zeros, ClipInfo(*[jnp.zeros((), int)] * 3))


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """This process's part of a mesh.

    Raises:
      ValueError: without an axis `AXIS`, or where it leaves a process out.
    """
    if mesh is None:
        return None
    if AXIS not in mesh.axis_names:
        raise ValueError(f"Expected a mesh with an axis {AXIS!r}, found axes {mesh.axis_names}.")
    if spans_processes(mesh) and len({d.process_index for d in mesh.devices.flat}) != jax.process_count():
        raise ValueError(f"Expected a mesh over one or all of {jax.process_count()} processes, found {mesh}.")
    local = mesh.local_mesh
    return Mesh(local.devices, local.axis_names)  # axes of type Auto


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of other processes."""
    return mesh is not None and mesh.devices.size != mesh.local_mesh.devices.size


def num_shares(mesh: Mesh | None) -> int:
    """Devices that share a batch."""
    return 1 if mesh is None else mesh.shape[AXIS]


@functools.partial(jax.jit, static_argnames=("loss_fn", "microbatch_size", "mode", "mesh"))
def device_sum(
    loss_fn: LossFn,
    target: Target,
    units: Record,
    mask: jax.Array | None,
    *,
    microbatch_size: int | None,
    mode: Mode,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, ClipInfo]:
    """`clipping.clipped_sum` of units that lie on one device, or along the axis `AXIS` of a local mesh.

    Other axes of the mesh are left to the compiler, so that parameters may be sharded over them.
    """

    def shard(target, units, mask, axis_name=AXIS):
        return clipped_sum(
            loss_fn,
            target.params,
            target.subspace,
            target.precision,
            units,
            l2_clip_norm=target.l2_clip_norm,
            mask=mask,
            microbatch_size=microbatch_size,
            mode=mode,
            axis_name=axis_name,
        )

    if mesh is None:
        return shard(target, units, mask, None)
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(
        shard, mesh=mesh, in_specs=(whole, split, split), out_specs=whole, axis_names=frozenset({AXIS})
    )(target, units, mask)


def exact_sum(
    loss_fn: LossFn, target: Target, units: Record, mask: Any, *, microbatch_size: int | None, mode: Mode
) -> tuple[np.ndarray, ClipInfo]:
    """`hardened.integer_sum` of the units that the mask keeps; one unit after the other, on one device."""
    if mask is not None:
        units = record_trees.take(units, np.flatnonzero(mask))
    return integer_sum(
        loss_fn,
        target.params,
        target.subspace,
        target.precision,
        units,
        l2_clip_norm=float(target.l2_clip_norm),
        microbatch_size=microbatch_size,
        mode=mode,
    )


def add(partial: Partial, total: Any, info: ClipInfo) -> Partial:
    """One batch more: compensated on the device, or exact on the host."""
    if isinstance(total, np.ndarray):
        return Partial(partial.total + total, partial.lost, jax.tree.map(jnp.add, partial.info, info))
    return _add_compensated(partial, total, info)


@jax.jit
def _add_compensated(partial, total, info):
    """Kahan's sum: that of a million units is as exact as that of one batch."""
    term = total - partial.lost
    new = partial.total + term
    return Partial(new, (new - partial.total) - term, jax.tree.map(jnp.add, partial.info, info))


def place(mesh: Mesh | None, units: Record, mask: Any) -> tuple[Record, Any]:
    """Units and mask, whose number is a multiple of the shares, on the devices that will read them."""
    if mesh is None:
        return units, mask
    return jax.device_put((units, mask), NamedSharding(mesh, PartitionSpec(AXIS)))


def partial_sums(
    batch_sum: Callable[..., tuple[jax.Array, ClipInfo]],
    target: Target,
    stream: Iterable[Record],
    mesh: Mesh | None,
    partial: Partial,
    skip: int = 0,
) -> Iterator[tuple[int, Partial, tuple[Record, np.ndarray]]]:
    """The pass over a stream: after each batch, how many are read, the sum so far and the batch.

    Args:
      batch_sum: `(target, units, mask) -> (sum, info)`: `device_sum` with its static arguments.
      target: where.
      stream: re-iterable of batches.
      mesh: a local mesh.
      partial: `empty`, or what `skip` batches have given.
      skip: batches that `partial` holds already; they are read and passed over.
    """
    for i, (units, mask) in enumerate(streams.batches(stream, num_shares(mesh)), start=1):
        if i > skip:
            ahead = add(partial, *batch_sum(target, *place(mesh, units, mask)))
            # One batch computes while the next is read: without this wait all of them would queue on the device.
            jax.block_until_ready(partial)
            partial = ahead
        yield i, partial, (units, mask)


def over_processes(tree: Any, mesh: Mesh | None) -> Any:
    """Sums over the processes of a mesh, in the order of their numbers: the same bits in each process."""
    if not spans_processes(mesh):
        return tree

    def gathered_sum(x):
        x = np.atleast_1d(np.asarray(x))
        # As bytes: JAX would cut int64 to int32.
        parts = multihost_utils.process_allgather(np.frombuffer(x.tobytes(), np.uint8)).view(x.dtype)
        return np.sum(parts, axis=0, dtype=x.dtype)

    return jax.tree.map(lambda x: gathered_sum(x).reshape(np.shape(x)), tree)


def one_key(key: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The key of the first process, in every process of a mesh: noise is the same in each, and added once."""
    if not spans_processes(mesh):
        return key
    data = multihost_utils.broadcast_one_to_all(np.asarray(jax.random.key_data(key)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def furthest(mesh: Mesh | None, round_number: int, walk: Any) -> tuple[int, Any]:
    """Where the process that has come furthest stands: a round that it drew, all had summed."""
    if not spans_processes(mesh):
        return round_number, walk
    rounds = multihost_utils.process_allgather(np.asarray(round_number))
    if rounds.min() == rounds.max():
        return round_number, walk
    is_source = jax.process_index() == int(rounds.argmax())
    found = multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, walk), is_source=is_source)
    return int(rounds.max()), jax.tree.map(jnp.asarray, found)


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays on every device of a local mesh; those that lie on it already, sharded or not, stay as they are."""
    if mesh is None:
        return tree
    devices = set(mesh.devices.flat)

    def put(x):
        if not isinstance(x, jax.Array) or x.sharding.device_set == devices:
            return x
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)
