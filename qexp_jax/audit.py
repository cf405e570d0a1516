"""Attained against claimed privacy: exact curves, worst neighbours, and a falsifier that sees only outputs.

*Exact.* A release of S + C z xi on neighbours with sums S and S' is exactly as private as N(0, 1) against N(mu, 1) with
mu = |S - S'| / (C z): no sampling is needed, only the pair that makes |S - S'| largest (`worst_neighbour`).

*Black box.* `falsify` knows a mechanism only as a function of key and dataset. It draws from two neighbours, learns on
one part of the draws how to tell them apart, chooses a threshold on a second, and counts errors on a third, whose
Clopper-Pearson bounds give, with the stated confidence, values that mu and epsilon cannot be below (Jagielski et al.,
arXiv:2006.07709; Nasr et al., arXiv:2101.04535; by the trade-off curve for mu, Nasr et al., arXiv:2302.07956). A bound
above the claim refutes the claim. A bound below it proves nothing: another pair or another score might do better.

*One run.* `one_run_epsilon` audits one release with many canaries (Steinke, Nasr and Jagielski, arXiv:2305.08846;
Mahloujifar, Melis and Chaudhuri, arXiv:2410.22235), through jax_privacy.

An audit's output is **not private**: run it on data made for it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation
from scipy.stats import beta, norm

from qexp_jax.data import arguments
from qexp_jax.data.records import Record, num_records
from qexp_jax.privacy import accounting

Mechanism = Callable[[jax.Array, Any], jax.Array]

# --- Exact ---


def attained_mu(whitened_sum: jax.Array, other_sum: jax.Array, noise_std: float) -> float:
    """|S - S'| / (C z), the exact mu of a pair of neighbours; infinite where a sum is not finite and so shows itself.

    >>> attained_mu(jnp.array([3.0, 4.0]), jnp.zeros(2), noise_std=10.0)
    0.5
    """
    noise_std = arguments.positive("noise_std", noise_std)
    distance = float(np.linalg.norm(np.asarray(whitened_sum, np.float64) - np.asarray(other_sum, np.float64)))
    return distance / noise_std if math.isfinite(distance) else math.inf


def attained_delta(mu: float, epsilon: float) -> float:
    """The exact delta(epsilon) of a pair at `attained_mu`, where that may be 0 or infinite.

    >>> attained_delta(0.0, 1.0), round(attained_delta(1.0, 1.0), 6), attained_delta(math.inf, 1.0)
    (0.0, 0.126937, 1.0)
    """
    mu = arguments.real("mu", mu)
    epsilon = arguments.not_negative("epsilon", epsilon)
    if mu in (0, math.inf):
        return float(mu > 0)
    return accounting.delta_from_mu(mu, epsilon)


class WorstNeighbour(NamedTuple):
    """The worst neighbours found.

    Attributes:
      mu: exact, attained by them; compare it with the claim.
      record: the record that is added, or replaced.
      replacement: what it is replaced by, for REPLACE_ONE; None otherwise.
    """

    mu: float
    record: Record
    replacement: Record | None


def worst_neighbour(
    sum_fn: Callable[[Record], jax.Array],
    dataset: Record,
    candidates: Record,
    noise_std: float,
    *,
    relation: NeighboringRelation,
    ascent_steps: int = 0,
) -> WorstNeighbour:
    """The candidate, or pair of candidates, that moves the sum most, after gradient ascent if asked for.

    Args:
      sum_fn: records -> S (k,), traceable; for instance `clipping.clipped_sum`.
      dataset: the other records, pytree with leading axis n.
      candidates: records to try, pytree with leading axis m.
      noise_std: C z.
      relation: REPLACE_ONE tries all pairs of candidates; otherwise each is added to `dataset`.
      ascent_steps: random moves that each candidate first tries, a tenth of its norm each; kept where |S - S'| grows.

    Raises:
      ValueError: for numbers that make no search.
    """
    noise_std = arguments.positive("noise_std", noise_std)
    ascent_steps = arguments.count("ascent_steps", ascent_steps, least=0)
    relation = arguments.neighboring_relation(relation)
    if num_records(candidates) == 0:
        raise ValueError("Expected at least one of the candidates, found leading axis 0.")
    base = sum_fn(dataset)
    sum_with = lambda record: sum_fn(jax.tree.map(lambda x, r: jnp.concatenate([x, r[None]]), dataset, record))
    moved = lambda record: jnp.linalg.norm(sum_with(record) - base)
    climbed = jax.jit(lambda c: jax.lax.map(functools.partial(_ascend, moved, steps=ascent_steps), c))(candidates)
    sums = np.asarray(jax.jit(lambda c: jax.lax.map(sum_with, c))(climbed), np.float64)
    others = sums if relation is NeighboringRelation.REPLACE_ONE else np.asarray(base, np.float64)[None]
    distances = np.linalg.norm(sums[:, None] - others[None], axis=2)
    distances = np.where(np.isfinite(distances), distances, np.inf)
    i, j = np.unravel_index(np.argmax(distances), distances.shape)
    record, other = (jax.tree.map(lambda x, at=at: x[at], climbed) for at in (i, j))
    replaced = relation is NeighboringRelation.REPLACE_ONE
    return WorstNeighbour(float(distances[i, j]) / noise_std, record, other if replaced else None)


def _ascend(objective, record, steps):
    """Random moves of the floating-point leaves of a record, each kept if the objective grows.

    A sum of integers has no slope to follow.
    """

    def step(state, key):
        held, value = state
        tried = _moved(key, held)
        found = objective(tried)
        is_better = found > value
        held = jax.tree.map(lambda old, new: jnp.where(is_better, new, old), held, tried)
        return (held, jnp.where(is_better, found, value)), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (record, objective(record)), keys)[0][0]


def _moved(key, record):
    """By a tenth of the record's norm, in a random direction."""
    leaves, treedef = jax.tree.flatten(record)
    real = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    noise = {i: jax.random.normal(jax.random.fold_in(key, i), leaves[i].shape, leaves[i].dtype) for i in real}
    size = 0.1 * _norm([leaves[i] for i in real]) / _norm(noise.values())
    return jax.tree.unflatten(treedef, [x + size * noise[i] if i in noise else x for i, x in enumerate(leaves)])


