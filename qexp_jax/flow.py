"""How far to follow the released gradients: empirical Bayes and the length of a gradient flow.

All of it is post-processing of releases with public numbers (T5), free of budget. In whitened coordinates, with public
curvature K_j and a private mean gradient g_j that is seen with variance p_j (noise and sampling together), gradient
flow of length L from the anchor moves by -(1 - exp(-L K_j)) / K_j times what is seen. Its expected excess over the
minimiser of the quadratic is *exactly*

    J(L) = sum_j ( E[g_j^2] exp(-2 L K_j) + p_j (1 - exp(-L K_j))^2 ) / (2 K_j).

A direction with more signal than noise wants a long flow, one with less a short one; `best_length` takes the L of least
J. The signal is estimated from the releases themselves: g_j ~ N(0, tau v_j), where v_j is the public second moment of
one record's clipped gradient and tau, the *shift*, is common to all coordinates. That the signal follows v_j is what
re-weighting of records does to a mean gradient: over three decades of curvature g_j^2 / v_j was found within a factor
of about three of .003 on PhysioNet 2012 by ICU and on MNIST by writers, and ten times less without a shift. tau has a
public prior, so that where noise hides the signal the step is what the prior expects, and where it does not the data
decides.

The leading r directions are coordinates of their own; all others are one block, of equal curvature and moment.
The derivation and the prior are ours. Empirical Bayes: Efron and Morris, J. Am. Stat. Assoc. 68 (1973).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLING = 1.5
_COMMON_SHIFT, _LARGEST_SHIFT = 5e-3, 0.5
_NUM_SHIFTS = 21
_NUM_LENGTHS = 49
_SHORTEST = 1 / 64


class Spectrum(NamedTuple):
    """The public second-order picture in whitened coordinates: r leading ones, then the block of all others.

    Attributes:
      directions: (r, k) orthonormal leading directions.
      curvature: (r + 1,) K.
      moments: (r + 1,) v, second moments of one unit's clipped whitened gradient.
      dims: (r + 1,) how many coordinates each entry stands for: 1, ..., 1, k - r.
      shifts: (m,) the prior's values of tau.
      log_prior: (m,) log of its weights, up to a constant.
    """

    directions: jax.Array
    curvature: jax.Array
    moments: jax.Array
    dims: jax.Array
    shifts: jax.Array
    log_prior: jax.Array


def shift_prior(num_public: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of tau and log weights: uniform in log tau from the sampling error of `num_public` records to a common
    shift of .005, and falling as tau^-4 beyond.

    >>> tau, log_weight = shift_prior(4000)
    >>> float(tau[0]), float(tau[-1]), round(float(log_weight[-1]), 2)
    (0.00025, 0.5, -18.42)
    """
    tau = np.geomspace(min(1 / num_public, _COMMON_SHIFT / 10), _LARGEST_SHIFT, _NUM_SHIFTS)
    return tau, -4 * np.log(np.maximum(tau / _COMMON_SHIFT, 1))


def energies(directions: jax.Array, x: jax.Array) -> jax.Array:
    """x_j^2 of the leading coordinates, and the mean square of the others, (k,) -> (r + 1,)."""
    leading = jnp.matmul(directions, x, precision=jax.lax.Precision.HIGHEST)
    rest = jnp.maximum(jnp.vdot(x, x) - jnp.vdot(leading, leading), 0) / max(1, len(x) - len(directions))
    return jnp.append(leading**2, rest)


def predicted_gradient(spectrum: Spectrum, u: jax.Array) -> jax.Array:
    """K u (k,): how the public quadratic's gradient changes over a whitened displacement u (k,)."""
    highest, rest = jax.lax.Precision.HIGHEST, spectrum.curvature[-1]
    leading = jnp.matmul(spectrum.directions, u, precision=highest) * (spectrum.curvature[:-1] - rest)
    return jnp.matmul(spectrum.directions.T, leading, precision=highest) + rest * u


def signal(energy: jax.Array, spectrum: Spectrum, noise_var: jax.Array | float, num_units: int) -> jax.Array:
    """Posterior means E[g_j^2] (r + 1,), averaged over the posterior of the shift tau.

    Args:
      energy: (r + 1,) `energies` of a released mean gradient.
      spectrum: public.
      noise_var: variance of its noise in each coordinate.
      num_units: N, for the sampling error, 1.5 v_j / N: private records were found to vary up to 2.4 times as much as
        public ones.
    """
    prior = spectrum.shifts[:, None] * spectrum.moments
    error = _SAMPLING * spectrum.moments / num_units + noise_var
    # Against tau = 0, so that large blocks do not cancel in float32.
    ratio = prior / error
    shrunk = ratio / (1 + ratio)
    log_evidence = spectrum.log_prior + (energy / error * shrunk - jnp.log1p(ratio)) @ spectrum.dims / 2
    return jax.nn.softmax(log_evidence) @ (shrunk**2 * energy + prior * (1 - shrunk))


def excess(
    length: jax.Array | float, signals: jax.Array, spectrum: Spectrum, noise_var: jax.Array | float, num_units: int
) -> jax.Array:
    """J(L), the expected excess of a flow of one `length`; `signals` (r + 1,) are E[g_j^2]."""
    left = jnp.exp(-length * spectrum.curvature)
    error = _SAMPLING * spectrum.moments / num_units + noise_var
    return jnp.sum(spectrum.dims * (signals * left**2 + error * (1 - left) ** 2) / (2 * spectrum.curvature))


def best_length(
    signals: jax.Array, spectrum: Spectrum, noise_var: jax.Array | float, num_units: int, longest: jax.Array | float
) -> jax.Array:
    """The length of least expected excess, on a logarithmic grid from `longest` / 64 to `longest`.

    Args:
      signals: (r + 1,) E[g_j^2].
      spectrum: public.
      noise_var: variance in each coordinate of the mean gradient's noise, of all rounds together.
      num_units: N.
      longest: public bound.
    """
    lengths = longest * jnp.geomspace(_SHORTEST, 1.0, _NUM_LENGTHS)
    costs = jax.vmap(lambda length: excess(length, signals, spectrum, noise_var, num_units))(lengths)
    return lengths[jnp.argmin(costs)]
