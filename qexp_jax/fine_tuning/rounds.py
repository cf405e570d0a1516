"""The rounds of a release: private pass, exact draw, step of the flow; saved on the way, the same on any devices.

**Rounds (T6).** Round t expands at the parameters that the rounds before released, with precision and clip norm of one
of the plan's preconditioners, chosen by the releases before it, and noise in proportion to that clip norm, so that the
rounds compose adaptively to `mu^2 = sum mu_t^2`: given what was released before, round t is the mechanism of T1 with
public settings, hence mu_t-GDP, and adaptive composition of Gaussian trade-off curves is Gaussian (Dong, Roth and Su,
arXiv:1905.02383, Corollary 3.3). Their number and the even split are fixed by public data before the first. Where the
releases then show a heavy shift, the budget left is split evenly over more rounds, once: budgets may depend on what was
released before as long as their squares never add up to more than mu^2, for Gaussian differential privacy has a filter
that loses nothing (Smith and Thakurta, arXiv:2210.17520; zCDP, of hardened releases, has one as well: Whitehouse et
al., arXiv:2203.05481). What a round does with its draw is post-processing (T5), which no test between neighbours gains
from: it follows the draw for a T-th of the length that the sums released so far deserve (`step_size`), or under a heavy
shift for the step that the latest ones deserve; next to nothing where they look like noise, and least where the private
curvature is high. `tests/test_privacy.py` holds the composition against dp_accounting's.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation

from qexp_jax.data import records, stream
from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning.checkpoint import Progress
from qexp_jax.mechanism import gaussian, hardened
from qexp_jax.mechanism.gaussian import Quadratic
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import Mode, is_in_factors
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics import integers
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.private_pass import clipping, passes
from qexp_jax.private_pass.clipping import ClipInfo
from qexp_jax.private_pass.passes import Linearisation
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic import step_size
from qexp_jax.quadratic.accuracy import noise_cost
from qexp_jax.quadratic.directions import combine
from qexp_jax.quadratic.plan import Plan, Preconditioner, choose, is_heavy, precision_of
from qexp_jax.quadratic.step_size import CurvatureEstimate, Posterior


class RoundInfo(NamedTuple):
    """**Not private**: never release, log or store it unless the private records are open data.

    Attributes:
      plan: the public plan.
      preconditioner: of this round.
      quadratic: the utility with the exact clipped sum; with `diagnostics` a NumPy array of float64.
      noise_std: C z.
      w: the draw, less what clipping adds to the public mean gradient.
      multiples: (r + 1,) of w that were followed, in the estimate's directions and in all others; 0 where held.
      noise_cost: loss per record that the noise of this step costs under the public curvature; reveals |xi|.
      clip_info: counts of clipped and non-finite units.
    """

    plan: Plan
    preconditioner: Preconditioner
    quadratic: Quadratic
    noise_std: float
    w: jax.Array
    multiples: jax.Array
    noise_cost: jax.Array
    clip_info: ClipInfo


class State(NamedTuple):
    """Carried from round to round; made of releases and public numbers alone.

    Attributes:
      params: where the next round expands.
      posterior: what the releases say of the private gradient and curvature.
      split: after how many rounds the budget left was split anew; T if it was not. On the host, as is what it decides.
    """

    params: Params
    posterior: Posterior
    split: np.ndarray


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


_MOST_ROUNDING, _TOO_MUCH_ROUNDING = 0.02, 0.25  # of the clip norm


def needs_exact(plan: Plan, neighboring_relation: NeighboringRelation) -> bool:
    """Whether each unit has to be rounded by itself: where units have no places, or eigenvalues are far apart."""
    has_places = neighboring_relation is not NeighboringRelation.ADD_OR_REMOVE_ONE
    return not has_places or max(roundings(plan, exact=False)) > _MOST_ROUNDING


def roundings(plan: Plan, exact: bool) -> list[float]:
    """The share of the clip norm that each preconditioner keeps for rounding, `clipping.rounding`; on the host.

    Raises:
      ValueError: where rounding would take a quarter of the clip norm or more.
    """
    in_factors = is_in_factors(plan.subspace)
    found = []
    for i in range(len(plan.preconditioners.l2_clip_norm)):
        preconditioner = jax.tree.map(lambda x, i=i: x[i], plan.preconditioners)
        precision = precision_of(plan.estimate.directions, preconditioner)
        is_leading = precision.num_coordinates < precision.dim
        found.append(float(clipping.rounding(precision, exact or is_leading or not in_factors)))
    if exact and max(found) >= _TOO_MUCH_ROUNDING:
        raise ValueError(
            f"Rounding in float32 would take {max(found):.2g} of the clip norm: damping={plan.damping} is too small "
            f"for curvatures up to {float(plan.estimate.curvature.max()):.2g}."
        )
    return found


def start(layout: subspaces.Layout, params: Params, estimate: CurvatureEstimate, rounds: int) -> State:
    """The pretrained parameters, before any release."""
    posterior = jax.jit(step_size.before_release)(estimate)
    return State(subspaces.working(layout, params), posterior, np.asarray(rounds, np.int32))


def schedule(rounds: int, most_rounds: int, split: int) -> tuple[int, float]:
    """How many rounds there are, and how many such as the next one would spend the whole budget: mu_t^2 = mu^2 / that.

    Args:
      rounds: T.
      most_rounds: T where the budget left is split anew.
      split: after how many rounds it was; T if it was not.

    >>> schedule(8, 40, 8), schedule(8, 40, 4)
    ((8, 8.0), (40, 72.0))
    >>> 4 / 8 + (40 - 4) / 72
    1.0
    """
    if split == rounds:
        return rounds, float(rounds)
    return most_rounds, rounds * (most_rounds - split) / (rounds - split)


def run(
    key: jax.Array,
    state: State,
    plan: Plan,
    units: Record,
    options: PassOptions,
    *,
    num_units: int,
    noise_multiplier: float,
    release_key: jax.Array | None = None,
) -> tuple[State, list[RoundInfo]]:
    """All rounds, from the beginning or from where the checkpoint stands.

    Args:
      key: secret; the noise of the rounds.
      state: see `start`.
      plan: public.
      units: pytree with a leading axis, or a stream.
      options: how it runs.
      num_units: public N.
      noise_multiplier: z of one of T rounds.
      release_key: by which a ledger knows the release; by default `key`.

    Returns:
      The state after the last round, and the `RoundInfo` of each round that was run; **not private**.
    """
    layout, mesh = plan.subspace.layout, passes.local_mesh(options.mesh)
    plan, state = passes.replicate(mesh, (plan, state))
    empty = passes.empty(plan.subspace.dim, options.hardened)
    progress = _resumed(options, layout, state, empty)
    units, count, infos = _placed(options, mesh, units), None, []
    keys, whole = list(jax.random.split(key, plan.most_rounds)), noise_multiplier / plan.rounds**0.5
    while True:
        # How a round goes, and how many there are, depends on releases alone.
        progress = progress._replace(state=_split(progress, plan, num_units))
        num_rounds, of_rounds = schedule(plan.rounds, plan.most_rounds, int(progress.state.split))
        if progress.round == num_rounds:
            break
        multiplier = noise_multiplier * (of_rounds / plan.rounds) ** 0.5
        preconditioner, noise_std = _aim(
            progress.state.posterior, plan.estimate, plan.preconditioners, num_units, of_rounds, whole, multiplier
        )  # fmt: skip
        precision = precision_of(plan.estimate.directions, preconditioner)
        announce(options.progress, "private pass", progress.state)
        linearisation = Linearisation(progress.state.params, plan.subspace, precision, preconditioner.l2_clip_norm)
        total, clip_info, count = _pass(options, linearisation, units, progress, count)
        announce(options.progress, "draw", total)
        total, noisy, noise_std = _draw(keys[progress.round], options, linearisation, total, noise_std, multiplier)
        enter_draw(options, key if release_key is None else release_key, progress.round, noisy)
        quadratic = Quadratic(precision, total, num_units)
        w, multiples, cost, state = follow(
            noisy, progress.state, plan.subspace, quadratic, noise_std, plan.estimate, preconditioner, of_rounds
        )
        infos.append(RoundInfo(plan, preconditioner, quadratic, noise_std, w, multiples, cost, clip_info))
        state = state._replace(split=progress.state.split)  # not the copy that a compiled program returns
        progress = _beginning(progress.round + 1, state, empty)
        _save(options, layout, progress)
    announce(options.progress, "done", progress.state)
    return progress.state, [info._replace(noise_std=float(info.noise_std)) for info in infos]


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
    beginning = _beginning(0, None, passes.empty(linearisation.subspace.dim, options.hardened))
    alone = options._replace(store=options.store and options.store._replace(every=sys.maxsize))
    total, _, _ = _pass(alone, linearisation, _placed(options, mesh, units), beginning, None)
    noise_std = linearisation.l2_clip_norm * noise_multiplier
    _, noisy, noise_std = _draw(key, options, linearisation, total, noise_std, noise_multiplier)
    return noisy, noise_std


def _draw(key, options, linearisation, total, noise_std, multiplier):
    """Of an exact sum: itself, whitened, **not private**; with its noise; and the noise's C z."""
    precision, l2_clip_norm = (
        linearisation.precision,
        jnp.asarray(linearisation.l2_clip_norm, linearisation.subspace.layout.dtype),
    )
    if options.hardened:
        noise = hardened.discrete_noise(multiplier, linearisation.subspace.dim)
        total, noisy = hardened.noisy_sum(total, noise, l2_clip_norm)
        return total, checkpoints.from_first(options.mesh, noisy), l2_clip_norm * noise.multiplier
    step = clipping.step_size(precision, l2_clip_norm)
    noisy = _noisy_sum(key, total, precision, step, noise_std)
    return (_whitened_exactly if options.diagnostics else _whitened)(precision, total, step), noisy, noise_std


