"""The private curvature along the released gradients, from two of them in sequence.

A new population moves the gradient and the curvature in the same directions, so that steps that suit the public
curvature K overshoot. Two rounds in sequence measure the private curvature along the private gradient. With y = g + xi
seen in one round, F y followed and y' seen in the next,

    A = (F y)^T (y - y') - s^2 tr(F + F K F),     B = (F y)^T K (F y) - s^2 tr(F K F)

have expectations g^T F H F g and g^T F K F g, where H is the private curvature and noise meets K. So A = c B with an
error of variance 2 s^2 |F y|^2 + s^4 tr F^2, about: c is what a regression over rounds gives (`curvature_ratio`). The
leading coordinates together have one c, all others another.

*Passed minima.* Where y' points back over F y, by more than two standard deviations of its error, the step has passed
the minimum of its line, and c is at least A / B of that step, with A less and B more by two standard deviations. Of a
quadratic the mean soon says the same; a loss that is nearly linear on both sides of a narrow valley, as logistic ones
far from their minimum, is jumped over and over by steps that suit the mean of its curvatures.

A step from two gradients: Barzilai and Borwein, IMA J. Numer. Anal. 8 (1988). Its errors and priors are ours.
"""

import jax
import jax.numpy as jnp

from qexp_jax.quadratic.components import Components, products
from qexp_jax.quadratic.empirical_bayes import pooled_signal
from qexp_jax.quadratic.posterior import CurvatureEstimate, Posterior, in_two, of_two, signal_curvature
from qexp_jax.quadratic.rule import RULE

_STEEPEST = 1000.0  # the largest ratio that is believed
_DEVIATIONS = 2  # standard deviations of noise that a measurement is doubted by


def curvature_ratio(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """c (r + 1,), posterior mean of the private curvature along the released gradients, in units of K, from 1 to 1000.

    The prior is normal with mean and standard deviation 2; or, in the leading ones, 1 + sum_j E[g_j^2] / v_j if that is
    larger: second moments V + g g^T, as records have whose mean is g, are at most that many times V.
    """
    signals = pooled_signal(posterior, estimate, num_units)
    large = 1 + jnp.sum(signals[:-1] / estimate.moments[:-1])
    of_leading = jnp.maximum(RULE.curvature_ratio, large)
    of_others = jnp.full_like(large, RULE.curvature_ratio)
    prior = jnp.stack([of_leading, of_others])
    # The prior's standard deviation is its mean: it has a weight of 1 / prior^2, and 1 / prior is that times the mean.
    mean = (posterior.slopes[0] + 1 / prior) / (posterior.slopes[1] + 1 / prior**2)
    pair = jnp.clip(jnp.maximum(mean, posterior.largest_ratio), 1.0, _STEEPEST)
    return of_two(pair, len(estimate.curvature))


def secant(posterior: Posterior, estimate: CurvatureEstimate, seen: Components) -> jax.Array:
    """A and B, of the leading coordinates and of all others (2, 2), for a `seen` gradient.

    Where nothing was followed yet both are zero.
    """
    followed = posterior.followed
    noise = posterior.last_var * estimate.dims
    energy = products(posterior.last, posterior.last)
    product = products(posterior.last, seen)
    measured = followed * (energy - product) - noise * (followed + estimate.curvature * followed**2)
    public = signal_curvature(estimate) * followed**2 * (energy - noise)
    return jnp.stack([in_two(measured), in_two(public)])


def measured_in_round(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    seen: Components,
    noise_var: jax.Array | float,
    tuned: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """What a round tells of c: A W / V and B W / V (2, 2), and c where the last step passed a minimum (2,).

    V is the error's variance. W is how far B exceeds two standard deviations of its noise, at least 0: what looks like
    noise has no say. All are zero for the first round, which follows nothing.

    Args:
      posterior: after the rounds before.
      estimate: public.
      seen: released mean gradient of the round.
      noise_var: variance of its noise in each coordinate.
      tuned: (r + 1,) one, or zero where the round holds the parameters fixed.
    """
    squares = posterior.followed**2
    dims = estimate.dims
    last_var = posterior.last_var
    pair = secant(posterior, estimate, seen)
    measured = pair[0]
    public = pair[1]
    spread = last_var * jnp.sqrt(2 * in_two(dims * (signal_curvature(estimate) * squares) ** 2))
    doubt = _DEVIATIONS * spread
    sure = jnp.maximum(public - doubt, 0)
    energy = products(posterior.last, posterior.last)
    product = products(posterior.last, seen)
    variance = in_two((last_var + noise_var) * squares * energy + last_var * noise_var * squares * dims)
    is_seen = in_two(tuned * jnp.ones_like(dims)) > 0
    # Infinite where nothing was followed, so that no quotient is not a number.
    divisor = jnp.where(variance > 0, variance, jnp.inf)
    slopes = jnp.where(is_seen, pair * sure / divisor, 0)
    error = _DEVIATIONS * jnp.sqrt(variance)
    back = -in_two(posterior.followed * product)
    passed = is_seen & (back > error) & (public > 0)
    least = (measured - error) / jnp.where(passed, public + doubt, 1)
    return slopes, jnp.where(passed, least, 0)
