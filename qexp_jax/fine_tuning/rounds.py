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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Params, Record
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import one_pass
from qexp_jax.fine_tuning.checkpoint import Progress
from qexp_jax.fine_tuning.one_pass import PassOptions, announce
from qexp_jax.mechanism import gaussian
from qexp_jax.mechanism.gaussian import Quadratic
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.subspace import Layout, Subspace
from qexp_jax.private_pass import passes
from qexp_jax.private_pass.clipping import ClipInfo
from qexp_jax.private_pass.passes import Linearisation
from qexp_jax.quadratic import step_size
from qexp_jax.quadratic.accuracy import noise_cost
from qexp_jax.quadratic.directions import combine
from qexp_jax.quadratic.plan import Plan
from qexp_jax.quadratic.posterior import CurvatureEstimate, Posterior
from qexp_jax.quadratic.preconditioner import Preconditioner, choose, is_heavy, multiples_of, precision_of


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


def start(layout: Layout, params: Params, estimate: CurvatureEstimate, rounds: int) -> State:
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
    layout = plan.subspace.layout
    mesh = passes.local_mesh(options.mesh)
    plan, state = passes.replicate(mesh, (plan, state))
    empty = passes.empty(plan.subspace.dim, options.hardened)
    progress = _resumed(options, layout, state, empty)
    units = one_pass.place(options, mesh, units)
    infos = []
    length = None  # of a stream
    keys = list(jax.random.split(key, plan.most_rounds))
    whole = noise_multiplier / plan.rounds**0.5
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
        summed = one_pass.exact_sum(options, linearisation, units, progress, length)
        length = summed.length
        announce(options.progress, "draw", summed.total)
        drawn = one_pass.draw(keys[progress.round], options, linearisation, summed.total, noise_std, multiplier)
        one_pass.enter_draw(options, key if release_key is None else release_key, progress.round, drawn.noisy)
        quadratic = Quadratic(precision, drawn.total, num_units)
        w, multiples, cost, state = follow(
            drawn.noisy, progress.state, plan.subspace, quadratic, drawn.noise_std, plan.estimate, preconditioner,
            of_rounds,
        )  # fmt: skip
        infos.append(
            RoundInfo(
                plan=plan,
                preconditioner=preconditioner,
                quadratic=quadratic,
                noise_std=drawn.noise_std,
                w=w,
                multiples=multiples,
                noise_cost=cost,
                clip_info=summed.clip_info,
            )
        )
        state = state._replace(split=progress.state.split)  # not the copy that a compiled program returns
        progress = one_pass.beginning(progress.round + 1, state, empty)
        one_pass.save(options, layout, progress)
    announce(options.progress, "done", progress.state)
    return progress.state, [info._replace(noise_std=float(info.noise_std)) for info in infos]


def _split(progress: Progress, plan: Plan, num_units: int) -> State:
    """The state, with the budget left split anew, once, where the releases show a heavy shift."""
    state = progress.state
    may_split = progress.round < plan.rounds < plan.most_rounds and int(state.split) == plan.rounds
    if may_split and is_heavy(state.posterior, plan.estimate, num_units):
        return state._replace(split=np.asarray(progress.round, np.int32))
    return state


@jax.jit
def _aim(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    preconditioners: Preconditioner,
    num_units: int,
    rounds: float,
    whole: float,
    multiplier: float,
) -> tuple[Preconditioner, jax.Array]:
    """The preconditioner of a round, and its C z.

    Args:
      posterior: what the releases say.
      estimate: of the plan.
      preconditioners: of the plan, along a leading axis.
      num_units: N.
      rounds: such as this one would spend the whole budget.
      whole: z of all rounds together.
      multiplier: z of this one.
    """
    preconditioner, _ = choose(posterior, estimate, preconditioners, whole, num_units, rounds)
    return preconditioner, preconditioner.l2_clip_norm * multiplier


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
    `noisy`, but for the cost, which is **not private**.

    Args:
      noisy: (k,), the noisy sum.
      state: before the round.
      subspace: of the plan.
      quadratic: of the round, with its exact sum, which only the cost reads.
      noise_std: C z.
      estimate: of the plan.
      preconditioner: of the round.
      rounds: such as this one would spend the whole budget.

    Returns:
      The draw w, the multiples of it that are followed, the cost of their noise, and the state after it.
    """
    num_units = quadratic.num_units
    share = preconditioner.share
    noisy = subspaces.without_held(subspace, noisy)
    corrected = noisy - num_units * combine(estimate.directions, preconditioner.bias)
    w = gaussian.release_step(quadratic, corrected)
    seen = corrected / (share * num_units)
    noise_var = (noise_std / (share * num_units)) ** 2
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
    multiples = multiples_of(preconditioner, multiples) / share
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


def _resumed(options: PassOptions, layout: Layout, state: State, empty: Any) -> Progress:
    """The beginning, or where the checkpoint stands; over several processes, where the furthest does."""
    begin = one_pass.beginning(0, state, empty)
    if options.store is None:
        return begin
    short = begin._replace(state=state._replace(params=subspaces.tuned_leaves(layout, state.params)))
    found = checkpoints.restore(options.store, short) or short
    number, releases = passes.furthest(options.mesh, found.round, found.state)
    params = subspaces.with_tuned_leaves(layout, state.params, releases.params)
    state = releases._replace(params=params)
    if number == found.round:
        return found._replace(state=state)
    # Another process was a round ahead: the batches that this one had of the round before are of no use.
    return one_pass.beginning(number, state, empty)
