"""Sums of integers in two 32-bit words: exact, the same in any order and on any devices, on hardware without 64 bits.

A float32 sum forgets: near a power of two one term decides whether all later ones are rounded away, so that one unit
moves a long sum by more than its own size (Casacuberta et al., arXiv:2207.10635). Integers do not.

    value = high * 2^20 + low,      0 <= low < 2^20
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BITS = 20
_BASE = 2**BITS
_TOGETHER = 2**8  # numbers up to 2^22 that one sum in 32 bits takes
_LOW_WORDS = 2**10  # low words that one does


class Words(NamedTuple):
    """Integers of absolute value below 2^51.

    Attributes:
      high: int32.
      low: int32 in [0, 2^20).
    """

    high: jax.Array
    low: jax.Array


def zeros(dim: int) -> Words:
    """`dim` zeros, on the host until something is added to them."""
    none: Any = np.zeros(dim, np.int32)
    return Words(none, none)


def normalised(words: Words) -> Words:
    """The same integers with the low word in its range; sums of up to 2^11 low words are taken."""
    return Words(words.high + (words.low >> BITS), words.low & (_BASE - 1))


def add(a: Words, b: Words) -> Words:
    """a + b."""
    return normalised(Words(a.high + b.high, a.low + b.low))


def total(numbers: jax.Array) -> Words:
    """The sum over the leading axis of int32 numbers (m, k), each at most 2^22 in absolute value."""
    count = len(numbers)
    if count <= _TOGETHER:
        return normalised(Words(jnp.zeros_like(numbers[0]), _sum(numbers)))
    # Each sum of so many numbers just fits into 32 bits; from there on in two words.
    whole = count // _TOGETHER * _TOGETHER
    sums = _sum(numbers[:whole].reshape(-1, _TOGETHER, *numbers.shape[1:]), axis=1)
    found = _total_of_words(_split(sums))
    return found if whole == count else add(found, total(numbers[whole:]))


def total_of_floats(numbers: jax.Array) -> Words:
    """The sum over the leading axis of floats (m, k), each below 2^31 and rounded to a whole number."""
    return _total_of_words(_split(jnp.rint(numbers).astype(jnp.int32)))


def _sum(numbers: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.sum(numbers, axis=axis, dtype=jnp.int32)  # also where 64 bits are enabled


def _split(numbers: jax.Array) -> Words:
    # The shift keeps the sign and rounds down, so that the low word is never negative.
    return Words(numbers >> BITS, numbers & (_BASE - 1))


def _total_of_words(words: Words) -> Words:
    """Over the leading axis; as many low words at a time as 32 bits hold."""
    count = len(words.low)
    if count > _LOW_WORDS:
        first = Words(*(x[:_LOW_WORDS] for x in words))
        others = Words(*(x[_LOW_WORDS:] for x in words))
        return add(_total_of_words(first), _total_of_words(others))
    return normalised(Words(*map(_sum, words)))


def from_float(x: jax.Array) -> Words:
    """Floats of absolute value below 2^50, each rounded to a whole number."""
    x = jnp.rint(x)
    # Both words are exact: a division by a power of two rounds nothing, nor does the difference.
    high = jnp.floor(x / _BASE)
    return Words(high.astype(jnp.int32), (x - high * _BASE).astype(jnp.int32))


def to_float(words: Words, dtype: np.dtype) -> jax.Array:
    """The floats next to the integers."""
    return words.high.astype(dtype) * _BASE + words.low.astype(dtype)


def to_int64(words: Words) -> np.ndarray:
    """On the host."""
    return np.asarray(words.high, np.int64) * _BASE + np.asarray(words.low, np.int64)
