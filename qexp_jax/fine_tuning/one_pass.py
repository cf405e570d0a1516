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
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import records, stream
from qexp_jax.data.records import LossFn, Record
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning.checkpoint import Progress
from qexp_jax.mechanism import gaussian, hardened
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import Mode
from qexp_jax.model.subspace import Layout
from qexp_jax.numerics import integers
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.private_pass import clipping, passes
from qexp_jax.private_pass.clipping import ClipInfo
from qexp_jax.private_pass.passes import Linearisation
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic.precision import Precision


class PassOptions(NamedTuple):
    """How the private pass runs; public.

    Attributes:
      loss_fn: loss of one unit.
      microbatch_size: units held at a time; None leaves it to `clipping.clipped_sum`.
      mode: see `gradients.projected_gradients`.
      mesh: devices that share the units, if several; over several processes, each has units of its own.
      hardened: whether the noise is discrete.
      exact: whether each unit is rounded by itself, see `clipping.unit_sum`.
      diagnostics: whether somebody looks at the `RoundInfo`s.
      store: an open checkpoint, if any.
      progress: called with the name of each stage as it begins.
    """

    loss_fn: LossFn
    microbatch_size: int | None
    mode: Mode
    mesh: jax.sharding.Mesh | None
    hardened: bool
    exact: bool
    diagnostics: bool
    store: checkpoints.Store | None
    progress: Callable[[str], None] | None


def announce(progress: Callable[[str], None] | None, stage: str, finished: Any = None) -> None:
    """Waits for the stage before, so that a caller may time stages; nothing waits where nobody listens."""
    if progress is not None:
        jax.block_until_ready([x for x in jax.tree.leaves(finished) if isinstance(x, jax.Array)])
        progress(stage)


def draw_of_pass(
    key: jax.Array, options: PassOptions, linearisation: Linearisation, units: Record, noise_multiplier: float
) -> tuple[jax.Array, jax.Array | float]:
    """The noisy sum (k,) of one pass beside the rounds, and its noise's C z: a release that `tilt` makes.

    Args:
      key: secret; the noise of this release alone.
      options: how it runs.
      linearisation: where gradients are taken and how they are clipped; public.
      units: pytree with a leading axis, or a stream, of which a partial sum is not saved.
      noise_multiplier: z.

    Formal guarantee: mu-GDP with mu = Delta / (C z), or rho-zCDP where the options is hardened (T1).
    """
    mesh = passes.local_mesh(options.mesh)
    linearisation = passes.replicate(mesh, linearisation)
    begin = beginning(0, None, passes.empty(linearisation.subspace.dim, options.hardened))
    never_saved = options._replace(store=options.store and options.store._replace(every=sys.maxsize))
    summed = exact_sum(never_saved, linearisation, place(options, mesh, units), begin, None)
    noise_std = linearisation.l2_clip_norm * noise_multiplier
    drawn = draw(key, options, linearisation, summed.total, noise_std, noise_multiplier)
    return drawn.noisy, drawn.noise_std


def place(options: PassOptions, mesh: jax.sharding.Mesh | None, units: Record) -> Any:
    """Units in memory, with their mask on a mesh, where they are read, once for all rounds; a stream as it is."""
    if stream.is_stream(units):
        return units
    if mesh is None:
        return units if options.hardened else jax.tree.map(jnp.asarray, units)
    return passes.place(mesh, *records.pad(units, passes.num_shares(mesh)))


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
    options: PassOptions, linearisation: Linearisation, units: Any, progress: Progress, length: int | None
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
    mesh = passes.local_mesh(options.mesh)
    settings: dict[str, Any] = {"microbatch_size": options.microbatch_size, "mode": options.mode}
    if not options.hardened:
        batch_sum = functools.partial(passes.device_sum, options.loss_fn, exact=options.exact, mesh=mesh, **settings)
    else:
        batch_sum = functools.partial(passes.exact_sum, options.loss_fn, **settings)
    if stream.is_stream(units):
        total, info, length = _stream_sum(options, batch_sum, linearisation, units, progress, length)
    else:
        placed, mask = units if mesh else (units, None)
        total, info = batch_sum(linearisation, placed, mask)
    total, info = passes.whole_sum(total, info, options.mesh)
    return Summed(total, info, length)


