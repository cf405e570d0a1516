"""Lower bounds on privacy from a mechanism's outputs alone.

`falsify` knows a mechanism only as a function of key and dataset. It draws from two neighbours, learns on one part of
the draws how to tell them apart, chooses a threshold on a second, and counts errors on a third, whose Clopper-Pearson
bounds give, with the stated confidence, values that mu and epsilon cannot be below (Jagielski et al., arXiv:2006.07709;
Nasr et al., arXiv:2101.04535; by the trade-off curve for mu, Nasr et al., arXiv:2302.07956). A bound above the claim
refutes the claim. A bound below it proves nothing: another pair or another score might do better.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betainccinv, ndtri

from qexp_jax.data import arguments

Mechanism = Callable[[jax.Array, Any], jax.Array]
Score = Callable[[np.ndarray], np.ndarray]


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
    # Each part of the draws serves once, so that what is counted last was not chosen by looking at it.
    quarter = num_draws // 4
    fit, choose, test = zip(*(np.split(x, [quarter, 2 * quarter]) for x in draws), strict=True)
    level = (1 - confidence) / _BOUNDS
    bounds: dict[str, Callable] = {"mu": mu_bound, "epsilon": functools.partial(epsilon_bound, delta=delta)}
    scores = _scores(*fit)
    best = _best_choices(scores, bounds, choose[0], choose[1], level)
    found = {}
    for target, choice in best.items():
        score = scores[choice.score]
        positive, negative = (score(x) for x in test)
        _, errors = _error_bounds(positive, negative, level, thresholds=np.array([choice.threshold]))
        found[target] = max(0.0, float(bounds[target](*errors)[0]))
    return LowerBound(
        mu=found["mu"],
        epsilon=found["epsilon"],
        delta=delta,
        confidence=confidence,
        score=best["mu"].score,
    )


_BOUNDS = 4  # two counts for each of mu and epsilon
_LEAST_TO_FIT = 2  # draws from each neighbour, for a covariance


class _Choice(NamedTuple):
    """Of the two, that with the larger value, on draws that are not tested, is the better one."""

    value: float
    score: str
    threshold: float


def _best_choices(
    scores: dict[str, Score], bounds: dict[str, Callable], positive: np.ndarray, negative: np.ndarray, level: float
) -> dict[str, _Choice]:
    """The score and threshold of the largest lower bound, of mu and of epsilon.

    Args:
      scores: fitted to other draws.
      bounds: each from error rates.
      positive: (n, k) draws from one of the neighbours.
      negative: (n, k) draws from the other.
      level: the probability with which each count may mislead.
    """
    best = dict.fromkeys(bounds, _Choice(-math.inf, "none", 0.0))
    for name, score in scores.items():
        thresholds, errors = _error_bounds(score(positive), score(negative), level)
        for target, bound in bounds.items():
            values = bound(*errors)
            at = int(np.argmax(values))
            choice = _Choice(float(values[at]), name, float(thresholds[at]))
            best[target] = max(best[target], choice)
    return best


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
    # 1 - b - delta > b is level^(1/m) > (1 + delta) / 2.
    tested = math.floor(math.log(level) / math.log((1 + delta) / 2)) + 1
    return max(2 * tested, 4 * _LEAST_TO_FIT)


def mu_bound(false_positives: Any, false_negatives: Any) -> Any:
    """mu that error rates at most these imply, by the trade-off curve of Gaussian DP: Phi^{-1}(1 - a) - Phi^{-1}(b)."""
    # -Phi^{-1}(a) keeps the digits of a small rate, which 1 - a would lose.
    return -ndtri(false_positives) - ndtri(false_negatives)


def epsilon_bound(false_positives: Any, false_negatives: Any, delta: float) -> Any:
    """epsilon that error rates at most these imply, in the better of both orders."""
    delta = arguments.proportion("delta", delta)

    def in_order(a: Any, b: Any) -> Any:
        return np.log(np.maximum(0, 1 - a - delta)) - np.log(b)

    with np.errstate(divide="ignore"):  # error rates of 1 prove nothing, and give minus infinity
        return np.maximum(in_order(false_negatives, false_positives), in_order(false_positives, false_negatives))


@functools.partial(jax.jit, static_argnames=("mechanism", "batch_size"))
def _outputs(mechanism: Mechanism, keys: jax.Array, data: Any, batch_size: int) -> jax.Array:
    """(n, k) outputs on one dataset, one for each key, flat, `batch_size` at a time."""
    return jax.lax.map(lambda k: jnp.ravel(mechanism(k, data)), keys, batch_size=batch_size)


def _error_bounds(
    positive: np.ndarray, negative: np.ndarray, level: float, thresholds: np.ndarray | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Thresholds (t,), and upper Clopper-Pearson bounds of false positives and false negatives at them, each (t,).

    Args:
      positive: (n,) scores of draws from one of the neighbours.
      negative: (n,) scores of draws from the other.
      level: the probability with which each bound may fail.
      thresholds: by default about 2000 among the scores.
    """
    if thresholds is None:
        pooled = np.unique(np.concatenate([positive, negative]))
        stride = max(1, len(pooled) // 2000)
        ends = [-np.inf, np.inf]  # a bound of nothing, so that there is always one
        thresholds = np.concatenate([pooled[::stride], ends])
    above = len(negative) - np.searchsorted(np.sort(negative), thresholds)
    below = np.searchsorted(np.sort(positive), thresholds)
    false_positives = _clopper_pearson(above, len(negative), level)
    false_negatives = _clopper_pearson(below, len(positive), level)
    return thresholds, [false_positives, false_negatives]


def _clopper_pearson(count: np.ndarray, total: int, level: float) -> np.ndarray:
    """The largest rate at which so few of `total` still have probability `level`."""
    # The Beta law takes no parameter of zero: `maximum` keeps it away where the bound is 1 anyway.
    bound = betainccinv(count + 1, np.maximum(total - count, 1), level)
    return np.where(count < total, bound, 1.0)


_MOST_FEATURES = 200  # outputs and products to which a covariance is still fitted


class _Form(NamedTuple):
    """What a Gaussian is fitted to, and whether both neighbours share its covariance."""

    features: Callable[[np.ndarray], np.ndarray]
    is_pooled: bool


def _scores(positive: np.ndarray, negative: np.ndarray) -> dict[str, Score]:
    """Log-likelihood ratios fitted to draws of both; non-finite rows are a symbol with its own frequency."""
    is_finite = [np.all(np.isfinite(x), axis=1) for x in (positive, negative)]
    # Half a draw is added, so that a symbol that was never seen is not taken for a proof.
    lost = [(np.sum(~ok) + 0.5) / (len(ok) + 1) for ok in is_finite]
    clean = [x[ok] for x, ok in zip((positive, negative), is_finite, strict=True)]
    # Log-likelihood ratios of whether an output is finite.
    if_lost = np.log(lost[0] / lost[1])
    if_kept = np.log((1 - lost[0]) / (1 - lost[1]))
    width = positive.shape[1]
    forms = {"linear": _Form(_as_it_is, is_pooled=True), "quadratic": _Form(_as_it_is, is_pooled=False)}
    if width * (width + 3) // 2 <= _MOST_FEATURES:
        forms["products"] = _Form(_products, is_pooled=False)

    def score(form: _Form) -> Score:
        ratio = None
        if min(map(len, clean)) > 1:  # a covariance takes two
            ratio = _gaussian_ratio(form.features(clean[0]), form.features(clean[1]), form.is_pooled)

        def of(x: np.ndarray) -> np.ndarray:
            ok = np.all(np.isfinite(x), axis=1)
            kept = np.where(ok[:, None], x, 0)
            values = ratio(form.features(kept)) if ratio else np.zeros(len(x))
            return np.where(ok, values + if_kept, if_lost)

        return of

    return {name: score(form) for name, form in forms.items()}


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


def _products(x: np.ndarray) -> np.ndarray:
    """(n, k) -> x and x_i x_j for i <= j, which shows an output that is a quadratic function of others."""
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, i] * x[:, j]], axis=1)


def _gaussian_ratio(positive: np.ndarray, negative: np.ndarray, is_pooled: bool) -> Score:
    """log N(x; m_1, V_1) - log N(x; m_0, V_0), with one covariance for both if `is_pooled`."""
    # All outputs are brought to one scale, as `_whitener` has one threshold for them.
    scale = np.maximum(np.std(np.concatenate([positive, negative]), axis=0), 1e-300)
    means = [np.mean(x, axis=0) for x in (positive, negative)]
    covariances = np.stack([np.atleast_2d(np.cov(x / scale, rowvar=False)) for x in (positive, negative)])
    if is_pooled:
        covariances[:] = covariances.mean(axis=0)
    roots = [_whitener(v) for v in covariances]

    def log_density(x: np.ndarray, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
        whitened = ((x - mean) / scale) @ root
        _, log_det = np.linalg.slogdet(root)
        return -np.sum(whitened**2, axis=1) / 2 + log_det

    return lambda x: log_density(x, means[0], roots[0]) - log_density(x, means[1], roots[1])


def _whitener(covariance: np.ndarray) -> np.ndarray:
    """V^{-1/2}; outputs that determine each other leave a nearly singular V, which is the point."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(np.maximum(values, 1e-13 * values.max() + 1e-300))
