"""Features of records, whatever pytree they are: a public linear map of what the public records look like.

`tilt` releases one private mean of features and reweights the public records by it. A good feature says in few numbers
what a new population changes: how its inputs look, how often each label occurs, and how the inputs *of each label*
look. One rule makes them of public records alone (`default_features`).

What it gives, or what a function of the caller's own returns, is projected on its leading principal axes, each divided
by the square root of its spread, halfway between raw and whitened: so axes of little public variance cost little noise,
and still count.

Nothing here sees a private record; the map is applied to them in the private pass. The rule is ours.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, chunks, num_records, take
from qexp_jax.numerics.compilation import FEW, compiled
from qexp_jax.numerics.keys import generator
from qexp_jax.quadratic import default_features
from qexp_jax.quadratic.eigenspace import principal_axes
from qexp_jax.quadratic.raw_features import Raw, at_a_time, of_function, raw_each, takes_params

NUM_AXES = 64  # of a map; at 1000 units and epsilon 1 noise hides more
_LEAST_SPREAD = 1e-6  # of an axis, over the largest: below it there is rounding alone
_SAMPLE = 4096  # public records that axes are fitted to
_HIGHEST = jax.lax.Precision.HIGHEST


class FeatureMap(NamedTuple):
    """A public map from a record to R^k, or from parameters and a record.

    Attributes:
      raw: `(arrays, params, record) -> (q,)`, cached, so that equal rules compile once.
      arrays: its numbers, a pytree.
      center: (q,) public mean of what `raw` gives.
      axes: (q, k) leading axes, each over the square root of its spread.
      params: at which activations are taken; none where the features are of the record alone.
      l2_clip_norm: C, to which each record's features are clipped, so that those of a unit are means of as many
        clipped ones as it has records, as the public ones are.
    """

    raw: Raw
    arrays: Any
    center: jax.Array
    axes: jax.Array
    params: Params
    l2_clip_norm: jax.Array | float = float("inf")


def fit(
    key: jax.Array, public: Record, params: Params, features: Callable[..., Any] | None = None
) -> FeatureMap | None:
    """The map that public records ask for; None where nothing varies among them, or nothing is a real number.

    Args:
      key: public randomness: which records, which signs.
      public: public records, pytree with a leading axis.
      params: the pretrained parameters, for `features` of two arguments.
      features: `(record) -> arrays` or `(params, record) -> arrays`, in place of the default rule.

    Raises:
      ValueError: if features are not finite.
    """
    order = generator(key).permutation(num_records(public))
    sample = take(public, order[:_SAMPLE])
    if features is None:
        raw, arrays = default_features.fit(key, sample)
    else:
        raw = of_function(features)
        arrays = ()
    if features is None or not takes_params(features):
        params = ()
    if not jax.eval_shape(lambda records: raw(arrays, params, take(records, 0)), sample).size:
        return None
    rows = raw_each(raw, arrays, params, sample)
    center, basis, spread = jax.device_get(_centred_axes(rows, min(NUM_AXES, *rows.shape)))
    largest = float(np.max(spread))  # public, so it may be branched on
    if not np.isfinite(largest):
        raise ValueError("Expected finite features of the public records, found some that are not.")
    if largest <= 0:
        return None
    kept = spread > _LEAST_SPREAD * largest
    axes = basis[:, kept] / np.sqrt(spread[kept])
    on_device = jax.device_put((center, axes))
    return FeatureMap(raw=raw, arrays=arrays, center=on_device[0], axes=on_device[1], params=params)


@functools.partial(compiled, static_argnums=1, few=FEW)
def _centred_axes(rows: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean of rows (n, q), their leading principal axes (q, rank), and the spreads of these."""
    center = jnp.mean(rows, axis=0)
    return center, *principal_axes(rows - center, rank)


def apply(features: FeatureMap, record: Record) -> jax.Array:
    """phi (k,) of one record, clipped. What another shape makes of other length counts as the average, 0."""
    raw = features.raw(features.arrays, features.params, record)
    if raw.shape != features.center.shape:
        return jnp.zeros(features.axes.shape[1], features.axes.dtype)
    row = jnp.matmul(raw - features.center, features.axes, precision=_HIGHEST)
    norm = jnp.maximum(jnp.linalg.norm(row), jnp.finfo(row.dtype).tiny)
    return row * jnp.minimum(1, features.l2_clip_norm / norm)


def apply_each(features: FeatureMap, records: Record) -> np.ndarray:
    """phi (n, k) of n records, on the host."""
    numbers = tuple(features[1:])
    rows = []
    # One length for all chunks, so that one program takes them; the last one is padded.
    for part, count in chunks(records, _SAMPLE):
        found = np.asarray(_apply_each(features.raw, numbers, part))
        rows.append(found[:count])
    return np.concatenate(rows)


@functools.partial(compiled, static_argnums=0)
def _apply_each(raw: Raw, numbers: tuple[Any, ...], records: Record) -> jax.Array:
    features = FeatureMap(raw, *numbers)
    return jax.lax.map(lambda record: apply(features, record), records, batch_size=at_a_time(records))


@functools.lru_cache(maxsize=64)
def linear_loss(raw: Raw) -> LossFn:
    """The loss <axes, phi(record)>, whose gradient by `axes` (k,) is phi: so a mean of features is a mean gradient.

    Its parameters are those of `linear_params`.
    """

    def loss(params, record):
        features = FeatureMap(raw, *params["map"])
        return jnp.vdot(params["axes"], apply(features, record), precision=_HIGHEST)

    return loss


def linear_params(features: FeatureMap) -> Params:
    """Where `linear_loss` is differentiated; only `axes` is tuned."""
    return {"axes": np.zeros(features.axes.shape[1], features.axes.dtype), "map": tuple(features[1:])}
