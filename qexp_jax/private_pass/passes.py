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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qexp_jax.data import records as record_trees
from qexp_jax.data import stream as streams
from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.model.gradients import Mode
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics import integers
from qexp_jax.numerics.integers import Words
from qexp_jax.private_pass.clipping import ClipInfo, unit_sum
from qexp_jax.private_pass.exact_clipping import integer_sum
from qexp_jax.quadratic.precision import Precision

AXIS = "data"


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


def empty(num_coordinates: int, hardened: bool = False) -> Partial:
    """The sum over no batch."""
    total = np.zeros(num_coordinates, np.int64) if hardened else integers.zeros(num_coordinates)
    return Partial(total, ClipInfo(*[jnp.zeros((), int)] * 3))


def num_coordinates(linearisation: Linearisation, hardened: bool) -> int:
    """Of a pass's sum; a hardened one is whitened unit by unit."""
    return linearisation.subspace.dim if hardened else linearisation.precision.num_coordinates


def resized(partial: Partial, num_coordinates: int) -> Partial:
    """A partial sum with zeros added to its coordinates, or taken away again."""

    def to_size(x):
        x = np.asarray(x)[:num_coordinates]
        return np.pad(x, (0, num_coordinates - len(x)))

    total = jax.tree.map(to_size, partial.total)
    return partial._replace(total=total if isinstance(total, np.ndarray) else jax.tree.map(jnp.asarray, total))


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


@functools.partial(jax.jit, static_argnames=("loss_fn", "microbatch_size", "mode", "exact", "mesh"))
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
    """`clipping.unit_sum` of units that lie on one device, or along the axis `AXIS` of a local mesh.

    Other axes of the mesh are left to the compiler, so that parameters may be sharded over them.
    """

    def shard(linearisation, units, mask, axis_name=AXIS):
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
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(
        shard, mesh=mesh, in_specs=(whole, split, split), out_specs=whole, axis_names=frozenset({AXIS})
    )(linearisation, units, mask)


def exact_sum(
    loss_fn: LossFn, linearisation: Linearisation, units: Record, mask: Any, *, microbatch_size: int | None, mode: Mode
) -> tuple[np.ndarray, ClipInfo]:
    """`exact_clipping.integer_sum` of the units that the mask keeps; one unit after the other, on one device."""
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


@jax.jit
def _add_words(partial, total, info):
    return Partial(integers.add(partial.total, total), jax.tree.map(jnp.add, partial.info, info))


def place(mesh: Mesh | None, units: Record, mask: Any) -> tuple[Record, Any]:
    """Units and mask, whose number is a multiple of the shares, on the devices that will read them."""
    if mesh is None:
        return units, mask
    return jax.device_put((units, mask), NamedSharding(mesh, PartitionSpec(AXIS)))


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
    for i, (units, mask) in enumerate(streams.batches(stream, num_shares(mesh)), start=1):
        if i > skip:
            ahead = add(partial, *batch_sum(linearisation, *place(mesh, units, mask)))
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


def whole_sum(total: Any, info: ClipInfo, mesh: Mesh | None) -> tuple[Any, ClipInfo]:
    """A sum and its counts over all processes of a mesh."""
    total, info = over_processes((total, info), mesh)
    return integers.normalised(total) if isinstance(total, Words) else total, info


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
