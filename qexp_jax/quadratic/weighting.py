"""Weights that tilt public records towards the private population, and training on them (T9): post-processing.

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

*Training.* The model is trained on the weighted loss less its unweighted slope at the anchor,

    L_w(theta) - <theta - theta_0, grad L_1(theta_0)>,

so that the anchor is where training would stay if all weights were equal, however long or short it was pretrained: what
moves it is the shift alone.

A tenth of the budget is spent on it, or none: that is known before anything is read (`share`).

Tilting public data by a private moment is ours in this form. Relatives: importance weighting under DP (Ji and Elkan,
Mach. Learn. 93, 2013), selective pretraining (arXiv:2305.13865), and maximum entropy under moment constraints (Jaynes,
Phys. Rev. 106, 1957).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize

from qexp_jax.data.records import LossFn, Params, Record, chunks, num_records, take
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.gradients import at_a_time
from qexp_jax.model.operations import count_flops
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics.keys import generator
from qexp_jax.quadratic import features as feature_maps
from qexp_jax.quadratic.curvature import mean_gradient
from qexp_jax.quadratic.features import FeatureMap
from qexp_jax.quadratic.rule import RULE

_SHIFTS = np.geomspace(1e-4, 1, 41)
_STEPS, _BATCH, _LEARNING_RATE = 1000, 128, 1e-3
_MOST_PASSES, _LEAST_STEPS = 9, 40
_CHUNKS = 10  # of equal length, so that one program trains, and somebody sees how far it is
_FLOPS_ON_CPU, _FLOPS_ON_ACCELERATOR = 5e11, 5e14
CHUNK = 4096  # public records on a device at a time, and those that say whether training worked


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
    return float(np.float32(np.quantile(np.linalg.norm(features, axis=1), RULE.clip_quantile)))


def clipped(features: np.ndarray, l2_clip_norm: float) -> np.ndarray:
    """Rows of norm at most C."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features * np.minimum(1, l2_clip_norm / np.maximum(norms, np.finfo(np.float32).tiny))


