"""How far to follow the released gradients: the length of a gradient flow.

All of it is post-processing of releases with public numbers (T5), free of budget. A round's release is taken in
(`observe`), a length is chosen (`best_length`, or far from theta_0 `best_step`), and a flow of it is taken
(`advance`).

In whitened coordinates, with public curvature K_j and a private mean gradient g_j that is seen with variance p_j (noise
and sampling together), gradient flow of length L from theta_0 moves by -(1 - exp(-L K_j)) / K_j times what is seen.
Its expected excess over the minimiser of the quadratic is *exactly*

    J(L) = sum_j ( E[g_j^2] exp(-2 L K_j) + p_j (1 - exp(-L K_j))^2 ) / (2 K_j).

A direction with more signal than noise wants a long flow, one with less a short one; `best_length` takes the L of least
J. How much signal there is, the releases say themselves (`empirical_bayes`).

A round may leave all but the leading r directions where they are (`tuned`): then it has nothing of their noise, and
nothing is learnt of them. Noise meets their mean curvature, but a signal lies where the curvature is high; J takes that
of the last leading direction for it.

*Curvature ratio.* Along the signal the private curvature is c K_j, with c measured by the rounds (`secants`), and a
round follows its draw for

    (1 - exp(-l c K_j)) / (c K_j)

with l the length of the round: gradient flow on a quadratic c times as steep as the public one, which never passes its
minimum, however long. The steepest part of a signal is also the first to be consumed; the initial gradient is
therefore remembered with weights exp(-L c K_j), those of least variance if c K_j is its decay.

*Far from theta_0* no quadratic tells how much there is to gain, and J is of no use. Under a heavy shift a round asks
instead how much signal the latest releases show (`empirical_bayes.debiased_energy`) and takes the step that lowers the
loss most by itself (`best_step`): its gain to first order, less what curvature and noise cost, as a Wiener filter's. It
shortens as the signal is consumed.

The derivation is ours.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.quadratic import secants
from qexp_jax.quadratic.components import Components, decompose, recompose, scale, scaled
from qexp_jax.quadratic.empirical_bayes import debiased_energy, pooled_shift, pooled_signal, shift_prior, signal
from qexp_jax.quadratic.posterior import (
    CurvatureEstimate,
    Posterior,
    before_release,
    energies,
    signal_curvature,
)
from qexp_jax.quadratic.rule import RULE
from qexp_jax.quadratic.secants import curvature_ratio, secant

__all__ = [
    "Components",
    "CurvatureEstimate",
    "Posterior",
    "advance",
    "before_release",
    "best_length",
    "best_step",
    "curvature_ratio",
    "debiased_energy",
    "decompose",
    "energies",
    "excess",
    "lengths_up_to",
    "observe",
    "pooled_shift",
    "pooled_signal",
    "recompose",
    "scale",
    "scaled",
    "secant",
    "shift_prior",
    "signal",
    "signal_curvature",
]

_HIGHEST = jax.lax.Precision.HIGHEST
_SHARES = np.geomspace(1 / 64, 1.0, 49)  # of the longest length
_LONGEST_ROUND = 4.0  # over the largest curvature: beyond it nothing of a gradient is left


def observe(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    seen: Components,
    noise_var: jax.Array | float,
    tuned: jax.Array | float = 1.0,
) -> Posterior:
    """Takes in the released mean gradient `seen` of a round.

    Args:
      posterior: after the rounds before.
      estimate: public.
      seen: whitened, by `decompose`; of directions that the round did not tune it is not looked at.
      noise_var: variance of its noise in each coordinate.
      tuned: (r + 1,) one, or zero where the round holds the parameters fixed.
    """
    # What the round held was not seen, and has no weight.
    left = tuned * posterior.left
    slopes, largest_ratio = secants.measured_in_round(posterior, estimate, seen, noise_var, tuned)
    times = posterior.times + tuned
    newest = tuned * 2 / (times + 1)  # the share of the t-th release in a mean with weights 1, ..., t
    return posterior._replace(
        gradients=jax.tree.map(jnp.add, posterior.gradients, scaled(left / noise_var, seen)),
        weights=posterior.weights + left**2 / noise_var,
        last=seen,
        last_var=jnp.asarray(noise_var, seen.leading.dtype),
        slopes=posterior.slopes + slopes,
        largest_ratio=jnp.maximum(posterior.largest_ratio, largest_ratio),
        times=times,
        idle=jnp.where(tuned > 0, 0, posterior.idle + 1),
        recent=jax.tree.map(jnp.add, scaled(1 - newest, posterior.recent), scaled(newest, seen)),
        recent_var=(1 - newest) ** 2 * posterior.recent_var + newest**2 * noise_var,
    )


def advance(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    length: jax.Array | float,
    num_units: int,
    tuned: jax.Array | float = 1.0,
) -> tuple[jax.Array, Posterior]:
    """The multiples (r + 1,) of the latest mean gradient that a flow of `length` subtracts, and the posterior after it.

    These are F of (5). Where nothing is tuned, nothing is subtracted.

    A single flow is no longer than four over the largest curvature, on which nothing of a gradient is left.

    Args:
      posterior: after the round's release.
      estimate: public.
      length: of the flow.
      num_units: N.
      tuned: (r + 1,) one, or zero where the round holds the parameters fixed.
    """
    length = jnp.minimum(length, _LONGEST_ROUND / estimate.curvature.max())
    rates = _rates(posterior, estimate, num_units)
    multiples = _multiples(length, rates, tuned)
    left = jnp.exp(-tuned * length * rates)
    return multiples, posterior._replace(left=posterior.left * left, followed=multiples)


def excess(
    length: jax.Array | float,
    signals: jax.Array,
    estimate: CurvatureEstimate,
    noise_var: jax.Array | float,
    num_units: int,
    tuned: jax.Array | float = 1.0,
) -> jax.Array:
    """J(L), the expected excess of a flow of one `length`.

    Args:
      length: L.
      signals: (r + 1,) E[g_j^2].
      estimate: public.
      noise_var: variance in each coordinate of the mean gradient's noise, of all rounds together.
      num_units: N, for the sampling error.
      tuned: (r + 1,) one, or zero where the parameters are held fixed.
    """
    curvature = signal_curvature(estimate)
    noise_curvature = estimate.curvature
    length = tuned * length
    left = jnp.exp(-length * curvature)
    sampling = RULE.sampling * estimate.moments / num_units
    # Sampling errors lie where signals do, noise in all directions alike: each meets a curvature of its own.
    cost = (signals * left**2 + sampling * (1 - left) ** 2) / (2 * curvature)
    cost += noise_var * jnp.expm1(-length * noise_curvature) ** 2 / (2 * noise_curvature)
    return jnp.sum(estimate.dims * cost)


def best_length(
    signals: jax.Array,
    estimate: CurvatureEstimate,
    noise_var: jax.Array | float,
    num_units: int,
    longest: jax.Array | float,
    tuned: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The length of least expected excess, on a logarithmic grid from `longest` / 64 to `longest`, and that excess.

    Args:
      signals: (r + 1,) E[g_j^2].
      estimate: public.
      noise_var: variance in each coordinate of the mean gradient's noise, of all rounds together.
      num_units: N.
      longest: public bound.
      tuned: (r + 1,) one, or zero where the parameters are held fixed.
    """
    lengths = lengths_up_to(longest)
    costs = jax.vmap(lambda length: excess(length, signals, estimate, noise_var, num_units, tuned))(lengths)
    best = jnp.argmin(costs)
    return lengths[best], costs[best]


