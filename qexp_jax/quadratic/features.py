"""Default features of records, whatever pytree they are: a public linear map of what the public records look like.

`tilt` releases one private mean of features and reweights the public records by it. A good feature says in few numbers
what a new population changes: how its inputs look, how often each label occurs, and how the inputs *of each label*
look. One rule makes them of public records alone:

    numbers     pixels, measurements, flags: centred; the columns of a table each over their own spread, an image as a
                whole over its own
    tokens      a sequence of whole numbers, some beyond 255: the share of positions in each of 256 buckets
    labels      a leaf of one number a record, where there are at most four such leaves: an indicator of each value that
                public records have (whole numbers, flags), or of each quarter of them (real numbers)

Numbers and tokens are projected on their 64 leading principal axes. Each label's indicator multiplies these and a
constant, since most shifts differ from label to label; without labels the axes stand alone. What results, or what a
function of the caller's own returns, is projected on its leading principal axes, each divided by the square root of its
spread, halfway between raw and whitened: so axes of little public variance cost little noise, and still count.

Nothing here sees a private record; the map is applied to them in the private pass. The rule is ours.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, chunks, is_key, num_records, take
from qexp_jax.numerics.keys import generator
from qexp_jax.quadratic.curvature import leading_basis

NUM_AXES = 64  # of a map; at 1000 units and epsilon 1 noise hides more
_SAMPLE = 4096  # public records that axes are fitted to
_INPUT_AXES = 64
_MOST_COLUMNS = 4096  # beyond, columns are added up in groups with random signs
_BUCKETS, _FIRST_TOKEN = 256, 256
_MOST_LABEL_LEAVES, _MOST_VALUES = 4, 64
_CONSTANT = 0.5  # beside input axes whose squares sum to one on average
_LEAST_SPREAD = 0.1  # of a column, in root mean squares of all columns' spreads
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

    raw: Callable[[Any, Params, Record], jax.Array]
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
      features: `(record) -> arrays` or `(params, record) -> arrays`, in place of the rule above.

    Raises:
      ValueError: if features are not finite.
    """
    order = generator(key).permutation(num_records(public))
    sample = take(public, order[:_SAMPLE])
    raw, arrays = _default(key, sample) if features is None else (_of_function(features), ())
    params = params if features is not None and _takes_params(features) else ()
    if not jax.eval_shape(raw, arrays, params, take(sample, 0)).size:
        return None
    rows = _raw_each(raw, arrays, params, sample)
    center = jnp.mean(rows, axis=0)
    basis, spread = _leading(rows - center, min(NUM_AXES, *rows.shape))
    largest = float(jnp.max(spread))
    if not np.isfinite(largest):
        raise ValueError("Expected finite features of the public records, found some that are not.")
    if largest <= 0:
        return None
    kept = np.asarray(spread) > 1e-6 * largest
    return FeatureMap(raw, arrays, center, (basis / jnp.sqrt(spread))[:, kept], params)


def apply(features: FeatureMap, record: Record) -> jax.Array:
    """phi (k,) of one record, clipped. What another shape makes of other length counts as the average, 0."""
    raw = features.raw(features.arrays, features.params, record)
    if raw.shape != features.center.shape:
        return jnp.zeros(features.axes.shape[1], features.axes.dtype)
    row = jnp.matmul(raw - features.center, features.axes, precision=_HIGHEST)
    return row * jnp.minimum(1, features.l2_clip_norm / jnp.maximum(jnp.linalg.norm(row), jnp.finfo(row.dtype).tiny))


def apply_each(features: FeatureMap, records: Record) -> np.ndarray:
    """phi (n, k) of n records, on the host."""
    parts = chunks(records, _SAMPLE)
    rows = [np.asarray(_apply_each(features.raw, tuple(features[1:]), part))[:count] for part, count in parts]
    return np.concatenate(rows)


@functools.partial(jax.jit, static_argnums=0)
def _apply_each(raw, numbers, records):
    features = FeatureMap(raw, *numbers)
    return jax.lax.map(lambda record: apply(features, record), records, batch_size=_at_a_time(records))


