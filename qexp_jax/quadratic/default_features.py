"""The default rule of features: what public records ask for, whatever pytree they are.

    numbers     pixels, measurements, flags: centred; the columns of a table each over their own spread, an image as a
                whole over its own
    tokens      a sequence of whole numbers, some beyond 255: the share of positions in each of 256 buckets
    labels      a leaf of one number a record, where there are at most four such leaves: an indicator of each value that
                public records have (whole numbers, flags), or of each quarter of them (real numbers)

Numbers and tokens are projected on their 64 leading principal axes. Each label's indicator multiplies these and a
constant, since most shifts differ from label to label; without labels the axes stand alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Record, is_key
from qexp_jax.numerics.compilation import FEW, compiled
from qexp_jax.quadratic.eigenspace import principal_axes
from qexp_jax.quadratic.raw_features import Raw, raw_each

_INPUT_AXES = 64
_MOST_COLUMNS = 4096  # beyond, columns are added up in groups with random signs
_BUCKETS = 256
_FIRST_TOKEN = 256  # whole numbers below it may be pixels
_MOST_LABEL_LEAVES = 4
_MOST_VALUES = 64  # of a label
_CONSTANT = 0.5  # beside input axes whose squares sum to one on average
_LEAST_SPREAD = 0.1  # of a column, in root mean squares of all columns' spreads
_LEAST_TOTAL = 1e-30  # so that what does not vary is divided by something
_HIGHEST = jax.lax.Precision.HIGHEST


def fit(key: jax.Array, sample: Record) -> tuple[Raw, Any]:
    """The rule's function and its numbers.

    Args:
      key: public randomness: which signs.
      sample: public records, pytree with a leading axis.

    Returns:
      The function, cached by what kinds of leaves there are, and its `arrays`.
    """
    leaves = jax.tree.leaves(sample)
    num_scalars = sum(_is_number(x) and _is_scalar(x) for x in leaves)
    # Beyond a few they are the columns of a table, one leaf each.
    may_be_labels = num_scalars <= _MOST_LABEL_LEAVES
    kinds = tuple(_kind(x, may_be_labels) for x in leaves)
    fitted = tuple(_FIT[kind](x) for kind, x in zip(kinds, leaves, strict=True))
    if not {"numbers", "tokens"} & set(kinds):
        return _crossed(kinds), (fitted, None, None)
    columns = raw_each(_columns_of(kinds), fitted, None, sample)
    signs = None
    if columns.shape[1] > _MOST_COLUMNS:
        signs = jax.random.rademacher(key, columns.shape[1:], jnp.float32)
        columns = _folded(columns, signs)
    return _crossed(kinds), (fitted, signs, _input_axes(columns, min(_INPUT_AXES, *columns.shape)))


@functools.partial(compiled, static_argnums=1, few=FEW)
def _input_axes(columns: jax.Array, rank: int) -> jax.Array:
    """The leading axes, all over one number, so that a constant weighs as much beside inputs of any units."""
    axes, spread = principal_axes(columns, rank)
    total = jnp.linalg.norm(spread)
    return axes / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def _is_number(leaf: Any) -> bool:
    """Real, or a flag."""
    if is_key(leaf) or not leaf.size or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return False
    return jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool


def _is_scalar(leaf: Any) -> bool:
    """One number a record."""
    return leaf.size == len(leaf)


def _kind(leaf: Any, may_be_label: bool) -> str:
    """What a leaf holds, of the public records alone, whose values may be branched on."""
    if not _is_number(leaf):
        return "nothing"
    values = np.asarray(leaf)
    if _is_scalar(leaf) and may_be_label:
        if values.min() == values.max():
            return "nothing"
        # Real numbers hardly repeat, so that an indicator of each value would say nothing.
        return "quarters" if jnp.issubdtype(leaf.dtype, jnp.floating) else "values"
    is_sequence = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)
    if is_sequence and values.min() >= 0 and values.max() >= _FIRST_TOKEN:
        return "tokens"
    return "numbers"


def _fit_numbers(leaf: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and one over the spread: of each column of a table, of an image as a whole."""
    values = np.asarray(leaf, np.float64)
    mean = values.mean(axis=0)
    spread = values.std(axis=0)
    whole = np.sqrt(np.mean(spread**2))
    is_table = values.ndim <= 2
    # Else a column that hardly varies in public would outweigh all others of a record in which it does; of an image,
    # pixels at the edge hardly vary, and over their own spreads would count as much as all others.
    divisors = np.maximum(spread, _LEAST_SPREAD * whole) if is_table else np.full_like(spread, whole)
    scale = np.divide(1, divisors, out=np.zeros_like(divisors), where=divisors > 0)
    # Over the spread of all columns together, so that no leaf weighs more for having more of them.
    total = np.sqrt(np.sum((spread * scale) ** 2))
    scale = scale / max(total, _LEAST_TOTAL)
    return mean.astype(np.float32), scale.astype(np.float32)


