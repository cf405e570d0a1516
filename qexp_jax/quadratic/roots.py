"""What a form of the precision H = R R^T computes: its root R, as functions of its numbers.

The functions stand at module level, so that equal precisions compile once. Norms of whitened vectors are bounded from
above, rounding included: clipping may take too much of a gradient, but never leaves more than C.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.model.factored_gradients import BLOCK, Rows, sum_of_squares
from qexp_jax.numerics.rounding import of_sum


class Root(NamedTuple):
    """A precision's functions of (arrays, argument).

    Attributes:
      whiten: R^{-1} x.
      color: R^{-T} x.
      uncolor: R^T x.
      coordinates: of (arrays, rows, scale), see `precision.coordinates`.
      shape: noise N(0, I) -> noise in coordinates whose whitened covariance is I.
      whiten_sum: coordinates -> whitened vector.
      spread: see `precision.spread`.
    """

    whiten: Callable[[Any, jax.Array], jax.Array]
    color: Callable[[Any, jax.Array], jax.Array]
    uncolor: Callable[[Any, jax.Array], jax.Array]
    coordinates: Callable[[Any, Rows, jax.Array | float], tuple[Rows, jax.Array]]
    shape: Callable[[Any, jax.Array], jax.Array]
    whiten_sum: Callable[[Any, jax.Array], jax.Array]
    spread: Callable[[Any], tuple[jax.Array, jax.Array]]


def with_norms(vectors: jax.Array, scale: jax.Array | float) -> tuple[Rows, jax.Array]:
    """Coordinates (m, c) that are whitened already, and bounds (m,) on `scale` times their norms."""
    length = vectors.shape[1]
    error = 2 * of_sum(length, BLOCK)
    # Scaled first: the square of a small or large gradient would leave float32.
    scaled = sum_of_squares(vectors * opaque(scale))
    return [vectors], jnp.sqrt((1 + error) * scaled + lost(length))


def opaque(scale: jax.Array | float) -> jax.Array:
    """Not a constant to the compiler, which would take it out of the squares that it keeps within float32."""
    return jax.lax.optimization_barrier(jnp.asarray(scale))


def lost(num_terms: int) -> float:
    """What squares may lose that are too small for float32."""
    return 2 * num_terms * float(np.finfo(np.float32).tiny)


def as_it_is(_: Any, x: jax.Array) -> jax.Array:
    """Of coordinates that are whitened vectors."""
    return x


def of_one_size(arrays: Any) -> tuple[jax.Array, jax.Array]:
    """The spread of coordinates that are whitened, up to a rotation."""
    one = jnp.ones((), jax.tree.leaves(arrays)[0].dtype)
    return one, one
