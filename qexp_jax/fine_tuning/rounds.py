"""The rounds of a release: private pass, exact draw, step of the flow; saved on the way, the same on any devices.

**Rounds (T6).** Round t expands at the parameters that the rounds before released, with precision and clip norm of one
of the plan's preconditioners, chosen by the releases before it, and noise in proportion to that clip norm, so that the
rounds compose adaptively to `mu^2 = sum mu_t^2`: given what was released before, round t is the mechanism of T1 with
public settings, hence mu_t-GDP, and adaptive composition of Gaussian trade-off curves is Gaussian (Dong, Roth and Su,
arXiv:1905.02383, Corollary 3.3). Their number and the even split are fixed by public data before the first. Where the
releases then show a heavy shift, the budget left is split evenly over more rounds, once: budgets may depend on what was
released before as long as their squares never add up to more than mu^2, for Gaussian differential privacy has a filter
that loses nothing (Smith and Thakurta, arXiv:2210.17520; zCDP, of hardened releases, has one as well: Whitehouse et
al., arXiv:2203.05481). What a round does with its draw is post-processing (T5, `one_round`). `tests/test_privacy.py`
holds the composition against dp_accounting's.
"""

import jax
import numpy as np

from qexp_jax.data.records import Params
from qexp_jax.data.source import Source
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import one_pass, one_round
from qexp_jax.fine_tuning.checkpoint import Progress
from qexp_jax.fine_tuning.one_pass import PassOptions
from qexp_jax.fine_tuning.one_round import RoundInfo, State
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.subspace import Layout
from qexp_jax.numerics.keys import one_of
from qexp_jax.private_pass import devices
from qexp_jax.private_pass.passes import Partial
from qexp_jax.quadratic.plan import Plan
from qexp_jax.quadratic.posterior import CurvatureEstimate, before_release


def start(layout: Layout, params: Params, estimate: CurvatureEstimate, rounds: int) -> State:
    """The state before any release.

    Args:
      layout: what is tuned.
      params: where the first round expands.
      estimate: public curvature.
      rounds: T.
    """
    return State(subspaces.working(layout, params), before_release(estimate), np.asarray(rounds, np.int32))


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
    units: Source,
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
      units: in memory or a stream.
      options: how it runs.
      num_units: public N.
      noise_multiplier: z of one of T rounds.
      release_key: by which a ledger knows the release; by default `key`.

    Returns:
      The state after the last round, and of a diagnosed release the `RoundInfo` of each round that was run, **not
      private**.
    """
    mesh = devices.local_mesh(options.mesh)
    plan, state = devices.replicate(mesh, (plan, state))
    progress = _resumed(options, plan, state)
    units = one_pass.place(options, units)
    release_key = key if release_key is None else release_key
    infos: list[RoundInfo] = []
    length = None  # of a stream
    while True:
        # How a round goes, and how many there are, depends on releases alone.
        num_rounds, of_rounds = schedule(plan.rounds, plan.most_rounds, int(progress.state.split))
        if progress.round == num_rounds:
            break
        aim = one_round.aimed(plan, progress.state, num_units, noise_multiplier, of_rounds)
        if aim.heavy and _may_split(progress, plan):
            split = np.asarray(progress.round, np.int32)
            progress = progress._replace(state=progress.state._replace(split=split))
            continue
        options.announce("private pass", progress.state)
        summed = one_pass.exact_sum(options, aim.linearisation, units, progress, length)
        length = summed.length
        options.announce("draw", summed.total)
        noise_key = one_of(key, plan.most_rounds, progress.round)
        drawn = one_pass.draw(noise_key, options, aim.linearisation, summed.total, aim.noise_std, aim.multiplier)
        one_pass.enter_draw(options, release_key, progress.round, drawn.noisy)
        info, state = one_round.followed(plan, progress.state, aim, drawn, summed.clip_info, num_units, of_rounds)
        if info is not None:
            infos.append(info)
        progress = one_pass.beginning(progress.round + 1, state, _no_units(options, plan))
        one_pass.save(options, plan.subspace.layout, progress)
    options.announce("done", progress.state)
    return progress.state, [info._replace(noise_std=float(info.noise_std)) for info in infos]


def _no_units(options: PassOptions, plan: Plan) -> Partial:
    """The sum over no unit, with as many coordinates as any round may have."""
    return one_pass.empty(options, plan.subspace.dim)


def _may_split(progress: Progress, plan: Plan) -> bool:
    """Whether the budget left may be split anew: once, before the rounds are over."""
    return progress.round < plan.rounds < plan.most_rounds and int(progress.state.split) == plan.rounds


def _resumed(options: PassOptions, plan: Plan, state: State) -> Progress:
    """The beginning, or where the checkpoint stands; over several processes, where the furthest does."""
    layout = plan.subspace.layout
    empty = _no_units(options, plan)
    begin = one_pass.beginning(0, state, empty)
    if options.store is None:
        return begin
    # Of the parameters only those that are tuned are saved.
    short = begin._replace(state=state._replace(params=subspaces.tuned_leaves(layout, state.params)))
    found = checkpoints.restore(options.store, short) or short
    number, releases = devices.furthest(options.mesh, found.round, found.state)
    state = releases._replace(params=subspaces.with_tuned_leaves(layout, state.params, releases.params))
    if number == found.round:
        return found._replace(state=state)
    # Another process was a round ahead: the batches that this one had of the round before are of no use.
    return one_pass.beginning(number, state, empty)