def _fit_tokens(leaf: Any) -> tuple[np.ndarray, np.float32]:
    """Mean shares of the buckets, and one over their spread."""
    tokens = np.asarray(leaf).reshape(len(leaf), -1) % _BUCKETS
    counts = np.stack([np.bincount(row, minlength=_BUCKETS) for row in tokens])
    shares = counts / tokens.shape[1]
    total = np.sqrt(np.sum(shares.var(axis=0)))
    scale = 1 / max(total, _LEAST_TOTAL)
    return shares.mean(axis=0).astype(np.float32), np.float32(scale)


def _fit_values(leaf: Any) -> tuple[np.ndarray, np.int32]:
    """The values that are told apart; of very many, their remainders."""
    values = np.unique(np.asarray(leaf).astype(np.int64))
    if len(values) > _MOST_VALUES:
        return np.arange(_MOST_VALUES, dtype=np.int32), np.int32(_MOST_VALUES)
    return values.astype(np.int32), np.int32(0)


def _fit_quarters(leaf: Any) -> np.ndarray:
    """The edges between them (3,)."""
    edges = np.quantile(np.asarray(leaf, np.float64), [0.25, 0.5, 0.75])
    return edges.astype(np.float32)


_FIT: dict[str, Callable[[Any], Any]] = {
    "numbers": _fit_numbers,
    "tokens": _fit_tokens,
    "values": _fit_values,
    "quarters": _fit_quarters,
    "nothing": lambda leaf: (),
}


def _numbers(fitted: tuple[jax.Array, jax.Array], leaf: jax.Array) -> jax.Array:
    """(size,), centred and over the spread."""
    mean, scale = fitted
    if leaf.shape != mean.shape:
        # Of a record of another shape nothing is said.
        return jnp.zeros(mean.size)
    return ((leaf.astype(jnp.float32) - mean) * scale).ravel()


def _tokens(fitted: tuple[jax.Array, jax.Array], leaf: jax.Array) -> jax.Array:
    """(256,) shares of the buckets, centred and over the spread."""
    mean, scale = fitted
    is_in_bucket = leaf.reshape(-1, 1) % _BUCKETS == jnp.arange(_BUCKETS)
    shares = jnp.mean(is_in_bucket, axis=0, dtype=jnp.float32)
    return (shares - mean) * scale


def _values(fitted: tuple[jax.Array, jax.Array], leaf: jax.Array) -> jax.Array:
    """An indicator of each value."""
    values, modulus = fitted
    value = leaf.ravel()[0].astype(jnp.int32)
    # The modulus, 0 where values are few, is traced: one function serves all rules of the same kinds.
    told_apart = jnp.where(modulus > 0, value % jnp.maximum(modulus, 1), value)
    return (told_apart == values).astype(jnp.float32)


def _quarters(edges: jax.Array, leaf: jax.Array) -> jax.Array:
    """An indicator of each quarter, (4,)."""
    value = leaf.ravel()[0].astype(jnp.float32)
    quarter = jnp.sum(value > edges)
    return (quarter == jnp.arange(4)).astype(jnp.float32)


@functools.lru_cache(maxsize=64)
def _columns_of(kinds: tuple[str, ...]) -> Raw:
    """All numbers of a record in one row."""

    def columns(fitted, params, record):
        parts = [jnp.zeros(0)]
        for kind, numbers, leaf in zip(kinds, fitted, jax.tree.leaves(record), strict=True):
            if kind == "numbers":
                parts.append(_numbers(numbers, leaf))
            elif kind == "tokens":
                parts.append(_tokens(numbers, leaf))
        return jnp.concatenate(parts)

    return columns


def _folded(columns: jax.Array, signs: jax.Array) -> jax.Array:
    """Groups of columns added up with random signs, (..., D) -> (..., 4096): a count-sketch."""
    signed = columns * signs
    short = -signed.shape[-1] % _MOST_COLUMNS
    padded = jnp.pad(signed, [(0, 0)] * (signed.ndim - 1) + [(0, short)])
    return jnp.sum(padded.reshape(*signed.shape[:-1], -1, _MOST_COLUMNS), axis=-2)


@functools.lru_cache(maxsize=64)
def _crossed(kinds: tuple[str, ...]) -> Raw:
    """Input axes and a constant, times each label's indicator."""

    def raw(arrays, params, record):
        fitted, signs, axes = arrays
        inputs = jnp.zeros(0)
        if axes is not None:
            columns = _columns_of(kinds)(fitted, params, record)
            if signs is not None:
                columns = _folded(columns, signs)
            inputs = jnp.matmul(columns, axes, precision=_HIGHEST)
        labels = []
        for kind, numbers, leaf in zip(kinds, fitted, jax.tree.leaves(record), strict=True):
            if kind == "values":
                labels.append(_values(numbers, leaf))
            elif kind == "quarters":
                labels.append(_quarters(numbers, leaf))
        if not labels:
            return inputs
        row = jnp.append(inputs, _CONSTANT)
        return jnp.concatenate([jnp.outer(label, row).ravel() for label in labels])

    return raw