def _stream_sum(
    options: PassOptions,
    batch_sum: Callable[..., Any],
    linearisation: Linearisation,
    units: Any,
    progress: Progress,
    length: int | None,
) -> Summed:
    """Of this process alone, batch after batch, each read once."""
    mesh = passes.local_mesh(options.mesh)
    store = options.store
    skip = progress.batches
    # A saved partial sum has as many coordinates as any round may have.
    partial = passes.resized(progress.partial, passes.num_coordinates(linearisation, options.hardened))
    # Where the stream is empty, no batch sets these.
    i = 0
    digest = b""
    read = 0
    sums = passes.partial_sums(batch_sum, linearisation, units, mesh, partial, skip)
    for i, partial, batch in sums:
        read += int(np.sum(batch[1]))
        if options.progress is not None:
            options.progress(f"private pass, batch {i}")
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
        checkpoints.in_step(options.mesh, lambda: checkpoints.bind_data(store, digest))
    return Summed(partial.total, partial.info, read)


class Drawn(NamedTuple):
    """A sum and the draw of it; only `noisy` and `noise_std` may leave the curator.

    Attributes:
      total: (k,), the exact sum, whitened; **not private**.
      noisy: (k,), with its noise.
      noise_std: C z.
    """

    total: Any
    noisy: jax.Array
    noise_std: Any


def draw(
    key: jax.Array, options: PassOptions, linearisation: Linearisation, total: Any, noise_std: Any, multiplier: float
) -> Drawn:
    """An exact sum with its noise.

    Args:
      key: secret; the noise of this release alone. Of a hardened one the system's entropy is used in its place.
      options: how it runs.
      linearisation: of the pass.
      total: of `exact_sum`.
      noise_std: C z; of a hardened release it is found anew, of the integers.
      multiplier: z.

    Formal guarantee: `noisy` is mu-GDP with mu = Delta / (C z), or rho-zCDP where the release is hardened (T1).
    """
    precision = linearisation.precision
    l2_clip_norm = jnp.asarray(linearisation.l2_clip_norm, linearisation.subspace.layout.dtype)
    if options.hardened:
        noise = hardened.discrete_noise(multiplier, linearisation.subspace.dim)
        whitened, noisy = hardened.noisy_sum(total, noise, l2_clip_norm)
        # Its noise is fresh in each process, and one of these draws is the release.
        return Drawn(whitened, checkpoints.from_first(options.mesh, noisy), l2_clip_norm * noise.multiplier)
    step = clipping.step_size(precision, l2_clip_norm)
    noisy = _noisy_sum(key, total, precision, step, noise_std)
    whiten = _whitened_exactly if options.diagnostics else _whitened
    return Drawn(whiten(precision, total, step), noisy, noise_std)


_noisy_sum = jax.jit(gaussian.noisy_whitened_sum)
_whitened = jax.jit(precisions.whiten_sum)


def _whitened_exactly(precision: Precision, total: Any, step: jax.Array) -> np.ndarray:
    """The sum in float64: float32 would round a long one by more than a unit's part."""
    with jax.enable_x64(True):
        precision, step = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), np.float64), (precision, step))
        return np.asarray(_whiten_numbers(precision, integers.to_int64(total) * step))


@jax.jit
def _whiten_numbers(precision: Precision, numbers: jax.Array) -> jax.Array:
    return precision.root.whiten_sum(precision.arrays, numbers)


def enter_draw(options: PassOptions, key: jax.Array, number: int, noisy: jax.Array) -> None:
    """Of the ledger's one debit a round has one draw; without a checkpoint no round could have a second."""
    ledger = None if options.store is None else options.store.ledger
    if ledger is not None:
        checkpoints.in_first(options.mesh, lambda: ledgers.enter_draw(ledger, key, number, noisy))


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