def _norm(leaves):
    return jnp.sqrt(sum(jnp.vdot(x, x, precision=jax.lax.Precision.HIGHEST) for x in leaves))


# --- Black box ---


class LowerBound(NamedTuple):
    """What outputs prove; with probability `confidence` all of it holds.

    Attributes:
      mu: no mu-GDP claim below it is true for this pair.
      epsilon: no (epsilon, delta) claim below it is.
      delta: of epsilon.
      confidence: 1 - significance.
      score: the score that told the neighbours apart best.
    """

    mu: float
    epsilon: float
    delta: float
    confidence: float
    score: str


def falsify(
    key: jax.Array,
    mechanism: Mechanism,
    dataset: Any,
    neighbour: Any,
    *,
    delta: float = 1e-5,
    num_draws: int = 100_000,
    confidence: float = 0.999,
    batch_size: int = 1000,
) -> LowerBound:
    """Lower bounds on mu and epsilon of a mechanism from its outputs alone.

    Args:
      key: typed.
      mechanism: `(key, dataset) -> array` of a fixed shape, traceable. Whatever is the same in every draw, such as the
        clipped sum, is best computed before and passed as the dataset.
      dataset: one of the neighbours.
      neighbour: the other.
      delta: in (0, 1), at which epsilon is bounded.
      num_draws: draws from each, at least `least_draws`.
      confidence: in (0, 1), with which both bounds hold.
      batch_size: draws at a time.

    Returns:
      `LowerBound`. Scores tried are the log-likelihood ratios of Gaussians fitted to the outputs with one covariance
      and with two, and with two to outputs and their products; an output that is not finite is a symbol of its own.

    Raises:
      ValueError: for a confidence or delta outside (0, 1), and for fewer draws than could ever refute anything.
    """
    confidence = arguments.proportion("confidence", confidence)
    delta = arguments.proportion("delta", delta)
    num_draws = arguments.count("num_draws", num_draws, least=least_draws(confidence, delta))
    batch_size = arguments.count("batch_size", batch_size)
    keys = jax.random.split(key, (2, num_draws))
    pairs = zip(keys, (dataset, neighbour), strict=True)
    draws = [np.asarray(_outputs(mechanism, k, data, batch_size), np.float64) for k, data in pairs]
    quarter = num_draws // 4
    fit, choose, test = zip(*(np.split(x, [quarter, 2 * quarter]) for x in draws), strict=True)
    level = (1 - confidence) / _BOUNDS
    bounds: dict[str, Callable] = {"mu": mu_bound, "epsilon": functools.partial(epsilon_bound, delta=delta)}
    best: dict[str, tuple[float, str, float]] = dict.fromkeys(bounds, (-math.inf, "none", 0.0))
    scores = _scores(*fit)
    for name, score in scores.items():
        thresholds, errors = _error_bounds(score(choose[0]), score(choose[1]), level)
        for target, bound in bounds.items():
            values = bound(*errors)
            at = int(np.argmax(values))
            best[target] = max(best[target], (float(values[at]), name, float(thresholds[at])))
    found = {}
    for target, (_, name, threshold) in best.items():
        positive, negative = (scores[name](x) for x in test)
        _, errors = _error_bounds(positive, negative, level, thresholds=np.array([threshold]))
        found[target] = max(0.0, float(bounds[target](*errors)[0]))
    return LowerBound(found["mu"], found["epsilon"], delta, confidence, best["mu"][1])


