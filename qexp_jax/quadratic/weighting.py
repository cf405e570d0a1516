"""Weights that tilt public records towards the private population (T9): post-processing.

A public map phi (`features`) turns a record into k numbers, centred on the public mean. **One draw** of the mechanism,
with the utility of the loss |w|^2 / 2 - w . phi(record), that is A = M = I, releases the private mean

    m = (S + C z xi) / N,        mu-GDP with mu = Delta / (C z) (T1).

**T9.** All that follows is a function of m and of public numbers, and so post-processing (T5): it costs no budget,
whatever it does. The public records get the weights w_j proportional to exp(theta . phi_j) with

    theta = argmin  log mean_j exp(theta . phi_j) - theta . m + 1/2 sum_i (v_i / tau) theta_i^2.

Without the last term these are the weights nearest to uniform, in relative entropy, whose mean is m. With it m counts
as far as it is known: v_i is the variance of its noise and of sampling, and the shift tau, in units of the public
variance c_i, is the most likely one if m_i ~ N(0, tau c_i + v_i). Without a shift tau is 0 and all weights are equal.

*Acceptance.* Weights move towards equal ones until their effective sample size is three quarters of the records, so
that no few records speak for all. They are refused, and all are equal, unless m is three nats more likely with a shift
than without, and unless .45 of theta is left then: where the private population lies outside of what public records
look like, no weights make up for it.

A tenth of the budget is spent on it, or none: that is known before anything is read (`share`). The model is then
trained on the weighted records (`tilted_training`).

Tilting public data by a private moment is ours in this form. Relatives: importance weighting under DP (Ji and Elkan,
Mach. Learn. 93, 2013), selective pretraining (arXiv:2305.13865), and maximum entropy under moment constraints (Jaynes,
Phys. Rev. 106, 1957).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Record
from qexp_jax.numerics.compilation import FEW, compiled
from qexp_jax.quadratic import features as feature_maps
from qexp_jax.quadratic.features import FeatureMap
from qexp_jax.quadratic.rule import RULE

_SHIFTS = np.geomspace(1e-4, 1, 41)  # the grid of tau
_BISECTIONS = 30
_LEAST_VARIANCE = 1e-12  # of a feature in which public records do not differ


class Tilt(NamedTuple):
    """Weights of public records, made of one released mean; public once released.

    Attributes:
      weights: (n,) float32, mean one.
      theta: (k,) the direction of tilting, after tempering.
      log_mean: log mean_j exp(theta . phi_j), so that any record's weight is exp(theta . phi - log_mean).
      center: (k,) mean of the public records' clipped features.
      shift: tau.
      evidence: log likelihood ratio of m with this shift to without any, in nats.
      effective_sample_size: as a share of the records.
      temper: share of theta that was kept.
      accepted: whether weights differ at all.
    """

    weights: np.ndarray
    theta: np.ndarray
    log_mean: float
    center: np.ndarray
    shift: float
    evidence: float
    effective_sample_size: float
    temper: float
    accepted: bool


def share(num_units: int, mu: float) -> float:
    """The share of mu^2 for the draw: a tenth, or none where N mu is below 200 and noise would hide common shifts.

    Args:
      num_units: N.
      mu: of the whole budget.

    >>> share(1000, 1.0), share(100, 1.0)
    (0.1, 0.0)
    """
    return RULE.tilt_share if num_units * mu >= RULE.least_signal else 0.0


def clip_norm(features: np.ndarray) -> float:
    """C: the .95 quantile of the public features' norms, a float32."""
    norms = np.linalg.norm(features, axis=1)
    return float(np.float32(np.quantile(norms, RULE.clip_quantile)))