def fit(features: np.ndarray, mean: np.ndarray, noise_std: float, num_units: int) -> Tilt:
    """The weights of public records whose clipped features are `features`, from the released private mean of them.

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
    center = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    rows = np.asarray(features - center, np.float32)
    mean = np.asarray(mean, np.float64) - center
    spreads = np.maximum(np.mean(np.square(rows), axis=0, dtype=np.float64), 1e-12)
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
    return np.exp((rows - tilted.center) @ tilted.theta - tilted.log_mean)


def _most_likely_shift(mean, spreads, variances):
    """tau of the grid, and how much more likely it is than none."""

    def log_likelihood(shift):
        variance = shift * spreads + variances
        return -0.5 * np.sum(np.log(variance) + mean**2 / variance)

    found = [log_likelihood(shift) for shift in _SHIFTS]
    best = int(np.argmax(found))
    return float(_SHIFTS[best]), float(found[best] - log_likelihood(0.0))


def _solve(rows, mean, penalties):
    """theta (k,), of the convex problem above."""
    rows, mean, penalties = (jnp.asarray(x, jnp.float32) for x in (rows, mean, penalties))

    def value_and_slope(theta):
        value, slope = _dual(jnp.asarray(theta, jnp.float32), rows, mean, penalties)
        return float(value), np.asarray(slope, np.float64)

    start = np.zeros(rows.shape[1])
    return minimize(value_and_slope, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


@jax.jit
def _dual(theta, rows, mean, penalties):
    def value(theta):
        log_mean = jax.nn.logsumexp(rows @ theta) - math.log(len(rows))
        return log_mean - theta @ mean + jnp.sum(penalties * theta**2) / 2

    return jax.value_and_grad(value)(theta)


def _weights(scores):
    """exp(scores), over its mean, and the log of that mean."""
    largest = np.max(scores)
    raised = np.exp(np.asarray(scores, np.float64) - largest)
    return raised / raised.mean(), float(np.log(raised.mean()) + largest)


def _effective_share(weights):
    """(sum w)^2 / sum w^2, over their number."""
    return float(np.mean(weights) ** 2 / np.mean(weights**2))


def _temper(scores):
    """The largest share of theta, up to 1, at which the effective sample size is large enough; by bisection."""
    if _effective_share(_weights(scores)[0]) >= RULE.least_sample:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        enough = _effective_share(_weights(middle * scores)[0]) >= RULE.least_sample
        low, high = (middle, high) if enough else (low, middle)
    return low


# --- training the anchor ---


def num_steps(loss_fn: LossFn, params: Params, record: Record, num_public: int) -> int:
    """Steps of 128 records that training takes, from shapes alone: at most 1000, nine passes, and what a budget allows.

    The budget is half a minute of a slow core, more on accelerators; 0 where it allows less than 40 steps.

    Args:
      loss_fn: loss of one record.
      params: parameters or their shapes.
      record: one record or its shapes.
      num_public: public records.
    """
    flops = 3 * count_flops(loss_fn, params, record, products_only=True)
    budget = _FLOPS_ON_CPU if jax.default_backend() == "cpu" else _FLOPS_ON_ACCELERATOR
    affordable = budget // max(1, flops * _BATCH)
    wanted = min(_STEPS, affordable, _MOST_PASSES * num_public // _BATCH)
    return max(_CHUNKS, int(wanted) // _CHUNKS * _CHUNKS) if affordable >= _LEAST_STEPS else 0


def num_gradients(steps: int, num_public: int) -> int:
    """Public gradients that training evaluates: the slope at the anchor, and a batch a step."""
    return num_public + _CHUNKS * math.prod(batch_shape(steps, num_public)) if steps else 0


def train(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    space: Subspace,
    public: Record,
    weights: np.ndarray,
    steps: int,
    progress: Callable[[str], None] | None = None,
) -> Params:
    """The anchor trained on the weighted public records; `params` where that does not lower the weighted loss.

    Args:
      key: public randomness: the batches.
      loss_fn: loss of one record.
      params: the anchor, in working precision.
      space: what is tuned.
      public: public records, pytree with a leading axis.
      weights: (n,) mean one.
      steps: of Adam, with a cosine schedule.
      progress: called with the stage, ten times.
    """
    n = num_records(public)
    parts = chunks(public, CHUNK)
    slope = sum(count / n * public_slope(loss_fn, params, space, part, count) for part, count in parts)
    carry = start(space, steps)
    rng = generator(key)
    judged = rng.permutation(n)[:CHUNK]
    for i in range(_CHUNKS):
        if progress is not None:
            progress(f"tilt, step {i * steps // _CHUNKS} of {steps}")
        index = rng.integers(0, n, batch_shape(steps, n))
        batches = take(public, index.ravel())
        batches = jax.tree.map(lambda x, i=index: x.reshape(*i.shape, *x.shape[1:]), batches)
        carry = train_steps(loss_fn, steps, carry, params, space, slope, batches, jnp.asarray(weights[index]))
    judge = functools.partial(
        _objective, loss_fn, params, space, slope, records=take(public, judged), weights=jnp.asarray(weights[judged])
    )
    before, after = (float(judge(w)) for w in (jnp.zeros_like(carry[0]), carry[0]))
    return _moved(params, space, carry[0]) if after < before else params


@functools.partial(jax.jit, static_argnums=0)
def public_slope(
    loss_fn: LossFn, params: Params, space: Subspace, records: Record, count: jax.Array | int
) -> jax.Array:
    """Of the unweighted loss at the anchor (k,), over the first `count` records."""
    mask = jnp.arange(num_records(records)) < count
    size = at_a_time(loss_fn, params, space, records)
    return mean_gradient(loss_fn, params, space, records, mask=mask, microbatch_size=size)


def start(space: Subspace, steps: int) -> Any:
    """No displacement, and the optimiser's state."""
    w = jnp.zeros(space.dim, space.layout.dtype)
    return w, _optimizer(steps).init(w)


def batch_shape(steps: int, num_public: int) -> tuple[int, int]:
    """Batches that one program takes, and records in each."""
    return steps // _CHUNKS, min(_BATCH, num_public)


@functools.lru_cache(maxsize=16)
def _optimizer(steps):
    return optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))


@jax.jit
def _moved(params, space, w):
    return subspaces.displace(space, params, subspaces.without_held(space, w))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_steps(
    loss_fn: LossFn,
    steps: int,
    carry: Any,
    params: Params,
    space: Subspace,
    slope: jax.Array,
    batches: Record,
    weights: jax.Array,
) -> Any:
    """A step of Adam for each of the batches; `carry` is that of `start`."""
    optimizer = _optimizer(steps)

    def step(carry, batch):
        w, state = carry
        gradient = jax.grad(_tilted_loss)(w, loss_fn, params, space, slope, *batch)
        updates, state = optimizer.update(subspaces.without_held(space, gradient), state, w)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, carry, (batches, weights))[0]


@functools.partial(jax.jit, static_argnums=0)
def _objective(loss_fn, params, space, slope, w, records, weights):
    return _tilted_loss(w, loss_fn, params, space, slope, records, weights)


def _tilted_loss(w, loss_fn, params, space, slope, records, weights):
    moved = subspaces.displace(space, params, subspaces.without_held(space, w))
    losses = jax.vmap(as_products(loss_fn), in_axes=(None, 0))(moved, records)
    return jnp.mean(weights * losses) - jnp.vdot(w, slope)
