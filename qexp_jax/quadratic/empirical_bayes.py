"""How much signal the releases show: empirical Bayes of the private gradient.

A private mean gradient g_j is seen with variance p_j, noise and sampling together. The signal is estimated from the
releases themselves: g_j ~ N(0, tau v_j), where v_j is the public second moment of one record's clipped gradient and
tau, the *shift*, is common to all coordinates: re-weighting records moves a mean gradient in proportion to v_j. tau has
a public prior (`shift_prior`), half of it on no shift at all, so that where noise hides the signal nothing is followed
that the public records had right, and where it does not the data decides. The block of all other directions is
expected to have half as large a signal for its moments, unless the releases say otherwise.

What the releases say of the gradient *at theta_0* is `pooled_signal`; what is *left* of it after the steps so far,
`debiased_energy`.

The priors are ours. Empirical Bayes: Efron and Morris, J. Am. Stat. Assoc. 68 (1973).
"""

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.quadratic.posterior import CurvatureEstimate, Posterior, energies, in_two, of_two
from qexp_jax.quadratic.rule import RULE

_HIGHEST = jax.lax.Precision.HIGHEST
_LARGEST_SHIFT = 0.5
_NUM_SHIFTS = 21


def shift_prior(num_public: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of tau and log weights: half of it none, else uniform in log tau to .005 and falling as tau^-4 beyond.

    None is the least value, one over the number of public units: the sampling error that theta_0 has of its own.

    >>> tau, log_weight = shift_prior(2000)
    >>> [round(float(x), 4) for x in (tau[0], tau[-1], log_weight[0], log_weight[-1])]
    [0.0005, 0.5, 3.0445, -18.4207]
    """
    tau = np.geomspace(min(1 / num_public, RULE.common_shift), _LARGEST_SHIFT, _NUM_SHIFTS)
    log_weights = -4 * np.log(np.maximum(tau / RULE.common_shift, 1))
    log_weights[0] += np.log(_NUM_SHIFTS)
    return tau, log_weights


def signal(energy: jax.Array, estimate: CurvatureEstimate, noise_var: jax.Array | float, num_units: int) -> jax.Array:
    """Posterior means E[g_j^2] (r + 1,), averaged over the posterior of the shift tau.

    Args:
      energy: (r + 1,) `posterior.energies` of a released mean gradient.
      estimate: public.
      noise_var: variance of its noise in each coordinate, or (r + 1,); infinite where nothing was released.
      num_units: N, for the sampling error, 1.5 v_j / N: private records vary more than public ones.
    """
    weights, prior, shrunk = _given_each_shift(energy, estimate, noise_var, num_units)
    # Of a normal: the square of the posterior mean, and the posterior variance.
    second_moments = shrunk**2 * energy + prior * (1 - shrunk)
    return jnp.matmul(weights, second_moments, precision=_HIGHEST)


def pooled_signal(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """E[g_j^2] (r + 1,) at theta_0, given all releases."""
    energy, noise_var = _pooled(posterior, estimate)
    return signal(energy, estimate, noise_var, num_units)


def pooled_shift(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """E[tau], given all releases."""
    energy, noise_var = _pooled(posterior, estimate)
    weights, _, _ = _given_each_shift(energy, estimate, noise_var, num_units)
    return jnp.matmul(weights, estimate.shifts, precision=_HIGHEST)


def debiased_energy(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """How much of E[g_j^2] (r + 1,) is left: what the recent releases show, and at most what theta_0 had.

    Of the energy of their mean the noise's is taken off, but for one standard deviation of it, in the leading ones
    together and in all others: without any noise allowed for, states stand still in their first rounds for nothing that
    a later one would not have seen. May be negative in single directions, so that sums over directions have no further
    bias; for the same reason the leading ones together are held to what they had together. Held one by one, what noise
    adds to some would be cut off and what it takes from others kept, and states stand still wherever noise is loud.
    """
    # The leading ones count together: over its expectation, a mean of r squares of noise varies by sqrt(2 / r).
    dims = estimate.dims.at[:-1].set(len(estimate.directions))
    noise = posterior.recent_var * (1 - jnp.sqrt(2 / jnp.maximum(dims, 1)))
    left = energies(estimate, posterior.recent) - noise
    had = pooled_signal(posterior, estimate, num_units)
    left = jnp.where(posterior.times > 0, left, had)
    has_less = in_two(left) < in_two(had)
    return jnp.where(of_two(has_less, len(left)), left, had)


def _pooled(posterior: Posterior, estimate: CurvatureEstimate) -> tuple[jax.Array, jax.Array]:
    """Energy of the initial gradient as all releases together give it, and the variance of its noise."""
    noise_var = 1 / posterior.weights  # infinite where nothing was seen, which leaves the prior
    factors = jnp.where(posterior.weights > 0, noise_var, 0)
    largest = factors.max()  # before squaring: small units stay within float32
    shares = factors / jnp.where(largest > 0, largest, 1)
    scaled = jax.tree.map(lambda x: largest * x, posterior.gradients)
    energy = shares**2 * energies(estimate, scaled)
    return energy, noise_var


def _given_each_shift(
    energy: jax.Array, estimate: CurvatureEstimate, noise_var: jax.Array | float, num_units: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights (m,) of the shifts; the variance (m, r + 1) of g_j in each, and its share in what is seen.

    Args:
      energy: (r + 1,) of a released mean gradient.
      estimate: public.
      noise_var: variance of its noise.
      num_units: N, for the sampling error.
    """
    moments = estimate.moments.at[-1].multiply(RULE.others_shift)
    prior = estimate.shifts[:, None] * moments
    error = RULE.sampling * estimate.moments / num_units + noise_var
    # Against tau = 0, so that large blocks do not cancel in float32.
    ratio = prior / error
    shrunk = ratio / (1 + ratio)
    in_each = energy / error * shrunk - jnp.log1p(ratio)
    twice_log_likelihood = jnp.matmul(in_each, estimate.dims, precision=_HIGHEST)
    weights = jax.nn.softmax(estimate.log_prior + twice_log_likelihood / 2)
    return weights, prior, shrunk