@functools.lru_cache(maxsize=64)
def linear_loss(raw: Callable[[Any, Params, Record], jax.Array]) -> LossFn:
    """The loss <axes, phi(record)>, whose gradient by `axes` (k,) is phi: so a mean of features is a mean gradient.

    Its parameters are those of `linear_params`.
    """

    def loss(params, record):
        return jnp.vdot(params["axes"], apply(FeatureMap(raw, *params["map"]), record), precision=_HIGHEST)

    return loss


def linear_params(features: FeatureMap) -> Params:
    """Where `linear_loss` is differentiated; only `axes` is tuned."""
    return {"axes": jnp.zeros(features.axes.shape[1], features.axes.dtype), "map": tuple(features[1:])}


@functools.partial(jax.jit, static_argnums=0)
def _raw_each(raw, arrays, params, records):
    return jax.lax.map(lambda record: raw(arrays, params, record), records, batch_size=_at_a_time(records))


def _at_a_time(records):
    return min(256, num_records(records))


@functools.partial(jax.jit, static_argnums=1)
def _leading(rows, rank):
    """Leading principal axes (q, rank) of centred rows, and their spreads."""
    basis = leading_basis(rows, rank)
    return basis, jnp.sqrt(jnp.mean(jnp.matmul(rows, basis, precision=_HIGHEST) ** 2, axis=0))


# --- a function of the caller's own ---


def _takes_params(features):
    needed = [x for x in inspect.signature(features).parameters.values() if x.default is x.empty]
    return sum(x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD) for x in needed) > 1


@functools.lru_cache(maxsize=64)
def _of_function(features):
    takes_params = _takes_params(features)

    def raw(arrays, params, record):
        found = features(params, record) if takes_params else features(record)
        return jnp.concatenate([jnp.zeros(0), *(jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(found))])

    return raw


# --- the default rule ---


def _default(key, sample):
    """The rule's function and its numbers."""
    leaves = jax.tree.leaves(sample)
    scalars = sum(_is_number(x) and _is_scalar(x) for x in leaves)
    kinds = tuple(_kind(x, scalars <= _MOST_LABEL_LEAVES) for x in leaves)
    fitted = tuple(_FIT[kind](x) for kind, x in zip(kinds, leaves, strict=True))
    if not {"numbers", "tokens"} & set(kinds):
        return _crossed(kinds), (fitted, None, None)
    columns, signs = _raw_each(_columns_of(kinds), fitted, None, sample), None
    if columns.shape[1] > _MOST_COLUMNS:
        signs = jax.random.rademacher(key, columns.shape[1:], jnp.float32)
        columns = _folded(columns, signs)
    axes, spread = _leading(columns, min(_INPUT_AXES, *columns.shape))
    axes = axes / jnp.maximum(jnp.linalg.norm(spread), jnp.finfo(jnp.float32).tiny)
    return _crossed(kinds), (fitted, signs, axes)


def _is_number(leaf):
    """Real, or a flag."""
    if is_key(leaf) or not leaf.size or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return False
    return jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool


def _is_scalar(leaf):
    return leaf.size == len(leaf)


def _kind(leaf, may_be_label):
    """What a leaf holds, of the public records alone."""
    if not _is_number(leaf):
        return "nothing"
    values = np.asarray(leaf)
    if _is_scalar(leaf) and may_be_label:
        if values.min() == values.max():
            return "nothing"
        return "quarters" if jnp.issubdtype(leaf.dtype, jnp.floating) else "values"
    is_sequence = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)
    return "tokens" if is_sequence and values.min() >= 0 and values.max() >= _FIRST_TOKEN else "numbers"


def _fit_numbers(leaf):
    """Mean, and one over the spread: of each column of a table, of an image as a whole."""
    values = np.asarray(leaf, np.float64)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    whole = np.sqrt(np.mean(spread**2))
    spread = np.maximum(spread, _LEAST_SPREAD * whole) if values.ndim <= 2 else np.full_like(spread, whole)
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    total = np.sqrt(np.sum((values.std(axis=0) * scale) ** 2))
    return jnp.asarray(mean, jnp.float32), jnp.asarray(scale / max(total, 1e-30), jnp.float32)