_BOUNDS = 4  # two counts for each of mu and epsilon
_LEAST_TO_FIT = 2


def least_draws(confidence: float, delta: float) -> int:
    """The draws below which `falsify` finds nothing, even of a mechanism that shows its data.

    Half of the draws are tested. Without a single error among m of them, either error rate is only known to be below
    b = 1 - level^(1/m), and mu and epsilon are above 0 where 1 - b - delta > b.

    >>> least_draws(0.999, 1e-5)
    24
    """
    confidence = arguments.proportion("confidence", confidence)
    delta = arguments.proportion("delta", delta)
    level = (1 - confidence) / _BOUNDS
    tested = math.floor(math.log(level) / math.log((1 + delta) / 2)) + 1
    return max(2 * tested, 4 * _LEAST_TO_FIT)


def mu_bound(false_positives: Any, false_negatives: Any) -> Any:
    """mu that error rates at most these imply, by the trade-off curve of Gaussian DP: Phi^{-1}(1 - a) - Phi^{-1}(b)."""
    return norm.isf(false_positives) - norm.ppf(false_negatives)


def epsilon_bound(false_positives: Any, false_negatives: Any, delta: float) -> Any:
    """epsilon that error rates at most these imply, in the better of both orders."""
    delta = arguments.proportion("delta", delta)
    with np.errstate(divide="ignore"):
        return np.maximum(*(
            np.log(np.maximum(0, 1 - a - delta)) - np.log(b)
            for a, b in ((false_negatives, false_positives), (false_positives, false_negatives))
        ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("mechanism", "batch_size"))
def _outputs(mechanism, keys, data, batch_size):
    return jax.lax.map(lambda k: jnp.ravel(mechanism(k, data)), keys, batch_size=batch_size)


def _error_bounds(positive, negative, level, thresholds=None):
    """Thresholds, and upper Clopper-Pearson bounds of false positives and false negatives at them."""
    if thresholds is None:
        pooled = np.unique(np.concatenate([positive, negative]))
        ends = [-np.inf, np.inf]  # a bound of nothing, so that there is always one
        thresholds = np.concatenate([pooled[:: max(1, len(pooled) // 2000)], ends])
    rates = [
        _clopper_pearson(len(negative) - np.searchsorted(np.sort(negative), thresholds), len(negative), level),
        _clopper_pearson(np.searchsorted(np.sort(positive), thresholds), len(positive), level),
    ]
    return thresholds, rates


def _clopper_pearson(count, total, level):
    return np.where(count < total, beta.isf(level, count + 1, np.maximum(total - count, 1)), 1.0)


_MOST_FEATURES = 200


def _scores(positive, negative) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Log-likelihood ratios fitted to draws of both; non-finite rows are a symbol with its own frequency."""
    finite = [np.all(np.isfinite(x), axis=1) for x in (positive, negative)]
    lost = [(np.sum(~ok) + 0.5) / (len(ok) + 1) for ok in finite]
    clean = [x[ok] for x, ok in zip((positive, negative), finite, strict=True)]
    width = positive.shape[1]
    forms = {"linear": (lambda x: x, True), "quadratic": (lambda x: x, False)}
    if width * (width + 3) // 2 <= _MOST_FEATURES:
        forms["products"] = (_products, False)

    def score(form):
        ratio = _gaussian_ratio(form[0](clean[0]), form[0](clean[1]), form[1]) if min(map(len, clean)) > 1 else None

        def of(x):
            ok = np.all(np.isfinite(x), axis=1)
            told = np.log(lost[0] / lost[1])
            values = ratio(form[0](np.where(ok[:, None], x, 0))) if ratio else np.zeros(len(x))
            return np.where(ok, values + np.log((1 - lost[0]) / (1 - lost[1])), told)

        return of

    return {name: score(form) for name, form in forms.items()}


def _products(x):
    """(n, k) -> x and x_i x_j for i <= j, which shows an output that is a quadratic function of others."""
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, i] * x[:, j]], axis=1)


def _gaussian_ratio(positive, negative, pooled):
    """log N(x; m_1, V_1) - log N(x; m_0, V_0), with one covariance for both if `pooled`."""
    scale = np.maximum(np.std(np.concatenate([positive, negative]), axis=0), 1e-300)
    means = [np.mean(x, axis=0) for x in (positive, negative)]
    covariances = np.stack([np.atleast_2d(np.cov(x / scale, rowvar=False)) for x in (positive, negative)])
    if pooled:
        covariances[:] = covariances.mean(axis=0)
    roots = [_whitener(v) for v in covariances]

    def log_density(x, mean, root):
        return -np.sum((((x - mean) / scale) @ root) ** 2, axis=1) / 2 + np.linalg.slogdet(root)[1]

    return lambda x: log_density(x, means[0], roots[0]) - log_density(x, means[1], roots[1])


def _whitener(covariance):
    """V^{-1/2}; outputs that determine each other leave a nearly singular V, which is the point."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(np.maximum(values, 1e-13 * values.max() + 1e-300))


# --- One run ---


def make_canaries(key: jax.Array, num_canaries: int, dim: int, l2_clip_norm: float) -> jax.Array:
    """Whitened gradients (num_canaries, dim) on the clip boundary: orthogonal up to `dim` of them, random beyond."""
    num_canaries = arguments.count("num_canaries", num_canaries)
    dim = arguments.count("dim", dim)
    l2_clip_norm = arguments.positive("l2_clip_norm", l2_clip_norm)
    if num_canaries > dim:
        vectors = jax.random.normal(key, (num_canaries, dim))
        return l2_clip_norm * vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    # The axes, reflected at a random plane: exactly orthogonal, without a factorisation.
    normal = jax.random.normal(key, (dim,))
    normal /= jnp.linalg.norm(normal)
    return l2_clip_norm * (jnp.eye(num_canaries, dim) - 2 * normal[:num_canaries, None] * normal)


def one_run_epsilon(
    key: jax.Array,
    mechanism: Callable[[jax.Array, jax.Array], jax.Array],
    canaries: jax.Array,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    guessed: float = 0.1,
) -> float:
    """Lower bound on epsilon from one release, half of whose canaries were left out by coin flips.

    Args:
      key: typed.
      mechanism: `(key, included) -> noisy sum (k,)`, run once; `included` (m,) bool says which canaries take part. From
        a draw w the noisy sum is -N R^T w.
      canaries: (m, k), what each adds to the whitened sum; a canary's score is its inner product with the noisy sum.
      delta: in (0, 1).
      confidence: in (0, 1), of the bound, given that the true trade-off curve is Gaussian.
      guessed: in (0, 1), share of canaries, those of highest score, that are guessed to be in.

    Raises:
      ImportError: without jax_privacy.
      ValueError: for a share outside (0, 1), and for fewer guesses than could ever refute anything.
    """
    delta = arguments.proportion("delta", delta)
    confidence = arguments.proportion("confidence", confidence)
    guessed = arguments.proportion("guessed", guessed)
    try:
        from jax_privacy import auditing
    except ImportError as error:
        raise ImportError("one_run_epsilon needs jax_privacy: pip install 'jax_privacy>=2.0,<3'.") from error
    _check_guesses(canaries, confidence, guessed)
    coin_key, noise_key = jax.random.split(key)
    included = jax.random.bernoulli(coin_key, 0.5, (len(canaries),))
    scores = np.asarray(jnp.matmul(canaries, mechanism(noise_key, included), precision="highest"), np.float64)
    scores = np.where(np.isfinite(scores), scores, 0)
    auditor = auditing.CanaryScoreAuditor(scores[np.asarray(included)], scores[~np.asarray(included)])
    # A quantile of all scores, which no coin has entered, so that nothing is lost to choosing it.
    threshold = auditing.Explicit(float(np.quantile(scores, 1 - guessed)))
    return float(auditor.epsilon_one_run_fdp(1 - confidence, delta, threshold_strategy=threshold))


def _check_guesses(canaries, confidence, guessed):
    """Coins alone make all of r guesses right with probability 2^-r: a bound above 0 takes more than that rules out."""
    if np.ndim(canaries) != 2:
        raise ValueError(f"Expected canaries of shape (m, k), found {np.shape(canaries)}.")
    number = len(canaries)
    found = number - math.ceil((1 - guessed) * (number - 1) - 1e-9)  # not below the quantile
    least = math.floor(-math.log2(1 - confidence)) + 1
    if found < least:
        raise ValueError(
            f"Expected at least {least} canaries guessed to be in at {confidence=}, found {found} of {number} at "
            f"{guessed=}."
        )
