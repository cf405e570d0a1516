"""What the first round of a plan would do: known before anything private is read, for there are no releases yet."""

import jax

from qexp_jax.quadratic.accuracy import noise_cost
from qexp_jax.quadratic.posterior import CurvatureEstimate, before_release
from qexp_jax.quadratic.preconditioner import Preconditioner, choose


def first_round(
    estimate: CurvatureEstimate,
    preconditioners: Preconditioner,
    noise_multiplier: float,
    num_units: int,
    rounds: int,
) -> tuple[Preconditioner, float]:
    """The preconditioner before any release, and what the noise of a round is expected to cost in it.

    Args:
      estimate: public.
      preconditioners: of the plan, along a leading axis.
      noise_multiplier: z of all rounds together.
      num_units: N.
      rounds: T.

    Returns:
      The preconditioner, and the loss per record that the noise of one round costs in the mean.
    """
    # The program that chooses in every round, so that nothing is compiled for this one.
    choice = choose(
        before_release(estimate), estimate, preconditioners, float(noise_multiplier), num_units, float(rounds)
    )
    preconditioner, multiples, _ = jax.device_get(choice)
    # A T-th of mu^2 each (T6), so that z of one round is sqrt(T) times that of all.
    noise_std = float(preconditioner.l2_clip_norm) * noise_multiplier * rounds**0.5
    cost, _ = noise_cost(estimate.curvature, multiples, estimate.dims, noise_std=noise_std, num_units=num_units)
    return preconditioner, cost
