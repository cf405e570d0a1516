"""A tilt before the rounds (T9): what `weighting` derives, put to work.

    prepare    features, clip norm, share of the budget and cost, before anything private is read
    draw       one pass over the private units, one exact draw: all that the tilt knows of the data
    move       weights of the public records, and the model trained on them: post-processing

`fine_tune` does all three before its rounds, `tilt.weights` the first two for somebody who trains a model elsewhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments
from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.data.source import Source
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import one_pass
from qexp_jax.fine_tuning.one_pass import PassOptions
from qexp_jax.fine_tuning.progress import Announce
from qexp_jax.model import isolation
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.subspace import Subspace
from qexp_jax.private_pass import clipping, devices
from qexp_jax.private_pass.passes import Linearisation
from qexp_jax.quadratic import features as feature_maps
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic import tilted_training, weighting
from qexp_jax.quadratic.features import FeatureMap
from qexp_jax.quadratic.weighting import Tilt

_TUNED = "^axes$"
NUMBER = -1  # of its draw in a ledger, where rounds count from 0


class Preparation(NamedTuple):
    """What is known of a tilt before any private record is read; public.

    Attributes:
      features: phi, clipped to C.
      rows: (n, k) of the public records.
      given: whether the caller gave the features.
    """

    features: FeatureMap
    rows: np.ndarray
    given: bool

    @property
    def l2_clip_norm(self) -> float:
        """C."""
        return float(self.features.l2_clip_norm)


def prepare(
    key: jax.Array, params: Params, public: Record, feature_fn: Callable[..., Any] | None = None
) -> Preparation | None:
    """Features and clip norm of the public records; None where these do not vary.

    Args:
      key: public randomness.
      params: the pretrained parameters, for features of two arguments.
      public: public records.
      feature_fn: as `features` in `fine_tune`.

    Raises:
      ValueError: for features that are no function, mix records, or are not finite; or, if they are given, do not vary.
    """
    arguments.function("features", feature_fn)
    found = feature_maps.fit(key, public, params, feature_fn)
    if found is None and feature_fn is not None:
        raise ValueError("Expected features that vary among the public records, found none.")
    if found is None:
        return None
    check_features(found, public)
    rows = feature_maps.apply_each(found, public)
    if not np.all(np.isfinite(rows)):
        raise ValueError("Expected finite features of the public records, found some that are not.")
    l2_clip_norm = weighting.clip_norm(rows)
    found = found._replace(l2_clip_norm=jnp.asarray(l2_clip_norm))
    return Preparation(found, weighting.clipped(rows, l2_clip_norm), feature_fn is not None)


def check_features(features: FeatureMap, records: Record) -> None:
    """Raises unless features keep records of these shapes apart."""
    params = feature_maps.linear_params(features)
    isolation.check_loss(loss(features), subspaces.layout_of(params, _TUNED), params, records)


def loss(features: FeatureMap) -> LossFn:
    """The loss of one record, whose gradient is its features."""
    return feature_maps.linear_loss(features.raw)


def linearisation(preparation: Preparation) -> Linearisation:
    """Where the pass takes features as gradients: in k axes, with M = I."""
    params = feature_maps.linear_params(preparation.features)
    space = subspaces.full(params, where=_TUNED)
    identity = np.eye(space.dim, dtype=np.float32)
    return Linearisation(params, space, precisions.dense(identity), preparation.features.l2_clip_norm)


def rounding(preparation: Preparation) -> float:
    """The share of the clip norm that is kept for rounding."""
    return float(clipping.rounding(linearisation(preparation).precision))


def terms(preparation: Preparation, tilted: Tilt, noise_multiplier: float, steps: int) -> dict[str, Any]:
    """What a certificate says of a tilt.

    Args:
      preparation: public.
      tilted: what became of its draw.
      noise_multiplier: z.
      steps: of training, if the weights were accepted.
    """
    return {
        "noise_multiplier": noise_multiplier,
        "features": "given" if preparation.given else "default",
        "num_axes": preparation.rows.shape[1],
        "l2_clip_norm": preparation.l2_clip_norm,
        "rounding": rounding(preparation),
        "accepted": tilted.accepted,
        "effective_sample_size": tilted.effective_sample_size,
        "training_steps": steps if tilted.accepted else 0,
    }


def draw(
    key: jax.Array,
    noise_key: jax.Array,
    preparation: Preparation,
    units: Source,
    options: PassOptions,
    *,
    noise_multiplier: float,
) -> tuple[np.ndarray, float]:
    """The noisy sum of the private units' features (k,), and its noise's standard deviation.

    Args:
      key: of the release, by which a ledger knows it.
      noise_key: secret; the noise of this draw alone.
      preparation: public.
      units: in memory or a stream.
      options: with the loss of one unit whose gradient is its features.
      noise_multiplier: z.

    Formal guarantee: that of `Noise.draw` (T1, T9). A draw that a checkpoint holds is read, not drawn again.
    """
    where = linearisation(preparation)
    found = None if options.store is None else checkpoints.restore_draw(options.store)
    # One process of several may have been killed between entering the draw and saving it.
    found = _of_any_process(options, found, where.subspace.dim)
    if found is None:
        options.announce("tilt, private pass")
        noisy, std = one_pass.draw_of_pass(noise_key, options, where, units, noise_multiplier)
        one_pass.enter_draw(options, key, NUMBER, noisy)
        found = np.append(np.asarray(noisy, np.float64), float(std))
        if options.store is not None:
            checkpoints.save_draw(options.store, found)
    return found[:-1], float(found[-1])


def _of_any_process(options: PassOptions, found: np.ndarray | None, dim: int) -> np.ndarray | None:
    """What one process of a mesh has drawn and saved, in all of them."""
    blank = np.zeros(dim + 1) if found is None else found
    number, found = devices.furthest(options.mesh, int(found is not None), blank)
    return np.asarray(found, np.float64) if number else None


def move(
    key: jax.Array,
    preparation: Preparation,
    noisy_sum: np.ndarray,
    noise_std: float,
    loss_fn: LossFn,
    params: Params,
    space: Subspace,
    public: Record,
    *,
    num_units: int,
    steps: int,
    announce: Announce,
) -> tuple[Tilt, Params]:
    """The weights, and the model trained on the weighted public records; `params` itself where they were refused.

    Args:
      key: public randomness: the batches.
      preparation: public.
      noisy_sum: (k,) of `draw`.
      noise_std: of `draw`.
      loss_fn: loss of one record.
      params: pretrained, in working precision.
      space: what is tuned.
      public: public records.
      num_units: N.
      steps: of training.
      announce: who is told of stages.

    Formal guarantee: none of its own; post-processing of `noisy_sum` with public numbers.
    """
    tilted = weighting.fit(preparation.rows, noisy_sum / num_units, noise_std / num_units, num_units)
    if not tilted.accepted:
        return tilted, params
    announce("tilt, training")
    moved = tilted_training.train(key, loss_fn, params, space, public, tilted.weights, steps, announce)
    return tilted, moved
