"""Which public records a plan reads: two disjoint samples, drawn by a public key.

One gives the directions, the other what is measured along them: second moments of the records that chose the directions
would be too large.
"""

import jax
import numpy as np

from qexp_jax.data.records import Record, num_records, take
from qexp_jax.numerics.keys import generator

_CURVED = 1024
_HELD_OUT = 2048


def num_curved(num_public: int) -> int:
    """Public records whose gradients give the directions."""
    return max(1, min(_CURVED, num_public // 2))


def num_held_out(num_public: int) -> int:
    """Public records that are measured; a single record serves as both."""
    return min(_HELD_OUT, num_public - num_curved(num_public)) or 1


def looked_at(key: jax.Array, records: Record) -> Record:
    """What is read of public records: the samples that the key draws of them."""
    return take(records, _order(key, num_records(records)))


def samples(key: jax.Array, records: Record, weights: np.ndarray | None = None) -> tuple[Record, Record]:
    """For directions, and for what is measured; a single record serves as both.

    Args:
      key: public randomness.
      records: n public records, pytree with a leading axis.
      weights: (n,) by which they are drawn, in proportion; by default each at most once.
    """
    n = num_records(records)
    curved = num_curved(n)
    if weights is None or n == 1:
        order = _order(key, n)
        held_out = order[curved:] if n > 1 else order
        return take(records, order[:curved]), take(records, held_out)
    order = generator(key).permutation(n)
    # From halves of the records, so that the samples are disjoint though one of large weight is drawn several times.
    first, second = np.split(order, [max(curved, n // 2)])
    for_directions = _drawn(first, weights[first], curved)
    held_out = _drawn(second, weights[second], num_held_out(n))
    return take(records, for_directions), take(records, held_out)


def _drawn(index: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """As many of the index, each about as often as its weight says (systematic resampling)."""
    ends = np.cumsum(weights, dtype=np.float64)
    # From the middle of each share, since the index was permuted already: no more randomness is needed.
    points = (np.arange(size) + 0.5) / size * ends[-1]
    return index[np.searchsorted(ends, points)]


def _order(key: jax.Array, n: int) -> np.ndarray:
    """Both samples, one after the other, of equal weights."""
    return generator(key).permutation(n)[: num_curved(n) + _HELD_OUT]
