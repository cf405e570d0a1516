"""Accuracy on paper, before anything private is read, in the units of the loss of one record.

**T3.** For w from `mechanism.draw`, R^T (w - w*) = -(C z / N) xi. So the utility lost by the draw against the exact
minimiser of the quadratic is, per record, *exactly* distributed as

    (C z)^2 / (2 N^2) * chi-square with k degrees of freedom,        mean k (C z)^2 / (2 N^2),

with tails from the chi-square law (Laurent and Massart 2000 give the closed form); `tests/test_accuracy.py` holds draws
against this law and rejects that of half the noise. What the draw cannot know is bias:
clipping, what lies outside the subspace, and the Taylor remainder of the quadratic; each has an estimate below that
needs public data only. How much noise the public loss tolerates bounds the rounds. All of it is ours; the abstract of
arXiv:2605.20521 promises accuracy estimates without stating them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaincinv

from qexp_jax.data import arguments
from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.model.subspace import Subspace, displace
from qexp_jax.quadratic.averages import mean_loss

_HIGHEST = jax.lax.Precision.HIGHEST
_MOST_EVALUATIONS = 24
_CLOSE = 1.1  # the ratio of two noise scales between which a power law is trusted


def expected_excess(dim: int, noise_std: float, num_units: int) -> float:
    """Mean excess of the quadratic loss per record that the noise of one draw costs (T3).

    Args:
      dim: k.
      noise_std: C z, in units of whitened gradients.
      num_units: N.

    >>> expected_excess(dim=100, noise_std=5.0, num_units=1000)
    0.00125
    """
    dim = arguments.count("dim", dim)
    noise_std = arguments.not_negative("noise_std", noise_std)
    return dim * noise_std**2 / (2 * arguments.count("num_units", num_units) ** 2)


def excess_quantile(probability: float, mean: float, degrees: float) -> float:
    """The quantile of such an excess (T3): of a chi-square with these degrees of freedom, scaled to this mean.

    Args:
      probability: in (0, 1).
      mean: loss per record, from `expected_excess`, or of `noise_cost`.
      degrees: k, where the law is exact; or of `noise_cost`.

    >>> round(excess_quantile(0.95, mean=0.00125, degrees=100), 6)
    0.001554
    """
    probability = arguments.proportion("probability", probability)
    mean = arguments.not_negative("mean", mean)
    degrees = arguments.positive("degrees", degrees)
    # Half a chi-square of k degrees is a gamma of k / 2.
    return mean * 2 * float(gammaincinv(degrees / 2, probability)) / degrees


def noise_cost(curvature: Any, multiples: Any, dims: Any, *, noise_std: float, num_units: int) -> tuple[float, float]:
    """Mean loss per record that the noise of a step costs under a quadratic, and its degrees of freedom.

    A step that follows whitened coordinate j of a draw for the multiple m_j, under curvature K_j, is moved by its noise
    at a cost of (C z)^2 / (2 N^2) sum_j K_j m_j^2 xi_j^2. A chi-square with these degrees of freedom, scaled to this
    mean, has the same first two moments (Satterthwaite, Biometrics Bulletin 2, 1946); where K_j m_j^2 is the same for
    all j, it is the exact law.

    Args:
      curvature: (r,) K.
      multiples: (r,) m.
      dims: (r,) how many coordinates each stands for.
      noise_std: C z.
      num_units: N.

    Returns:
      The mean, and the degrees of freedom, as `excess_quantile` takes them.

    >>> noise_cost([2.0], [0.5], [100], noise_std=5.0, num_units=1000)
    (0.000625, 100.0)
    """
    curvature = np.asarray(curvature, np.float64)
    multiples = np.asarray(multiples, np.float64)
    dims = np.asarray(dims, np.float64)
    weights = curvature * multiples**2
    total = float(dims @ weights)
    mean = expected_excess(1, noise_std, num_units) * total
    degrees = total**2 / float(dims @ weights**2)
    return mean, degrees


def subspace_bias(gradient: jax.Array, full_precision: jax.Array, basis: jax.Array) -> jax.Array:
    """Quadratic gain that the subspace spanned by `basis` leaves unused, `[g^T Hf^{-1} g - g_P^T H^{-1} g_P] / 2`.

    Args:
      gradient: mean gradient g (d,) of public (rehearsal) records.
      full_precision: Hf (d, d), damped.
      basis: P (d, k); the precision in the subspace is H = P^T Hf P, so that the same damping enters both.
    """
    times_basis = jnp.matmul(full_precision, basis, precision=_HIGHEST)
    inside = jnp.matmul(basis.T, times_basis, precision=_HIGHEST)
    reduced = jnp.matmul(basis.T, gradient, precision=_HIGHEST)
    full_step = jnp.linalg.solve(full_precision, gradient)
    gain = jnp.vdot(gradient, full_step, precision=_HIGHEST)
    step_inside = jnp.linalg.solve(inside, reduced)
    gain_inside = jnp.vdot(reduced, step_inside, precision=_HIGHEST)
    return (gain - gain_inside) / 2


def clipping_bias(whitened: np.ndarray, l2_clip_norm: float) -> float:
    """Quadratic loss per record by which clipping shifts the minimiser, `|mean v - mean clip(v)|^2 / 2`; v (n, k)."""
    l2_clip_norm = arguments.positive("l2_clip_norm", l2_clip_norm)
    norms = np.linalg.norm(whitened, axis=1, keepdims=True)
    # A gradient of zero loses nothing, whatever it is divided by.
    divisors = np.maximum(norms, np.finfo(whitened.dtype).tiny)
    lost = whitened * (1 - np.minimum(1, l2_clip_norm / divisors))
    return float(np.sum(np.mean(lost, axis=0) ** 2) / 2)


def taylor_ratio(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    steps: jax.Array,
    gradient: jax.Array,
    quadratic: jax.Array,
    records: Record,
    **batching: Any,
) -> jax.Array:
    """How the change of the public loss beyond its linear part compares with what the quadratic predicts.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      subspace: k directions.
      steps: (m, k) steps w of the size that a draw will have.
      gradient: (k,) mean gradient of the same records.
      quadratic: (m,) predictions w^T H w / 2, damping included.
      records: public records; best those that the curvature has not seen.
      **batching: as in `averages.mean_over_records`.

    Returns:
      (m,) ratios: below 1 the damped quadratic is an upper model of the loss, far above 1 it cannot be trusted.
    """
    start = mean_loss(loss_fn, params, records, **batching)

    def change(w):
        moved = mean_loss(loss_fn, displace(subspace, params, w), records, **batching)
        linear = jnp.vdot(gradient, w, precision=_HIGHEST)
        return moved - start - linear

    # One step after the other: each forms a copy of the parameters.
    changes = jax.lax.map(change, steps)
    return changes / quadratic


def noise_tolerance(cost: Callable[[float], float], limit: float) -> float:
    """The noise scale at which `cost`, the rise of a loss, reaches `limit`; on the host, in about five evaluations.

    Where a power law through the two ends reaches it, or a quadratic through one, until the ends are close; else by
    bisection. A cost that is not finite counts as too high.

    >>> round(noise_tolerance(lambda scale: scale**2, limit=0.01), 4)
    0.1
    """
    limit = arguments.positive("limit", limit)
    low = 1e-8
    high = 1e4
    cost_at_low = 0.0
    cost_at_high = math.inf
    aim = math.sqrt(low * high)
    for _ in range(_MOST_EVALUATIONS):
        found = cost(aim)
        is_tolerated = found <= limit  # false of NaN
        if is_tolerated:
            low = aim
            cost_at_low = found
        else:
            high = aim
            cost_at_high = found
        has_ends = cost_at_low > 0 and math.isfinite(cost_at_high)
        power = 2.0
        if has_ends:
            power = math.log(cost_at_high / cost_at_low) / math.log(high / low)
        reached = aim * (limit / found) ** (1 / power) if found > 0 else 0.0
        if has_ends and high < _CLOSE * low:
            return reached
        # A little beyond, so that both ends close in.
        beyond = 0.25 if is_tolerated else -0.25
        aim = reached * _CLOSE**beyond
        if not low < aim < high:
            aim = math.sqrt(low * high)
    return low
