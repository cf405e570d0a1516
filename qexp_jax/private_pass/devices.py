"""Devices and processes that share a pass: what a mesh is here, and how its processes keep step.

Each process holds units of its own. One key, one draw and one refusal are shared by all of them: `one_key`,
`from_first`, `in_step`. With one process these return what they are given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qexp_jax.data.records import Record

AXIS = "data"


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


def place(mesh: Mesh | None, units: Record, mask: Any) -> tuple[Record, Any]:
    """Units and mask, whose number is a multiple of the shares, on the devices that will read them."""
    if mesh is None:
        return units, mask
    return jax.device_put((units, mask), NamedSharding(mesh, PartitionSpec(AXIS)))


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays on every device of a local mesh; those that lie on it already, sharded or not, stay as they are."""
    if mesh is None:
        return tree
    devices = set(mesh.devices.flat)

    def put(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.sharding.device_set == devices:
            return x
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)


# --- several processes ---


def over_processes(tree: Any, mesh: Mesh | None) -> Any:
    """Sums over the processes of a mesh, in the order of their numbers: the same bits in each process."""
    if not spans_processes(mesh):
        return tree

    def gathered_sum(x: Any) -> np.ndarray:
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


def from_first(mesh: Mesh | None, array: jax.Array) -> jax.Array:
    """The array of the first process, in every process of a mesh: noise that is fresh in each is one release."""
    if not spans_processes(mesh):
        return array
    return jnp.asarray(multihost_utils.broadcast_one_to_all(np.asarray(array)))


def furthest(mesh: Mesh | None, round_number: int, state: Any) -> tuple[int, Any]:
    """Where the process that has come furthest stands: a round that it drew, all had summed.

    Args:
      mesh: devices, or None.
      round_number: that this process has reached.
      state: pytree of arrays, of this process.

    Returns:
      The largest round number, and the state of a process that has reached it; the same in every process.
    """
    if not spans_processes(mesh):
        return round_number, state
    rounds = multihost_utils.process_allgather(np.asarray(round_number))
    if rounds.min() == rounds.max():
        return round_number, state
    is_source = jax.process_index() == int(rounds.argmax())
    found = multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, state), is_source=is_source)
    return int(rounds.max()), jax.tree.map(jnp.asarray, found)


def in_step(mesh: Mesh | None, action: Callable[[], Any]) -> Any:
    """What an action returns in this process; where it raises in one process of a mesh, it raises in all.

    So no process draws what another one was refused, nor waits for one that has gone.
    """
    result = None
    error = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failed = error is not None
    if spans_processes(mesh):
        failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
    if error is not None:
        raise error
    if failed:
        raise ValueError("Another process was refused, and says why; this one makes no release either.")
    return result


def in_first(mesh: Mesh | None, action: Callable[[], None]) -> None:
    """Runs an action in the first process of a mesh alone; where it raises, all raise."""
    is_first = not spans_processes(mesh) or jax.process_index() == 0
    in_step(mesh, action if is_first else lambda: None)