def _split(progress, plan, num_units):
    """The state, with the budget left split anew, once, where the releases show a heavy shift."""
    state = progress.state
    may_split = progress.round < plan.rounds < plan.most_rounds and int(state.split) == plan.rounds
    if may_split and is_heavy(state.posterior, plan.estimate, num_units):
        return state._replace(split=np.asarray(progress.round, np.int32))
    return state


@jax.jit
def _aim(posterior, estimate, preconditioners, num_units, rounds, whole, multiplier):
    """The preconditioner of a round, and its C z, where z is `multiplier`, and `whole` that of all together."""
    preconditioner, _ = choose(posterior, estimate, preconditioners, whole, num_units, rounds)
    return preconditioner, preconditioner.l2_clip_norm * multiplier


_noisy_sum = jax.jit(gaussian.noisy_whitened_sum)


_whitened = jax.jit(precisions.whiten_sum)


def _whitened_exactly(precision, total, step):
    """The sum in float64: float32 would round a long one by more than a unit's part."""
    with jax.enable_x64(True):
        precision, step = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), np.float64), (precision, step))
        return np.asarray(_whiten_numbers(precision, integers.to_int64(total) * step))


@jax.jit
def _whiten_numbers(precision, numbers):
    return precision.root.whiten_sum(precision.arrays, numbers)


