"""One round between its pass and the next: where it aims, its exact draw, and the step that the draw is followed for.

    aimed       the metric M, the clip norm and C z of the round, from releases before it
    follow      its noisy sum as a draw w, and the step that all releases so far deserve: post-processing (T5)
    followed    the same with what a curious owner of open data may look at

A draw is followed for a T-th of the length that the sums released so far deserve (`step_size`), or under a heavy shift
for the step that the latest ones deserve; next to nothing where they look like noise, and least where the private
curvature is high. No test between neighbours gains from any of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Params
from qexp_jax.mechanism import gaussian
from qexp_jax.mechanism.gaussian import Quadratic
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics.compilation import FEW, compiled
from qexp_jax.private_pass.clipping import ClipInfo
from qexp_jax.private_pass.noise import Drawn
from qexp_jax.private_pass.passes import Linearisation
from qexp_jax.quadratic import step_size
from qexp_jax.quadratic.accuracy import noise_cost
from qexp_jax.quadratic.components import decompose, recompose, scale, scaled
from qexp_jax.quadratic.directions import Directions, combine
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


class Aim(NamedTuple):
    """What a round will do, before its pass; public, or made of earlier releases.

    Attributes:
      preconditioner: M, its clip norm, and how far draws are followed; on the host.
      linearisation: where gradients are taken and how they are clipped.
      noise_std: C z.
      multiplier: z.
      heavy: whether the releases show a heavy shift.
    """

    preconditioner: Preconditioner
    linearisation: Linearisation
    noise_std: np.ndarray
    multiplier: float
    heavy: bool


def aimed(plan: Plan, state: State, num_units: int, noise_multiplier: float, of_rounds: float) -> Aim:
    """The aim of a round.

    Args:
      plan: public.
      state: the releases so far.
      num_units: N.
      noise_multiplier: z of one of T rounds.
      of_rounds: such as this one would spend the whole budget.
    """
    whole = noise_multiplier / plan.rounds**0.5
    multiplier = noise_multiplier * (of_rounds / plan.rounds) ** 0.5
    choice = choose(state.posterior, plan.estimate, plan.preconditioners, whole, num_units, of_rounds)
    # Public, or made of releases: what a few numbers decide is decided on the host.
    preconditioner, _, heavy = jax.device_get(choice)
    precision = precision_of(plan.estimate.directions, preconditioner)
    linearisation = Linearisation(state.params, plan.subspace, precision, preconditioner.l2_clip_norm)
    return Aim(preconditioner, linearisation, preconditioner.l2_clip_norm * multiplier, multiplier, bool(heavy))


def followed(
    plan: Plan, state: State, aim: Aim, drawn: Drawn, clip_info: ClipInfo, num_units: int, of_rounds: float
) -> tuple[RoundInfo | None, State]:
    """What a round was, **not private**, if somebody looks at its sum; and the state after it, which is private.

    Args:
      plan: public.
      state: before the round.
      aim: of the round.
      drawn: its draw, with the exact sum if somebody looks at it.
      clip_info: counts.
      num_units: N.
      of_rounds: such as this one would spend the whole budget.
    """
    precision = aim.linearisation.precision
    multiples, after = follow(
        drawn.noisy, state, plan.subspace, Quadratic(precision, None, num_units), drawn.noise_std, plan.estimate,
        aim.preconditioner, of_rounds,
    )  # fmt: skip
    # The count on the host, which decides how many rounds there are, not the copy that a compiled program returns.
    after = after._replace(split=state.split)
    if drawn.total is None:
        return None, after
    quadratic = Quadratic(precision, drawn.total, num_units)
    corrected = _corrected(drawn.noisy, plan.subspace, num_units, plan.estimate.directions, aim.preconditioner)
    info = RoundInfo(
        plan=plan,
        preconditioner=aim.preconditioner,
        quadratic=quadratic,
        noise_std=drawn.noise_std,
        w=gaussian.release_step(quadratic, corrected),
        multiples=multiples,
        noise_cost=_measured_cost(drawn.noisy, quadratic, plan.subspace, plan.estimate, multiples),
        clip_info=clip_info,
    )
    return info, after


@functools.partial(compiled, few=FEW)
def follow(
    noisy: jax.Array,
    state: State,
    subspace: Subspace,
    quadratic: Quadratic,
    noise_std: jax.Array | float,
    estimate: CurvatureEstimate,
    preconditioner: Preconditioner,
    rounds: float,
) -> tuple[jax.Array, State]:
    """The draw of a noisy sum, followed for a step of the flow whose length all releases so far deserve.

    N times the preconditioner's clipping bias, which is public, is taken off the sum before. Post-processing of
    `noisy` (T5).

    Args:
      noisy: (k,), the noisy sum.
      state: before the round.
      subspace: of the plan.
      quadratic: of the round; its exact sum is not read.
      noise_std: C z.
      estimate: of the plan.
      preconditioner: of the round.
      rounds: such as this one would spend the whole budget.

    Returns:
      The multiples of the draw that are followed, and the state after it.
    """
    num_units = quadratic.num_units
    share = preconditioner.share
    directions = estimate.directions
    corrected = _corrected(noisy, subspace, num_units, directions, preconditioner)
    seen = decompose(directions, corrected / (share * num_units))
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
    multiples = multiples_of(preconditioner, multiples)
    # The precision has the estimate's directions, so that scaling before or after colouring is the same.
    followed_sum = num_units * recompose(directions, scaled(multiples, seen))
    params = subspaces.displace(subspace, state.params, gaussian.release_step(quadratic, followed_sum))
    return multiples / share, State(params, posterior, state.split)


def _corrected(
    noisy: jax.Array,
    subspace: Subspace,
    num_units: int,
    directions: Directions | jax.Array,
    preconditioner: Preconditioner,
) -> jax.Array:
    """The noisy sum (k,) less N times what clipping adds to the public mean gradient."""
    noisy = subspaces.without_held(subspace, noisy)
    return noisy - num_units * combine(directions, preconditioner.bias)


@compiled
def _measured_cost(
    noisy: jax.Array, quadratic: Quadratic, subspace: Subspace, estimate: CurvatureEstimate, multiples: jax.Array
) -> jax.Array:
    """Loss per record that the noise of a step cost under the public curvature; **not private**.

    Args:
      noisy: (k,), the noisy sum.
      quadratic: with the exact sum.
      subspace: of the plan.
      estimate: of the plan.
      multiples: (r + 1,) of the draw that were followed.
    """
    noise = (subspaces.without_held(subspace, noisy) - quadratic.whitened_sum) / quadratic.num_units
    stretched = scale(estimate.directions, estimate.curvature * multiples**2, noise)
    return jnp.vdot(noise, stretched, precision=jax.lax.Precision.HIGHEST) / 2


def predicted_cost(info: RoundInfo) -> tuple[float, float]:
    """Mean and degrees of freedom of `info.noise_cost` before the draw, `accuracy.noise_cost`; public once followed."""
    estimate = info.plan.estimate
    num_units = info.quadratic.num_units
    return noise_cost(
        estimate.curvature, info.multiples, estimate.dims, noise_std=info.noise_std, num_units=num_units
    )  # fmt: skip
