"""Checkpoints of a release in progress, so that a preempted one goes on where it stopped, with the same bits.

A checkpoint holds the releases so far, the partial sum of the round in progress, and a digest of the private data, by
which a guess of them can be tested. **Not private**: whoever reads it sees a sum without noise. Its folder is readable
by its owner alone and says so; when the last round is done the partial sum is gone from it, the digest stays.

**One release.** Going on with other data, or with the same in another order, is refused. Units in memory are digested
when the release begins, after it was entered in its ledger, and compared before anything else when it goes on. Of a
stream the first pass is digested as it is read, before its draw, and every later pass must end with the same digest;
the batches that a partial sum holds are read again and must have the digest that they had. The digest lies beside the
steps, so that without them the release begins again with the same data.

A folder can be copied and its files deleted, so what was drawn is not its to say: each draw is entered in the ledger
before anything is made of it (`ledger.enter_draw`), and a folder that says that its release was entered is believed
only if the ledger says so too. Without a ledger nothing remembers what was drawn, and a hardened release, whose noise
is fresh, is another one each time a copy goes on.

Noise never meets two sums: a draw's key is folded with a digest of its sum (`mechanism.protecting_key`). Keys are not
stored. Orbax writes to a temporary name and renames, so that a kill leaves the checkpoint before.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from qexp_jax.data import arguments, stream
from qexp_jax.data.records import Record
from qexp_jax.privacy.certificate import sha256_of
from qexp_jax.privacy.ledger import Ledger

_WARNING = (
    "NOT PRIVATE: the partial sums in this folder carry no noise, and its digests tell whether a guess of the private "
    "data is right. Never release, log or share them.\n"
)
_SETTINGS = "settings.json"
_PAID = "paid.txt"
_DATA = "data_digest.txt"
_DRAW = "draw.json"
_FIRST_ROUND = 2**32  # a step's number is this many times its round, and its batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where and how often a release in progress is saved.

    Attributes:
      directory: of one release; created, and made unreadable to others. `~` is the home folder. It does not hold the
        key, which has to be the same when the release goes on: see `keys.fresh_key` for how to keep it.
      every: batches of a stream between two saves; a round's end is always saved.
    """

    directory: str | os.PathLike[str]
    every: int = 100


class Progress(NamedTuple):
    """**Not private**: where a release in progress stands.

    Attributes:
      round: rounds done.
      batches: batches of the next round that `partial` holds.
      state: the releases so far, a pytree.
      partial: `passes.Partial`.
      digest: (32,) uint8, of the batches that `partial` holds.
    """

    round: int
    batches: int
    state: Any
    partial: Any
    digest: np.ndarray


class Store(NamedTuple):
    """An open checkpoint folder; see `open_store`.

    Attributes:
      folder: of this process.
      manager: of its steps.
      every: batches between two saves.
      ledger: where each draw is entered, if any.
    """

    folder: pathlib.Path
    manager: Any
    every: int
    ledger: Ledger | None = None