def lengths_up_to(longest: jax.Array | float) -> jax.Array:
    """The logarithmic grid of lengths (49,), from `longest` / 64."""
    return longest * jnp.asarray(_SHARES, jnp.result_type(longest, 1.0))


def best_step(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    noise_var: jax.Array | float,
    num_units: int,
    longest: jax.Array | float,
    tuned: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The length, on a grid up to `longest`, of least expected change of the loss by one round alone, and that change.

    A step of multiples F lowers it to first order by g^T F g. A private curvature of c K along the signal takes back
    half of g^T F c K F g, and noise, which meets K, costs half of s^2 tr(F K F).

    Args:
      posterior: after the round's release, or before it.
      estimate: public.
      noise_var: s^2, variance in each coordinate of this release's noise.
      num_units: N.
      longest: bound of a single round.
      tuned: (r + 1,) one, or zero where the round holds the parameters fixed.
    """
    signals = debiased_energy(posterior, estimate, num_units)
    rates = _rates(posterior, estimate, num_units)
    lengths = lengths_up_to(longest)
    multiples = _multiples(lengths[:, None], rates, tuned)
    # Of one coordinate, over its multiple: the gain less what curvature takes back, and what noise costs.
    change = signals * (rates * multiples / 2 - 1) + estimate.curvature * noise_var * multiples / 2
    changes = jnp.matmul(multiples * change, estimate.dims, precision=_HIGHEST)
    best = jnp.argmin(changes)
    return lengths[best], changes[best]


def _multiples(length: jax.Array | float, rates: jax.Array, tuned: jax.Array | float) -> jax.Array:
    """(1 - exp(-l c K)) / (c K) of what is seen, where it is tuned; lengths (m, 1) give (m, r + 1)."""
    return -tuned * jnp.expm1(-length * rates) / rates


def _rates(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """c K (r + 1,), the private curvature along the signal."""
    return curvature_ratio(posterior, estimate, num_units) * signal_curvature(estimate)