@jax.jit
def follow(
    noisy: jax.Array,
    state: State,
    subspace: Subspace,
    quadratic: Quadratic,
    noise_std: jax.Array | float,
    estimate: CurvatureEstimate,
    preconditioner: Preconditioner,
    rounds: float,
) -> tuple[jax.Array, jax.Array, jax.Array, State]:
    """The draw of a noisy sum, followed for a step of the flow whose length all releases so far deserve.

    N times the preconditioner's clipping bias, which is public, is taken off the sum before. Post-processing of
    `noisy`, but for the cost, which is **not private**. `rounds` such as this one would spend the whole budget.

    Returns:
      The draw w, the multiples of it that are followed, the cost of their noise, and the state after it.
    """
    num_units, share = quadratic.num_units, preconditioner.share
    noisy = subspaces.without_held(subspace, noisy)
    corrected = noisy - num_units * combine(estimate.directions, preconditioner.bias)
    w = gaussian.release_step(quadratic, corrected)
    seen, noise_var = corrected / (share * num_units), (noise_std / (share * num_units)) ** 2
    posterior = step_size.observe(state.posterior, estimate, seen, noise_var, preconditioner.tuned)
    signal = step_size.pooled_signal(posterior, estimate, num_units)
    wanted, _ = step_size.best_length(
        signal, estimate, noise_var / rounds, num_units, preconditioner.longest, preconditioner.tuned
    )
    step, _ = step_size.best_step(
        posterior, estimate, noise_var, num_units, preconditioner.longest / rounds, preconditioner.tuned
    )
    length = jnp.where(is_heavy(posterior, estimate, num_units), step, wanted / rounds)
    multiples, posterior = step_size.advance(posterior, estimate, length, num_units, preconditioner.tuned)
    multiples /= share
    # The precision has the estimate's directions, so that scaling before or after colouring is the same.
    params = subspaces.displace(subspace, state.params, step_size.scale(estimate.directions, multiples, w))
    noise = (noisy - quadratic.whitened_sum) / num_units
    stretched = step_size.scale(estimate.directions, estimate.curvature * multiples**2, noise)
    cost = jnp.vdot(noise, stretched, precision=jax.lax.Precision.HIGHEST) / 2
    return w, multiples, cost, State(params, posterior, state.split)


