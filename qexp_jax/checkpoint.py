"""Checkpoints of a release in progress, so that a preempted one goes on where it stopped, with the same bits.

A checkpoint holds the releases so far and the partial sum of the round in progress. **Not private**: whoever reads it
sees a sum without noise. Its folder is readable by its owner alone and says so; when the last round is done the partial
sum is gone from it.

Noise never meets two sums: a draw's key is folded with a digest of its sum (`mechanism.protecting_key`), and going on
with other data is refused, because the batches that a partial sum holds are read again and must have the digest that
they had. Keys are not stored.

Orbax writes to a temporary name and renames, so that a kill leaves the checkpoint before.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from qexp_jax.certificate import sha256_of

_WARNING = "NOT PRIVATE: the partial sums in this folder carry no noise. Never release, log or share them.\n"
_SETTINGS, _PAID = "settings.json", "paid.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where and how often a release in progress is saved.

    Attributes:
      directory: of one release; created, and made unreadable to others.
      every: batches of a stream between two saves; a round's end is always saved.
    """

    directory: str | pathlib.Path
    every: int = 100


class Progress(NamedTuple):
    """**Not private**: where a release in progress stands.

    Attributes:
      round: rounds done.
      batches: batches of the next round that `partial` holds.
      walk: the releases so far, a pytree.
      partial: `passes.Partial`.
      digest: (32,) uint8, of the batches that `partial` holds.
    """

    round: int
    batches: int
    walk: Any
    partial: Any
    digest: np.ndarray


class Store(NamedTuple):
    """An open checkpoint folder; see `open_store`."""

    folder: pathlib.Path
    manager: Any
    every: int


def open_store(checkpoint: Checkpoint, settings: dict[str, Any]) -> Store:
    """Opens or creates the folder of this process.

    Args:
      checkpoint: where.
      settings: public; what must be the same when the release goes on.

    Raises:
      ValueError: if the folder belongs to a release with other settings; names them.
    """
    import orbax.checkpoint as ocp

    if not (isinstance(checkpoint.every, int) and checkpoint.every >= 1):
        raise ValueError(f"Expected an integer every >= 1, found {checkpoint.every}.")
    process = jax.process_index()
    folder = pathlib.Path(checkpoint.directory).absolute() / f"process_{process}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_settings(folder, {name: sha256_of(value) for name, value in settings.items()})
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"qexp_jax_{process}"
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, create=False, multiprocessing_options=alone
    )
    (folder / "steps").mkdir(exist_ok=True, mode=0o700)
    return Store(folder, ocp.CheckpointManager(folder / "steps", options=options), checkpoint.every)


def _check_settings(folder, settings):
    path = folder / _SETTINGS
    if not path.exists():
        (folder / "NOT_PRIVATE.txt").write_text(_WARNING)
        _write(path, json.dumps(settings))
        return
    found = json.loads(path.read_text())
    differing = sorted(name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name))
    if differing:
        raise ValueError(f"The checkpoint {folder} belongs to a release with other {', '.join(differing)}.")


def _write(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def mark_paid(store: Store, tag: str) -> None:
    """Notes that a ledger holds this release, by the ledger's tag of its key."""
    _write(store.folder / _PAID, tag)


def is_paid(store: Store, tag: str) -> bool:
    """Whether this release was entered before it was interrupted: going on costs nothing more."""
    path = store.folder / _PAID
    return path.exists() and path.read_text() == tag


def save(store: Store, progress: Progress) -> None:
    """Writes where the release stands, and forgets what was written before."""
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(np.asarray, jax.tree.leaves(progress))
    step = progress.round * 2**32 + progress.batches
    store.manager.save(step, args=ocp.args.StandardSave(arrays), force=True)
    store.manager.wait_until_finished()


def restore(store: Store, like: Progress) -> Progress | None:
    """Where the release stood, None at its beginning; `like` gives structure, shapes and shardings."""
    import orbax.checkpoint as ocp

    step = store.manager.latest_step()
    if step is None:
        return None
    leaves, treedef = jax.tree.flatten(like)
    arrays = store.manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(np.asarray, leaves)))
    placed = [_placed_like(old, x) for old, x in zip(leaves, arrays, strict=True)]
    progress = jax.tree.unflatten(treedef, placed)
    return progress._replace(round=int(progress.round), batches=int(progress.batches))


def _placed_like(old, x):
    if not isinstance(old, jax.Array):
        return x
    return jax.device_put(x, old.sharding) if len(old.sharding.device_set) > 1 else jax.numpy.asarray(x)