def check(checkpoint: Any) -> tuple[pathlib.Path, int]:
    """The folder of a checkpoint, and its `every` as a Python integer; makes nothing.

    Raises:
      ValueError: for what is no `Checkpoint`, or has attributes of a wrong type.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise ValueError(f"Expected a Checkpoint(directory=...), found {arguments.described(checkpoint)}.")
    every = arguments.count("every", checkpoint.every)
    directory = checkpoint.directory
    if not isinstance(directory, str | os.PathLike):
        raise ValueError(f"Expected a path as a checkpoint's directory, found {arguments.described(directory)}.")
    try:
        return pathlib.Path(directory).expanduser().absolute(), every
    except (TypeError, RuntimeError):  # bytes; the home of a user that does not exist
        raise ValueError(f"Expected a path as a checkpoint's directory, found {directory!r}.") from None


def open_store(checkpoint: Checkpoint, settings: dict[str, Any]) -> Store:
    """Opens or creates the folder of this process.

    Args:
      checkpoint: where.
      settings: public; what must be the same when the release goes on.

    Raises:
      ValueError: if the folder belongs to a release with other settings, which it names, or does not say of which data
        its rounds were made.
    """
    import orbax.checkpoint as ocp

    directory, every = check(checkpoint)
    process = jax.process_index()
    folder = directory / f"process_{process}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"Expected a folder for the checkpoint, found a file on the way to {folder}.") from None
    folder.chmod(0o700)  # it may have been there, or have been copied
    _check_settings(folder, {name: sha256_of(value) for name, value in settings.items()})
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"qexp_jax_{process}"
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, create=False, multiprocessing_options=alone
    )
    (folder / "steps").mkdir(exist_ok=True, mode=0o700)
    store = Store(folder, ocp.CheckpointManager(folder / "steps", options=options), every)
    if (store.manager.latest_step() or 0) >= _FIRST_ROUND and not knows_data(store):
        raise ValueError(f"The checkpoint {folder} does not say of which data it was made, and cannot go on.")
    return store


def _check_settings(folder: pathlib.Path, settings: dict[str, str]) -> None:
    path = folder / _SETTINGS
    if not path.exists():
        (folder / "NOT_PRIVATE.txt").write_text(_WARNING)
        _write(path, json.dumps(settings))
        return
    found = json.loads(path.read_text())
    differing = sorted(name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name))
    if differing:
        raise ValueError(f"The checkpoint {folder} belongs to a release with other {', '.join(differing)}.")


def _write(path: pathlib.Path, text: str) -> None:
    # A kill between the two lines leaves the file as it was.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def mark_paid(store: Store, tag: str) -> None:
    """Notes that a ledger holds this release, by the ledger's tag of its key."""
    _write(store.folder / _PAID, tag)


def paid_tag(store: Store) -> str | None:
    """The tag of the release that was entered in a ledger before it was interrupted; its ledger must say so too."""
    path = store.folder / _PAID
    return path.read_text() if path.exists() else None


def knows_data(store: Store) -> bool:
    """Whether the folder says of which data it was made."""
    return (store.folder / _DATA).exists()


def check_units(store: Store, units: Record) -> None:
    """Raises if the folder was made of other units in memory than these in their order; notes nothing."""
    if knows_data(store):
        bind_data(store, stream.digest(b"", units))


def bind_units(store: Store, units: Record) -> None:
    """`bind_data` of units in memory that `check_units` has let through."""
    if not knows_data(store):
        bind_data(store, stream.digest(b"", units))


def bind_data(store: Store, digest: bytes) -> None:
    """Notes of which data a release is made, before its first draw; afterwards the data must be these.

    Raises:
      ValueError: if they are not; says nothing of them.
    """
    path = store.folder / _DATA
    if not path.exists():
        _write(path, digest.hex())
    elif path.read_text() != digest.hex():
        raise ValueError("The private data are not those, in their order, that the checkpoint was made of.")


def save_draw(store: Store, draw: np.ndarray) -> None:
    """Writes a draw that is made once, before the rounds."""
    _write(store.folder / _DRAW, json.dumps(np.asarray(draw, np.float64).tolist()))


def restore_draw(store: Store) -> np.ndarray | None:
    """The draw of `save_draw`, None before it."""
    path = store.folder / _DRAW
    return np.asarray(json.loads(path.read_text())) if path.exists() else None


def save(store: Store, progress: Progress) -> None:
    """Writes where the release stands, and forgets what was written before."""
    import orbax.checkpoint as ocp

    arrays = jax.tree.map(np.asarray, jax.tree.leaves(progress))
    step = progress.round * _FIRST_ROUND + progress.batches
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


def _placed_like(old: Any, x: Any) -> Any:
    """A restored array where the old one lies; sharded parameters stay sharded."""
    if not isinstance(old, jax.Array):
        return x
    return jax.device_put(x, old.sharding) if len(old.sharding.device_set) > 1 else jax.numpy.asarray(x)