def predicted_cost(info: RoundInfo) -> tuple[float, float]:
    """Mean and degrees of freedom of `info.noise_cost` before the draw, `accuracy.noise_cost`; public once followed."""
    estimate, num_units = info.plan.estimate, info.quadratic.num_units
    return noise_cost(
        estimate.curvature, info.multiples, estimate.dims, noise_std=info.noise_std, num_units=num_units
    )  # fmt: skip


def announce(progress: Callable[[str], None] | None, stage: str, finished: Any = None) -> None:
    """Waits for the stage before, so that a caller may time stages; nothing waits where nobody listens."""
    if progress is not None:
        jax.block_until_ready([x for x in jax.tree.leaves(finished) if isinstance(x, jax.Array)])
        progress(stage)


# --- one pass ---


def _placed(options, mesh, units):
    """Units in memory, with their mask on a mesh, where they are read, once for all rounds; a stream as it is."""
    if stream.is_stream(units):
        return units
    if mesh is None:
        return units if options.hardened else jax.tree.map(jnp.asarray, units)
    return passes.place(mesh, *records.pad(units, passes.num_shares(mesh)))


def _pass(options, linearisation, units, progress, length):
    """The exact clipped sum of one round over all devices and processes, its counts, and the stream's length."""
    mesh = passes.local_mesh(options.mesh)
    settings = {"microbatch_size": options.microbatch_size, "mode": options.mode}
    if not options.hardened:
        batch_sum = functools.partial(passes.device_sum, options.loss_fn, exact=options.exact, mesh=mesh, **settings)
    else:
        batch_sum = functools.partial(passes.exact_sum, options.loss_fn, **settings)
    if stream.is_stream(units):
        total, info, length = _stream_pass(options, batch_sum, linearisation, units, progress, length)
    else:
        total, info = batch_sum(linearisation, *(units if mesh else (units, None)))
    return *passes.whole_sum(total, info, options.mesh), length


def _stream_pass(options, batch_sum, linearisation, units, progress, length):
    mesh, skip = passes.local_mesh(options.mesh), progress.batches
    # A saved partial sum has as many coordinates as any round may have.
    partial = passes.resized(progress.partial, passes.num_coordinates(linearisation, options.hardened))
    i, digest, read = 0, b"", 0
    sums = passes.partial_sums(batch_sum, linearisation, units, mesh, partial, skip)
    for i, partial, batch in sums:
        read += int(np.sum(batch[1]))
        if options.progress is not None:
            options.progress(f"private pass, batch {i}")
        if options.store is None:
            continue
        digest = stream.digest(digest, batch)
        if i == skip and digest != progress.digest.tobytes():
            raise ValueError("The private stream is not the one that the checkpoint's partial sum was made of.")
        if i > skip and i % options.store.every == 0:
            saved = passes.resized(partial, linearisation.subspace.dim)
            now = progress._replace(batches=i, partial=saved, digest=np.frombuffer(digest, np.uint8))
            _save(options, linearisation.subspace.layout, now)
    if i < skip or length not in (None, read):
        raise ValueError("The private stream changed its length between two readings; nothing is released.")
    if options.store is not None:
        # Before the draw, and in every process of a mesh or in none.
        checkpoints.in_step(options.mesh, lambda: checkpoints.bind_data(options.store, digest))
    return partial.total, partial.info, read


# --- checkpoints ---


def _beginning(number, state, empty):
    return Progress(number, 0, state, empty, np.zeros(32, np.uint8))


def enter_draw(options: PassOptions, key: jax.Array, number: int, noisy: jax.Array) -> None:
    """Of the ledger's one debit a round has one draw; without a checkpoint no round could have a second."""
    ledger = None if options.store is None else options.store.ledger
    if ledger is not None:
        checkpoints.in_first(options.mesh, lambda: ledgers.enter_draw(ledger, key, number, noisy))


def _save(options, layout, progress):
    """Of the parameters only those that are tuned."""
    if options.store is not None:
        leaves = subspaces.tuned_leaves(layout, progress.state.params)
        checkpoints.save(options.store, progress._replace(state=progress.state._replace(params=leaves)))


def _resumed(options, layout, state, empty):
    """The beginning, or where the checkpoint stands; over several processes, where the furthest does."""
    beginning = _beginning(0, state, empty)
    if options.store is None:
        return beginning
    short = beginning._replace(state=state._replace(params=subspaces.tuned_leaves(layout, state.params)))
    found = checkpoints.restore(options.store, short) or short
    number, releases = passes.furthest(options.mesh, found.round, found.state)
    params = subspaces.with_tuned_leaves(layout, state.params, releases.params)
    state = releases._replace(params=params)
    return found._replace(state=state) if number == found.round else _beginning(number, state, empty)