def clipped(features: np.ndarray, l2_clip_norm: float) -> np.ndarray:
    """Rows of norm at most C."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    divisors = np.maximum(norms, np.finfo(np.float32).tiny)
    return features * np.minimum(1, l2_clip_norm / divisors)


def fit(features: np.ndarray, mean: np.ndarray, noise_std: float, num_units: int) -> Tilt:
    """The weights of public records whose clipped features are `features`, from the released private mean (T9).

    Args:
      features: (n, k) of the public records, clipped as the private ones were.
      mean: (k,) released.
      noise_std: C z / N, standard deviation of its noise in each axis.
      num_units: N.

    Formal guarantee: none of its own; it is post-processing of `mean`.

    >>> rows = np.random.default_rng(0).normal(size=(2000, 1)).astype(np.float32)
    >>> tilted = fit(rows, np.array([0.2]), 0.02, 1000)
    >>> tilted.accepted, round(float(np.mean(tilted.weights * rows[:, 0])), 1)
    (True, 0.2)
    """
    # Centred anew: the mean of features is no longer 0 once they are clipped.
    center = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    rows = np.asarray(features - center, np.float32)
    mean = np.asarray(mean, np.float64) - center
    spreads = np.maximum(np.mean(np.square(rows), axis=0, dtype=np.float64), _LEAST_VARIANCE)
    # Of noise, of sampling the private mean, and of sampling the public one that it is held against.
    variances = noise_std**2 + spreads / num_units + spreads / len(rows)
    shift, evidence = _most_likely_shift(mean, spreads, variances)
    theta = _solve(rows, mean, variances / shift)
    temper = _temper(rows @ theta)
    accepted = bool(evidence > RULE.least_evidence and temper > RULE.least_temper)
    theta = np.asarray(theta * (temper if accepted else 0))
    weights, log_mean = _weights(rows @ theta)
    return Tilt(
        weights=weights.astype(np.float32),
        theta=theta,
        log_mean=log_mean,
        center=center,
        shift=shift,
        evidence=evidence,
        effective_sample_size=_effective_share(weights),
        temper=temper,
        accepted=accepted,
    )


def weights_of(tilted: Tilt, features: FeatureMap, records: Record) -> np.ndarray:
    """The weights (n,) of other public records, as a stream brings them: exp(theta . phi - log_mean)."""
    rows = np.asarray(feature_maps.apply_each(features, records), np.float64)
    scores = (rows - tilted.center) @ tilted.theta
    return np.exp(scores - tilted.log_mean)


def _most_likely_shift(mean: np.ndarray, spreads: np.ndarray, variances: np.ndarray) -> tuple[float, float]:
    """tau of the grid, and how much more likely it is than none."""

    def log_likelihood(shift: float) -> float:
        variance = shift * spreads + variances
        return -0.5 * np.sum(np.log(variance) + mean**2 / variance)

    found = [log_likelihood(shift) for shift in _SHIFTS]
    best = int(np.argmax(found))
    evidence = found[best] - log_likelihood(0.0)
    return float(_SHIFTS[best]), float(evidence)


def _solve(rows: np.ndarray, mean: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """theta (k,), of the convex problem above."""
    on_device = [jnp.asarray(x, jnp.float32) for x in (rows, mean, penalties)]

    def value_and_slope(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _dual(jnp.asarray(theta, jnp.float32), *on_device)
        return float(value), np.asarray(slope, np.float64)

    from scipy.optimize import minimize  # slow to import

    start = np.zeros(rows.shape[1])
    found = minimize(value_and_slope, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    # Converged or not: any theta gives weights, and their privacy does not depend on which it is.
    return found.x


@functools.partial(compiled, few=FEW)
def _dual(theta: jax.Array, rows: jax.Array, mean: jax.Array, penalties: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What theta minimises, and its slope (k,)."""

    def value(theta):
        log_mean = jax.nn.logsumexp(rows @ theta) - math.log(len(rows))
        return log_mean - theta @ mean + jnp.sum(penalties * theta**2) / 2

    return jax.value_and_grad(value)(theta)


def _weights(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """exp(scores), over its mean, and the log of that mean."""
    largest = np.max(scores)  # taken off before raising, so that nothing overflows
    raised = np.exp(np.asarray(scores, np.float64) - largest)
    mean = raised.mean()
    return raised / mean, float(np.log(mean) + largest)


def _effective_share(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2, over their number."""
    return float(np.mean(weights) ** 2 / np.mean(weights**2))


def _temper(scores: np.ndarray) -> float:
    """The largest share of theta, up to 1, at which the effective sample size is large enough; by bisection."""

    def is_enough(share: float) -> bool:
        weights, _ = _weights(share * scores)
        return _effective_share(weights) >= RULE.least_sample

    if is_enough(1):
        return 1.0
    low = 0.0
    high = 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if is_enough(middle):
            low = middle
        else:
            high = middle
    return low