def _fit_tokens(leaf):
    """Mean shares of the buckets, and one over their spread."""
    tokens = np.asarray(leaf).reshape(len(leaf), -1) % _BUCKETS
    shares = np.stack([np.bincount(row, minlength=_BUCKETS) for row in tokens]) / tokens.shape[1]
    total = np.sqrt(np.sum(shares.var(axis=0)))
    return jnp.asarray(shares.mean(axis=0), jnp.float32), jnp.asarray(1 / max(total, 1e-30), jnp.float32)


def _fit_values(leaf):
    """The values that are told apart; of very many, their remainders."""
    values = np.unique(np.asarray(leaf).astype(np.int64))
    if len(values) > _MOST_VALUES:
        return jnp.arange(_MOST_VALUES), jnp.asarray(_MOST_VALUES)
    return jnp.asarray(values, jnp.int32), jnp.asarray(0)


def _fit_quarters(leaf):
    return jnp.asarray(np.quantile(np.asarray(leaf, np.float64), [0.25, 0.5, 0.75]), jnp.float32)


_FIT: dict[str, Callable[[Any], Any]] = {
    "numbers": _fit_numbers,
    "tokens": _fit_tokens,
    "values": _fit_values,
    "quarters": _fit_quarters,
    "nothing": lambda leaf: (),
}


def _numbers(fitted, leaf):
    mean, scale = fitted
    if leaf.shape != mean.shape:  # of a record of another shape nothing is said
        return jnp.zeros(mean.size)
    return ((leaf.astype(jnp.float32) - mean) * scale).ravel()


def _tokens(fitted, leaf):
    mean, scale = fitted
    shares = jnp.mean(leaf.reshape(-1, 1) % _BUCKETS == jnp.arange(_BUCKETS), axis=0, dtype=jnp.float32)
    return (shares - mean) * scale


def _values(fitted, leaf):
    values, modulus = fitted
    value = leaf.ravel()[0].astype(jnp.int32)
    return (jnp.where(modulus > 0, value % jnp.maximum(modulus, 1), value) == values).astype(jnp.float32)


def _quarters(edges, leaf):
    quarter = jnp.sum(leaf.ravel()[0].astype(jnp.float32) > edges)
    return (quarter == jnp.arange(4)).astype(jnp.float32)


@functools.lru_cache(maxsize=64)
def _columns_of(kinds):
    """All numbers of a record in one row."""

    def columns(fitted, params, record):
        parts = [jnp.zeros(0)]
        for kind, numbers, leaf in zip(kinds, fitted, jax.tree.leaves(record), strict=True):
            if kind in ("numbers", "tokens"):
                parts.append((_numbers if kind == "numbers" else _tokens)(numbers, leaf))
        return jnp.concatenate(parts)

    return columns


def _folded(columns, signs):
    """Groups of columns added up with random signs, (..., D) -> (..., 4096): a count-sketch."""
    signed = columns * signs
    short = -signed.shape[-1] % _MOST_COLUMNS
    padded = jnp.pad(signed, [(0, 0)] * (signed.ndim - 1) + [(0, short)])
    return jnp.sum(padded.reshape(*signed.shape[:-1], -1, _MOST_COLUMNS), axis=-2)


@functools.lru_cache(maxsize=64)
def _crossed(kinds):
    """Input axes and a constant, times each label's indicator."""

    def raw(arrays, params, record):
        fitted, signs, axes = arrays
        inputs = jnp.zeros(0)
        if axes is not None:
            columns = _columns_of(kinds)(fitted, params, record)
            columns = columns if signs is None else _folded(columns, signs)
            inputs = jnp.matmul(columns, axes, precision=_HIGHEST)
        labels = [
            (_values if kind == "values" else _quarters)(numbers, leaf)
            for kind, numbers, leaf in zip(kinds, fitted, jax.tree.leaves(record), strict=True)
            if kind in ("values", "quarters")
        ]
        if not labels:
            return inputs
        row = jnp.append(inputs, _CONSTANT)
        return jnp.concatenate([jnp.outer(label, row).ravel() for label in labels])

    return raw
