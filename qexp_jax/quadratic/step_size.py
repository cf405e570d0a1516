"""How far to follow the released gradients: empirical Bayes and the length of a gradient flow.

All of it is post-processing of releases with public numbers (T5), free of budget. In whitened coordinates, with public
curvature K_j and a private mean gradient g_j that is seen with variance p_j (noise and sampling together), gradient
flow of length L from the anchor moves by -(1 - exp(-L K_j)) / K_j times what is seen. Its expected excess over the
minimiser of the quadratic is *exactly*

    J(L) = sum_j ( E[g_j^2] exp(-2 L K_j) + p_j (1 - exp(-L K_j))^2 ) / (2 K_j).

A direction with more signal than noise wants a long flow, one with less a short one; `best_length` takes the L of least
J. The signal is estimated from the releases themselves: g_j ~ N(0, tau v_j), where v_j is the public second moment of
one record's clipped gradient and tau, the *shift*, is common to all coordinates: re-weighting records moves a mean
gradient in proportion to v_j. tau has a public prior, half of it on no shift at all, so that where noise hides the
signal nothing is followed that the public records had right, and where it does not the data decides.

The leading r directions are coordinates of their own; all others are one block, whose signal is expected to be half as
large for its moments, unless the releases say otherwise. A round may leave the others where they are (`tuned`): then it
has nothing of their noise, and nothing is learnt of them. Noise meets their mean curvature, but a signal lies where the
curvature is high; J takes that of the last leading direction for it.

*Curvature ratio.* A new population moves the gradient and the curvature in the same directions, so that steps that
suit K overshoot. Two rounds in sequence measure the private curvature along the private gradient (`curvature_ratio`), and a
round follows its draw for

    (1 - exp(-l c K_j)) / (c K_j)

with c that ratio and l the length of the round: gradient flow on a quadratic c times as steep as the public one, which
never passes its minimum, however long. The leading directions have one c, all others another. The steepest part of a
signal is also the first to be consumed; the anchor's gradient is therefore remembered with weights exp(-L c K_j),
those of least variance if c K_j is its decay.

*Far from the anchor* no quadratic tells how much there is to gain, and J is of no use. Under a heavy shift a round asks
instead how much signal the latest releases show (`debiased_energy`) and takes the step that lowers the loss most by
itself (`best_step`): its gain to first order, less what curvature and noise cost, as a Wiener filter's. It shortens as
the signal is consumed.

The derivation and the priors are ours. Empirical Bayes: Efron and Morris, J. Am. Stat. Assoc. 68 (1973). A step from
two gradients: Barzilai and Borwein, IMA J. Numer. Anal. 8 (1988).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.quadratic.directions import Directions, along, combine
from qexp_jax.quadratic.rule import RULE

_HIGHEST = jax.lax.Precision.HIGHEST
_LARGEST_SHIFT = 0.5
_NUM_SHIFTS = 21
_NUM_LENGTHS = 49
_SHORTEST = 1 / 64
_LONGEST_ROUND = 4.0
_STEEPEST = 1000.0


class CurvatureEstimate(NamedTuple):
    """The public second-order picture in whitened coordinates: r leading ones, then the block of all others.

    Attributes:
      directions: (r, k) orthonormal leading directions.
      curvature: (r + 1,) K.
      moments: (r + 1,) v, second moments of one unit's clipped whitened gradient.
      dims: (r + 1,) how many coordinates each entry stands for: 1, ..., 1, k - r.
      shifts: (m,) the prior's values of tau.
      log_prior: (m,) log of its weights, up to a constant.
    """

    directions: Directions | jax.Array
    curvature: jax.Array
    moments: jax.Array
    dims: jax.Array
    shifts: jax.Array
    log_prior: jax.Array


class Posterior(NamedTuple):
    """What the releases so far say of the private gradient at the anchor and of the curvature along it.

    Attributes:
      gradients: (k,) released mean gradients, summed with the weights `left` over variance; 0 where never tuned.
      weights: (r + 1,) one over the variance of the anchor's gradient that they give; 0 where never tuned.
      left: (r + 1,) share of the anchor's gradient that is left after the flow so far.
      last: (k,) the latest released mean gradient.
      last_var: variance of its noise in each coordinate.
      followed: (r + 1,) multiples of it that were followed.
      slopes: (2, 2) sums over rounds of the regression of measured on public curvature, see `curvature_ratio`.
      largest_ratio: (2,) the largest ratio that a passed minimum has shown; 0 where none was passed.
      times: (r + 1,) in how many rounds it was tuned.
      idle: (r + 1,) how many rounds have held it since; infinite where never tuned.
      recent: (k,) mean of the released mean gradients, the t-th of them with weight t.
      recent_var: (r + 1,) variance of its noise in each coordinate.
    """

    gradients: jax.Array
    weights: jax.Array
    left: jax.Array
    last: jax.Array
    last_var: jax.Array
    followed: jax.Array
    slopes: jax.Array
    largest_ratio: jax.Array
    times: jax.Array
    idle: jax.Array
    recent: jax.Array
    recent_var: jax.Array


def shift_prior(num_public: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of tau and log weights: half of it none, else uniform in log tau to .005 and falling as tau^-4 beyond.

    None is the least value, one over the number of public units: the sampling error that the anchor has of its own.

    >>> tau, log_weight = shift_prior(2000)
    >>> [round(float(x), 4) for x in (tau[0], tau[-1], log_weight[0], log_weight[-1])]
    [0.0005, 0.5, 3.0445, -18.4207]
    """
    tau = np.geomspace(min(1 / num_public, RULE.common_shift), _LARGEST_SHIFT, _NUM_SHIFTS)
    log_weights = -4 * np.log(np.maximum(tau / RULE.common_shift, 1))
    log_weights[0] += np.log(_NUM_SHIFTS)
    return tau, log_weights


