"""Membership inference: attacks on shadow models, how well they do, and what mu-GDP allows.

LiRA (Carlini et al., arXiv:2112.03570) is the likelihood ratio of a record's logit-scaled confidence under Gaussians
fitted to the models with and without it; the other attack is a threshold on the loss, which needs no shadow model.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import norm

from experiments.benchmark import models
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records

RATES = {"tpr_at_01": 1e-3, "tpr_at_1": 1e-2}  # false positives: .1 % and 1 %
SCORES = ("auc", *RATES)


class Game(NamedTuple):
    """Shadow models of one method.

    Attributes:
      included: (shadows, pool) bool, the coins.
      confidence: (shadows, pool) logit-scaled confidence in the true label.
      metric: mean test metric.
    """

    included: np.ndarray
    confidence: np.ndarray
    metric: float


def play(pretrained: Pretrained, pool: Records, included: np.ndarray, stacked: Any) -> Game:
    """Evaluates the shadow models on pool and test records.

    Args:
      pretrained: the task, and the model whose parameters these are.
      pool: records that a shadow model may have seen.
      included: (shadows, pool) bool, those that it has.
      stacked: parameters of the shadow models along a leading axis.
    """
    model = pretrained.model
    each = [jax.tree.map(lambda x, s=s: x[s], stacked) for s in range(len(included))]
    logits = np.stack([np.asarray(model.logits(params, pool["x"]), np.float64) for params in each])
    test = pretrained.split.test
    metrics = [models.evaluate(model, params, test, pretrained.task.metric) for params in each]
    return Game(included, confidence(logits, np.asarray(pool["label"])), float(np.mean(metrics)))


def confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p - log(1 - p) of the true label, without overflow; (..., n, outputs) and (n,) -> (..., n)."""
    if logits.shape[-1] == 1:
        return (2 * labels - 1) * logits[..., 0]
    true = np.take_along_axis(logits, np.broadcast_to(labels, logits.shape[:-1])[..., None], axis=-1)[..., 0]
    others = np.where(np.arange(logits.shape[-1]) == labels[:, None], -np.inf, logits)
    return true - np.logaddexp.reduce(others, axis=-1)


def lira(game: Game) -> np.ndarray:
    """(shadows, pool) log-likelihood ratios of membership, each model attacked with all others."""
    scores = np.empty_like(game.confidence)
    for target in range(len(scores)):
        others = np.delete(np.arange(len(scores)), target)
        seen = game.confidence[others]
        inside = game.included[others]
        with_it, without = (_masked_mean(seen, mask) for mask in (inside, ~inside))
        variance = np.mean((seen - np.where(inside, with_it, without)) ** 2, axis=0)
        variance += 1e-3 * np.mean(variance)  # a record on which all models agree
        attacked = game.confidence[target]
        scores[target] = (attacked - without) ** 2 / (2 * variance) - (attacked - with_it) ** 2 / (2 * variance)
    return scores


def _masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Over the first axis; 0 where nothing is left."""
    return np.sum(values * mask, axis=0) / np.maximum(1, np.sum(mask, axis=0))


ATTACKS = {"lira": lira, "loss": lambda game: game.confidence}


def roc(scores: np.ndarray, included: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold; ties are one threshold."""
    order = np.argsort(-scores.ravel(), kind="stable")
    hits = included.ravel()[order]
    last = np.append(np.diff(scores.ravel()[order]) != 0, True)
    false, true = (np.append(0, np.cumsum(x)[last] / max(1, np.sum(x))) for x in (~hits, hits))
    return false, true


def summary(scores: np.ndarray, included: np.ndarray) -> np.ndarray:
    """`SCORES`: the AUC, and the true positive rate at each of `RATES`."""
    false, true = roc(scores, included)
    return np.array([np.trapezoid(true, false), *(true[false <= rate][-1] for rate in RATES.values())])


def bounds(mu: float) -> np.ndarray:
    """What mu-GDP allows of the same numbers."""
    return np.array([norm.cdf(mu / 2**0.5), *(norm.sf(norm.isf(rate) - mu) for rate in RATES.values())])


def intervals(scores: np.ndarray, included: np.ndarray, resamples: int = 200) -> np.ndarray:
    """2.5 and 97.5 % quantiles (2, scores) over attacked models drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(scores), size=(resamples, len(scores)))
    return np.quantile([summary(scores[i], included[i]) for i in drawn], [0.025, 0.975], axis=0)
