"""Vectors x (k,) in two parts: along r orthonormal directions U, and orthogonal to all of them.

    x = U^T a + b,    a = U x (r,),    b (k,) with U b = 0

What multiplies each part by a number of its own, or adds vectors, needs no product with U: a vector is
decomposed once and recomposed once. Arrays of length r + 1 hold a number for each direction and one for b.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.quadratic.directions import Directions, along, combine

_HIGHEST = jax.lax.Precision.HIGHEST


class Components(NamedTuple):
    """A vector in two parts.

    Attributes:
      leading: a (r,), its coordinates along the directions.
      others: b (k,), what is left of it.
    """

    leading: jax.Array
    others: jax.Array


def decompose(directions: Directions | jax.Array, x: jax.Array) -> Components:
    """Takes x (k,) apart."""
    leading = along(directions, x)
    return Components(leading, x - combine(directions, leading))


def recompose(directions: Directions | jax.Array, x: Components) -> jax.Array:
    """The vector (k,) again."""
    return combine(directions, x.leading) + x.others


def scaled(factors: jax.Array, x: Components) -> Components:
    """Each part times its own of the `factors` (r + 1,)."""
    return Components(factors[:-1] * x.leading, factors[-1] * x.others)


def products(x: Components, y: Components) -> jax.Array:
    """x_j y_j of the leading coordinates, and the sum over all others, (r + 1,)."""
    of_others = jnp.vdot(x.others, y.others, precision=_HIGHEST)
    return jnp.append(x.leading * y.leading, of_others)


def scale(directions: Directions | jax.Array, factors: jax.Array, x: jax.Array) -> jax.Array:
    """`scaled` of a vector x (k,) as a vector, in O(k r): what lies outside the directions is never formed."""
    rest = factors[-1]
    change = along(directions, x) * (factors[:-1] - rest)
    return combine(directions, change) + rest * x