def before_release(estimate: CurvatureEstimate) -> Posterior:
    """Nothing is known but the prior."""
    zeros = jnp.zeros_like(estimate.curvature)
    gradients, slopes = jnp.zeros(estimate.directions.shape[1], zeros.dtype), jnp.zeros((2, 2), zeros.dtype)
    left, idle = zeros + 1, zeros + jnp.inf
    return Posterior(
        gradients, zeros, left, gradients, zeros[0], zeros, slopes, slopes[0], zeros, idle, gradients, zeros
    )


def observe(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    seen: jax.Array,
    noise_var: jax.Array | float,
    tuned: jax.Array | float = 1.0,
) -> Posterior:
    """Takes in the released mean gradient `seen` (k,) of a round.

    Args:
      posterior: after the rounds before.
      estimate: public.
      seen: whitened; of directions that the round did not tune it is not looked at.
      noise_var: variance of its noise in each coordinate.
      tuned: (r + 1,) one, or zero where the round holds the parameters fixed.
    """
    left = tuned * posterior.left
    slopes, largest_ratio = _measured(posterior, estimate, seen, noise_var, tuned)
    times = posterior.times + tuned
    newest = tuned * 2 / (times + 1)
    return posterior._replace(
        gradients=posterior.gradients + scale(estimate.directions, left / noise_var, seen),
        weights=posterior.weights + left**2 / noise_var,
        last=seen,
        last_var=jnp.asarray(noise_var, seen.dtype),
        slopes=posterior.slopes + slopes,
        largest_ratio=jnp.maximum(posterior.largest_ratio, largest_ratio),
        times=times,
        idle=jnp.where(tuned > 0, 0, posterior.idle + 1),
        recent=posterior.recent + scale(estimate.directions, newest, seen - posterior.recent),
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

    Where nothing is tuned, nothing is subtracted.

    A single flow is no longer than four over the largest curvature, on which nothing of a gradient is left.
    """
    length = jnp.minimum(length, _LONGEST_ROUND / estimate.curvature.max())
    rates = _rates(posterior, estimate, num_units)
    multiples, left = _multiples(length, rates, tuned), jnp.exp(-tuned * length * rates)
    return multiples, posterior._replace(left=posterior.left * left, followed=multiples)


def curvature_ratio(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """c (r + 1,), posterior mean of the private curvature along the released gradients, in units of K, from 1 to 1000.

    With y = g + xi seen in one round, F y followed and y' seen in the next,

        A = (F y)^T (y - y') - s^2 tr(F + F K F),     B = (F y)^T K (F y) - s^2 tr(F K F)

    have expectations g^T F H F g and g^T F K F g, where H is the private curvature and noise meets K. So A = c B with
    an error of variance 2 s^2 |F y|^2 + s^4 tr F^2, about. The leading coordinates together have one c, all others
    another. The prior is normal with mean and standard deviation 2; or, in the leading ones, 1 + sum_j E[g_j^2] / v_j
    if that is larger: second moments V + g g^T, as records have whose mean is g, are at most that many times V.

    Where y' points back over F y, by more than two standard deviations of its error, the step has passed the minimum of
    its line, and c is at least A / B of that step, with A less and B more by two standard deviations. Of a quadratic
    the mean soon says the same; a loss that is nearly linear on both sides of a narrow valley, as logistic ones far
    from their minimum, is jumped over and over by steps that suit the mean of its curvatures.
    """
    large = 1 + jnp.sum(pooled_signal(posterior, estimate, num_units)[:-1] / estimate.moments[:-1])
    prior = jnp.stack([jnp.maximum(RULE.curvature_ratio, large), jnp.full_like(large, RULE.curvature_ratio)])
    mean = (posterior.slopes[0] + 1 / prior) / (posterior.slopes[1] + 1 / prior**2)
    pair = jnp.clip(jnp.maximum(mean, posterior.largest_ratio), 1.0, _STEEPEST)
    return _of_two(pair, len(estimate.curvature))


def secant(posterior: Posterior, estimate: CurvatureEstimate, seen: jax.Array) -> jax.Array:
    """A and B of `curvature_ratio`, of the leading coordinates and of all others (2, 2), for a `seen` gradient (k,)."""
    followed, noise = posterior.followed, posterior.last_var * estimate.dims
    energy, product = (_products(estimate.directions, posterior.last, x) for x in (posterior.last, seen))
    measured = followed * (energy - product) - noise * (followed + estimate.curvature * followed**2)
    public = signal_curvature(estimate) * followed**2 * (energy - noise)
    return jnp.stack([_in_two(measured), _in_two(public)])


def _measured(posterior, estimate, seen, noise_var, tuned):
    """What a round tells of c: A W / V and B W / V (2, 2), and c where the last step passed a minimum (2,).

    V is the error's variance. W is how far B exceeds two standard deviations of its noise, at least 0: what looks like
    noise has no say. All are zero for the first round, which follows nothing.
    """
    squares, dims, last_var = posterior.followed**2, estimate.dims, posterior.last_var
    pair = secant(posterior, estimate, seen)
    spread = last_var * jnp.sqrt(2 * _in_two(dims * (signal_curvature(estimate) * squares) ** 2))
    sure = jnp.maximum(pair[1] - 2 * spread, 0)
    energy, product = (_products(estimate.directions, posterior.last, x) for x in (posterior.last, seen))
    variance = _in_two((last_var + noise_var) * squares * energy + last_var * noise_var * squares * dims)
    is_seen = _in_two(tuned * jnp.ones_like(dims)) > 0
    slopes = jnp.where(is_seen, pair * sure / jnp.where(variance > 0, variance, jnp.inf), 0)
    error, back = 2 * jnp.sqrt(variance), -_in_two(posterior.followed * product)
    passed = is_seen & (back > error) & (pair[1] > 0)
    return slopes, jnp.where(passed, (pair[0] - error) / jnp.where(passed, pair[1] + 2 * spread, 1), 0)


def _products(directions, x, y):
    """x_j y_j of the leading coordinates, and their sum over all others (r + 1,)."""
    a, b = (along(directions, v) for v in (x, y))
    return jnp.append(a * b, jnp.vdot(x, y, precision=_HIGHEST) - jnp.vdot(a, b, precision=_HIGHEST))


def _in_two(x):
    """Summed over the leading entries, and the last."""
    return jnp.stack([jnp.sum(x[:-1]), x[-1]])


def _of_two(pair, size):
    """(size,): the first for each leading entry, and the last."""
    return jnp.append(jnp.full(size - 1, pair[0]), pair[1])


def signal_curvature(estimate: CurvatureEstimate) -> jax.Array:
    """(r + 1,): K, but for the block of all others the least leading one, where its signal lies."""
    return estimate.curvature.at[-1].set(estimate.curvature[:-1].min())


def energies(estimate: CurvatureEstimate, x: jax.Array) -> jax.Array:
    """x_j^2 of the leading coordinates, and the mean square of the others, (k,) -> (r + 1,)."""
    squares = _products(estimate.directions, x, x)
    return squares.at[-1].set(jnp.maximum(squares[-1], 0) / jnp.maximum(1, estimate.dims[-1]))


def scale(directions: Directions | jax.Array, factors: jax.Array, x: jax.Array) -> jax.Array:
    """x (k,) with its leading coordinates and all others multiplied by `factors` (r + 1,)."""
    rest = factors[-1]
    return combine(directions, along(directions, x) * (factors[:-1] - rest)) + rest * x


def pooled_signal(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """E[g_j^2] (r + 1,) at the anchor, given all releases."""
    energy, noise_var = _pooled(posterior, estimate)
    return signal(energy, estimate, noise_var, num_units)


def pooled_shift(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """E[tau], given all releases."""
    energy, noise_var = _pooled(posterior, estimate)
    weights, _, _ = _posterior(energy, estimate, noise_var, num_units)
    return jnp.matmul(weights, estimate.shifts, precision=_HIGHEST)


def _pooled(posterior, estimate):
    """Energy of the anchor's gradient as all releases together give it, and the variance of its noise."""
    noise_var = 1 / posterior.weights  # infinite where nothing was seen, which leaves the prior
    factors = jnp.where(posterior.weights > 0, noise_var, 0)
    largest = factors.max()  # before squaring: small units stay within float32
    shares = factors / jnp.where(largest > 0, largest, 1)
    return shares**2 * energies(estimate, largest * posterior.gradients), noise_var


def debiased_energy(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """How much of E[g_j^2] (r + 1,) is left: what the recent releases show, and at most what the anchor had.

    Of the energy of their mean the noise's is taken off, but for one standard deviation of it, in the leading ones
    together and in all others: without any noise allowed for, states stand still in their first rounds for nothing that
    a later one would not have seen. May be negative in single directions, so that sums over directions have no further
    bias; for the same reason the leading ones together are held to what they had together. Held one by one, what noise
    adds to some would be cut off and what it takes from others kept, and states stand still wherever noise is loud.
    """
    dims = estimate.dims.at[:-1].set(len(estimate.directions))
    noise = posterior.recent_var * (1 - jnp.sqrt(2 / jnp.maximum(dims, 1)))
    left, had = energies(estimate, posterior.recent) - noise, pooled_signal(posterior, estimate, num_units)
    left = jnp.where(posterior.times > 0, left, had)
    return jnp.where(_of_two(_in_two(left) < _in_two(had), len(left)), left, had)


def signal(energy: jax.Array, estimate: CurvatureEstimate, noise_var: jax.Array | float, num_units: int) -> jax.Array:
    """Posterior means E[g_j^2] (r + 1,), averaged over the posterior of the shift tau.

    Args:
      energy: (r + 1,) `energies` of a released mean gradient.
      estimate: public.
      noise_var: variance of its noise in each coordinate, or (r + 1,); infinite where nothing was released.
      num_units: N, for the sampling error, 1.5 v_j / N: private records vary more than public ones.
    """
    weights, prior, shrunk = _posterior(energy, estimate, noise_var, num_units)
    return jnp.matmul(weights, shrunk**2 * energy + prior * (1 - shrunk), precision=_HIGHEST)


def _posterior(energy, estimate, noise_var, num_units):
    """Weights (m,) of the shifts; the variance (m, r + 1) of g_j in each, and its share in what is seen."""
    prior = estimate.shifts[:, None] * estimate.moments.at[-1].multiply(RULE.others_shift)
    error = RULE.sampling * estimate.moments / num_units + noise_var
    # Against tau = 0, so that large blocks do not cancel in float32.
    ratio = prior / error
    shrunk = ratio / (1 + ratio)
    found = jnp.matmul(energy / error * shrunk - jnp.log1p(ratio), estimate.dims, precision=_HIGHEST)
    return jax.nn.softmax(estimate.log_prior + found / 2), prior, shrunk


def excess(
    length: jax.Array | float,
    signals: jax.Array,
    estimate: CurvatureEstimate,
    noise_var: jax.Array | float,
    num_units: int,
    tuned: jax.Array | float = 1.0,
) -> jax.Array:
    """J(L), the expected excess of a flow of one `length`; `signals` (r + 1,) are E[g_j^2]."""
    curvature, noise_curvature, length = signal_curvature(estimate), estimate.curvature, tuned * length
    left, sampling = jnp.exp(-length * curvature), RULE.sampling * estimate.moments / num_units
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
    """The logarithmic grid of lengths, from `longest` / 64."""
    return longest * jnp.geomspace(_SHORTEST, 1.0, _NUM_LENGTHS)


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
    signals, rates = debiased_energy(posterior, estimate, num_units), _rates(posterior, estimate, num_units)
    lengths = lengths_up_to(longest)
    multiples = _multiples(lengths[:, None], rates, tuned)
    change = signals * (rates * multiples / 2 - 1) + estimate.curvature * noise_var * multiples / 2
    changes = jnp.matmul(multiples * change, estimate.dims, precision=_HIGHEST)
    best = jnp.argmin(changes)
    return lengths[best], changes[best]


def _multiples(length, rates, tuned):
    """(1 - exp(-l c K)) / (c K) of what is seen, where it is tuned."""
    return -tuned * jnp.expm1(-length * rates) / rates


def _rates(posterior, estimate, num_units):
    """c K (r + 1,), the private curvature along the signal."""
    return curvature_ratio(posterior, estimate, num_units) * signal_curvature(estimate)
