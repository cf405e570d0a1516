"""Selective pretraining: a private classifier finds the public records that look private; they are trained on again."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    SelfComposedDpEvent,
    calibrate_dp_mechanism,
)
from dp_accounting.pld import PLDAccountant

from experiments.baselines import dp_sgd
from experiments.baselines.dp_sgd import Settings
from experiments.data.splits import Records, select, standardise
from qexp_jax import privacy


class Selection(NamedTuple):
    """Hyperparameters.

    Attributes:
      descent: of DP-SGD on the private records.
      share: in (0, 1), of the squared mu, for the classifier.
      fraction: in (0, 1], of the public records, that is trained on once more.
      classifier_steps: full-batch noisy steps of the classifier.
      classifier_length: as `Settings.length`, of the classifier, whose features are about a unit long.
    """

    descent: Settings
    share: float
    fraction: float
    classifier_steps: int = 10
    classifier_length: float = 20.0


def selective_pretraining(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    public: Records,
    *,
    settings: Selection,
    train_on_public: Callable[[Any, Records], Any],
    epsilon: float,
    delta: float,
) -> Any:
    """Trains on the public records that a private domain classifier ranks first, then on the private ones.

    Yu et al., arXiv:2305.13865. Simplified: the paper pretrains a small language model from scratch on what is
    selected, while here the pretrained model is trained on it once more; its classifier is a network for text, while
    here it is logistic regression on standardised inputs and labels, of the private records against as many public.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level: `noise_multipliers` composes classifier and
    DP-SGD. The private records' number is not protected, as in all baselines.

    Args:
      seed: of sampling and noise.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      public: records, as the private ones.
      settings: hyperparameters.
      train_on_public: `(params, records) -> params`, a few epochs of AdamW without privacy.
      epsilon: > 0.
      delta: in (0, 1).
    """
    of_classifier, of_descent = noise_multipliers(epsilon, delta, settings)
    scores = domain_scores(seed, private, public, settings, of_classifier)
    chosen = np.argsort(-scores, kind="stable")[: math.ceil(settings.fraction * len(scores))]
    params = train_on_public(params, select(public, chosen))
    return dp_sgd.descend(seed, loss_fn, params, private, settings=settings.descent, sigma=of_descent)


def domain_scores(seed: int, private: Records, public: Records, settings: Selection, sigma: float) -> np.ndarray:
    """How private each public record (M,) looks to a logistic regression, which is `classifier_event`-DP."""
    rng = np.random.default_rng([seed, 2])
    fresh = int(rng.integers(2**31))  # of the classifier: with the seed of DP-SGD its noise would be known in part
    count = len(private["label"])
    negatives = rng.choice(len(public["label"]), min(count, len(public["label"])), replace=False)
    rows = domain_features(public, private)
    of_public = domain_features(public, public)
    records = {
        "x": np.concatenate([rows, of_public[negatives]]),
        "label": np.repeat(np.array([1, 0], np.int32), [count, len(negatives)]),
    }
    start = {"params": {"head": {"kernel": jnp.zeros((rows.shape[1], 1)), "bias": jnp.zeros(1)}}}
    descent = Settings(1.0, settings.classifier_steps, settings.classifier_length, 1.0)
    found = dp_sgd.descend(fresh, _domain_loss, start, records, settings=descent, sigma=sigma)
    return of_public @ np.asarray(found["params"]["head"]["kernel"])[:, 0]


def domain_features(public: Records, records: Records) -> np.ndarray:
    """Rows (n, p): inputs in units of the public records' spread, typically a unit long, and one-hot labels."""
    flat = {
        name: part["x"].reshape(len(part["label"]), -1) for name, part in {"public": public, "own": records}.items()
    }
    (inputs,) = standardise(flat["public"], flat["own"])
    classes = np.arange(public["label"].max() + 1)  # of open data: a label that only private records have is none
    one_hot = records["label"][:, None] == classes
    return np.concatenate([inputs / math.sqrt(inputs.shape[1]), one_hot], axis=1).astype(np.float32)


def _domain_loss(params: Any, record: Any) -> jax.Array:
    head = params["params"]["head"]
    logit = record["x"] @ head["kernel"][:, 0] + head["bias"][0]
    return optax.sigmoid_binary_cross_entropy(logit, record["label"])


def noise_multipliers(epsilon: float, delta: float, settings: Selection) -> tuple[float, float]:
    """Noise on unit-norm sums, of the classifier and of DP-SGD, which together are (epsilon, delta)-DP.

    The classifier has the share of the mu^2 that Gaussian releases would have; DP-SGD's is calibrated to what is left.
    """
    if not 0 < settings.share < 1:
        raise ValueError(f"Expected a share between 0 and 1, found {settings.share=}.")
    mu = math.sqrt(settings.share) * privacy.mu_from_budget(epsilon, delta)
    of_classifier = math.sqrt(settings.classifier_steps) / mu
    sampling_prob, steps, _, _ = settings.descent
    calibrated = dp_sgd.on_disk(_calibrated)
    of_descent = calibrated(epsilon, delta, settings.classifier_steps, of_classifier, sampling_prob, steps)
    return of_classifier, of_descent


def composed_event(settings: Selection, of_classifier: float, of_descent: float) -> DpEvent:
    """All that is released."""
    classifier = SelfComposedDpEvent(GaussianDpEvent(of_classifier), settings.classifier_steps)
    return ComposedDpEvent([classifier, dp_sgd.privacy_event(settings.descent, of_descent)])


def _calibrated(
    epsilon: float, delta: float, classifier_steps: int, of_classifier: float, sampling_prob: float, steps: int
) -> float:
    settings = Selection(Settings(sampling_prob, steps, 1.0, 1.0), 0.5, 1.0, classifier_steps)
    return calibrate_dp_mechanism(
        lambda: PLDAccountant(NeighboringRelation.REPLACE_SPECIAL),
        lambda sigma: composed_event(settings, of_classifier, sigma),
        epsilon,
        delta,
    )
