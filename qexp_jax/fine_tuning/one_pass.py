"""One pass over the private units, and the draw of its sum: all that a round or a tilt knows of the private data.

    place       units where they are read
    exact_sum   the clipped sum over all batches, devices and processes, **not private**
    draw        the same with noise: what may be released (T1)
    enter_draw  into the ledger, before anything is made of it

A stream's partial sum is saved on the way, so that an interrupted pass goes on; see `checkpoint`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qexp_jax.data import records, stream
from qexp_jax.data.records import LossFn
from qexp_jax.data.source import InMemory, Source, Streamed
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning.checkpoint import Progress
from qexp_jax.fine_tuning.progress import Announce
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import Mode
from qexp_jax.model.subspace import Layout
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.private_pass import devices, passes
from qexp_jax.private_pass.clipping import ClipInfo
from qexp_jax.private_pass.noise import Drawn, Noise
from qexp_jax.private_pass.passes import Linearisation, Partial


class PassOptions(NamedTuple):
    """How the private pass runs; public.

    Attributes:
      loss_fn: loss of one unit.
      microbatch_size: units held at a time; None leaves it to `clipping.clipped_sum`.
      mode: see `gradients.projected_gradients`.
      mesh: devices that share the units, if several; over several processes, each has units of its own.
      noise: what a sum gets, and how it is formed.
      exact: whether each unit is rounded by itself, see `clipping.unit_sum`.
      diagnostics: whether somebody looks at the `RoundInfo`s.
      store: an open checkpoint, if any.
      announce: of `progress.announcer`.
    """

    loss_fn: LossFn
    microbatch_size: int | None
    mode: Mode
    mesh: jax.sharding.Mesh | None
    noise: Noise
    exact: bool
    diagnostics: bool
    store: checkpoints.Store | None
    announce: Announce


def draw_of_pass(
    key: jax.Array, options: PassOptions, linearisation: Linearisation, units: Source, noise_multiplier: float
) -> tuple[jax.Array, jax.Array | float]:
    """The noisy sum (k,) of one pass beside the rounds, and its noise's C z: a release that `tilt` makes.

    Args:
      key: secret; the noise of this release alone.
      options: how it runs.
      linearisation: where gradients are taken and how they are clipped; public.
      units: in memory or a stream, of which a partial sum is not saved.
      noise_multiplier: z.

    Formal guarantee: that of `Noise.draw` (T1).
    """
    mesh = devices.local_mesh(options.mesh)
    linearisation = devices.replicate(mesh, linearisation)
    begin = beginning(0, None, empty(options, linearisation.subspace.dim))
    never_saved = options._replace(store=options.store and options.store._replace(every=sys.maxsize))
    summed = exact_sum(never_saved, linearisation, place(options, units), begin, None)
    noise_std = linearisation.l2_clip_norm * noise_multiplier
    drawn = draw(key, options, linearisation, summed.total, noise_std, noise_multiplier)
    return drawn.noisy, drawn.noise_std


def empty(options: PassOptions, num_coordinates: int) -> Partial:
    """The sum over no unit."""
    return passes.empty(options.noise.zeros(num_coordinates))


def place(options: PassOptions, units: Source) -> Source:
    """Units in memory, with their mask on a mesh, where they are read, once for all rounds; a stream as it is."""
    if isinstance(units, Streamed):
        return units
    mesh = devices.local_mesh(options.mesh)
    if mesh is None:
        return InMemory(options.noise.placed(units.records))
    return InMemory(*devices.place(mesh, *records.pad(units.records, devices.num_shares(mesh))))


class Summed(NamedTuple):
    """**Not private**: what a pass found.

    Attributes:
      total: the exact clipped sum in whole steps, over all devices and processes.
      clip_info: counts of clipped and non-finite units.
      length: how many units a stream had; the next pass must find as many. None of units in memory.
    """

    total: Any
    clip_info: ClipInfo
    length: int | None


def exact_sum(
    options: PassOptions, linearisation: Linearisation, units: Source, progress: Progress, length: int | None
) -> Summed:
    """The exact clipped sum of one round over all devices and processes.

    Args:
      options: how it runs.
      linearisation: where gradients are taken and how they are clipped; public.
      units: of `place`.
      progress: of a stream, the batches that were summed before an interruption are skipped.
      length: of the stream in the pass before, None in the first.

    Raises:
      ValueError: if the stream is not the one that was read before, or not as long.
    """
    batch_sum = functools.partial(
        options.noise.batch_sum,
        options.loss_fn,
        microbatch_size=options.microbatch_size,
        mode=options.mode,
        exact=options.exact,
        mesh=devices.local_mesh(options.mesh),
    )
    if isinstance(units, InMemory):
        total, info = batch_sum(linearisation, units.records, units.mask)
    else:
        total, info, length = _stream_sum(options, batch_sum, linearisation, units, progress, length)
    total, info = passes.whole_sum(total, info, options.mesh)
    return Summed(total, info, length)


def _stream_sum(
    options: PassOptions,
    batch_sum: Callable[..., Any],
    linearisation: Linearisation,
    units: Streamed,
    progress: Progress,
    length: int | None,
) -> Summed:
    """Of this process alone, batch after batch, each read once."""
    mesh = devices.local_mesh(options.mesh)
    store = options.store
    skip = progress.batches
    # A saved partial sum has as many coordinates as any round may have.
    partial = passes.resized(progress.partial, options.noise.num_coordinates(linearisation))
    # Where the stream is empty, no batch sets these.
    i = 0
    digest = b""
    read = 0
    sums = passes.partial_sums(batch_sum, linearisation, units.batches, mesh, partial, skip)
    for i, partial, batch in sums:
        read += int(np.sum(batch[1]))
        options.announce(f"private pass, batch {i}")
        if store is None:
            continue
        digest = stream.digest(digest, batch)
        if i == skip and digest != progress.digest.tobytes():
            raise ValueError("The private stream is not the one that the checkpoint's partial sum was made of.")
        if i > skip and i % store.every == 0:
            saved = passes.resized(partial, linearisation.subspace.dim)
            now = progress._replace(batches=i, partial=saved, digest=np.frombuffer(digest, np.uint8))
            save(options, linearisation.subspace.layout, now)
    if i < skip or length not in (None, read):
        raise ValueError("The private stream changed its length between two readings; nothing is released.")
    if store is not None:
        # Before the draw, and in every process of a mesh or in none.
        devices.in_step(options.mesh, lambda: checkpoints.bind_data(store, digest))
    return Summed(partial.total, partial.info, read)


def draw(
    key: jax.Array, options: PassOptions, linearisation: Linearisation, total: Any, noise_std: Any, multiplier: float
) -> Drawn:
    """An exact sum with its noise.

    Args:
      key: secret; the noise of this release alone.
      options: how it runs.
      linearisation: of the pass.
      total: of `exact_sum`.
      noise_std: C z.
      multiplier: z.

    Formal guarantee: that of `Noise.draw` (T1).
    """
    return options.noise.draw(key, linearisation, total, noise_std, multiplier, options.mesh, options.diagnostics)


def enter_draw(options: PassOptions, key: jax.Array, number: int, noisy: jax.Array) -> None:
    """Of the ledger's one debit a round has one draw; without a checkpoint no round could have a second.

    Args:
      options: with an open checkpoint, or none.
      key: by which the ledger knows the release.
      number: of the round.
      noisy: the draw, of which the ledger keeps a tag.
    """
    ledger = None if options.store is None else options.store.ledger
    if ledger is not None:
        devices.in_first(options.mesh, lambda: ledgers.enter_draw(ledger, key, number, noisy))


def beginning(number: int, state: Any, empty: Any) -> Progress:
    """Where a round begins, before any batch.

    Args:
      number: of the round.
      state: the releases so far.
      empty: of `passes.empty`.
    """
    return Progress(round=number, batches=0, state=state, partial=empty, digest=np.zeros(32, np.uint8))


def save(options: PassOptions, layout: Layout, progress: Progress) -> None:
    """Where the release stands, if there is a checkpoint; of the parameters only those that are tuned."""
    if options.store is not None:
        leaves = subspaces.tuned_leaves(layout, progress.state.params)
        checkpoints.save(options.store, progress._replace(state=progress.state._replace(params=leaves)))
