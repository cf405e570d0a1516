"""The public second-order picture of a space, and what is kept of the releases so far.

All of it stands in whitened coordinates, and vectors of k are kept as their `components`. The leading r directions are
coordinates of their own; all others are one block, so that every array of length r + 1 holds r numbers and one more
that stands for each coordinate of the block. Noise meets the block's mean curvature, but a signal lies where the
curvature is high; for it the block counts with the curvature of the last leading direction (`signal_curvature`).

What a release adds to the `Posterior` is in `step_size.observe`; what it says of the private gradient is in
`empirical_bayes`, and of the private curvature in `secants`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.quadratic.components import Components, products
from qexp_jax.quadratic.directions import Directions


class CurvatureEstimate(NamedTuple):
    """The public second-order picture in whitened coordinates: r leading ones, then the block of all others.

    Attributes:
      directions: (r, k) orthonormal leading directions.
      curvature: (r + 1,) K.
      moments: (r + 1,) v, second moments of one unit's clipped whitened gradient.
      dims: (r + 1,) how many coordinates each entry stands for: 1, ..., 1, k - r.
      shifts: (m,) the prior's values of tau.
      log_prior: (m,) log of its weights, up to a constant.
    """

    directions: Directions | jax.Array
    curvature: jax.Array
    moments: jax.Array
    dims: jax.Array
    shifts: jax.Array
    log_prior: jax.Array


class Posterior(NamedTuple):
    """What the releases so far say of the private gradient at theta_0 and of the curvature along it.

    Attributes:
      gradients: released mean gradients, summed with the weights `left` over variance; 0 where never tuned.
      weights: (r + 1,) one over the variance of the initial gradient that they give; 0 where never tuned.
      left: (r + 1,) share of the initial gradient that is left after the flow so far.
      last: the latest released mean gradient.
      last_var: variance of its noise in each coordinate.
      followed: (r + 1,) multiples of it that were followed.
      slopes: (2, 2) sums over rounds of the regression of measured on public curvature, see
        `secants.curvature_ratio`.
      largest_ratio: (2,) the largest ratio that a passed minimum has shown; 0 where none was passed.
      times: (r + 1,) in how many rounds it was tuned.
      idle: (r + 1,) how many rounds have held it since; infinite where never tuned.
      recent: mean of the released mean gradients, the t-th of them with weight t.
      recent_var: (r + 1,) variance of its noise in each coordinate.
    """

    gradients: Components
    weights: jax.Array
    left: jax.Array
    last: Components
    last_var: jax.Array
    followed: jax.Array
    slopes: jax.Array
    largest_ratio: jax.Array
    times: jax.Array
    idle: jax.Array
    recent: Components
    recent_var: jax.Array


@jax.jit
def before_release(estimate: CurvatureEstimate) -> Posterior:
    """Nothing is known but the prior."""
    zeros = jnp.zeros_like(estimate.curvature)
    gradients = Components(zeros[:-1], jnp.zeros(estimate.directions.shape[1], zeros.dtype))
    slopes = jnp.zeros((2, 2), zeros.dtype)
    return Posterior(
        gradients=gradients,
        weights=zeros,
        left=zeros + 1,
        last=gradients,
        last_var=zeros[0],
        followed=zeros,
        slopes=slopes,
        largest_ratio=slopes[0],
        times=zeros,
        idle=zeros + jnp.inf,
        recent=gradients,
        recent_var=zeros,
    )


def signal_curvature(estimate: CurvatureEstimate) -> jax.Array:
    """(r + 1,): K, but for the block of all others the least leading one, where its signal lies."""
    return estimate.curvature.at[-1].set(estimate.curvature[:-1].min())


def energies(estimate: CurvatureEstimate, x: Components) -> jax.Array:
    """x_j^2 of the leading coordinates, and the mean square of the others, (r + 1,)."""
    squares = products(x, x)
    return squares.at[-1].divide(jnp.maximum(1, estimate.dims[-1]))


def in_two(x: jax.Array) -> jax.Array:
    """Summed over the leading entries, and the last, (r + 1,) -> (2,)."""
    return jnp.stack([jnp.sum(x[:-1]), x[-1]])


def of_two(pair: jax.Array, size: int) -> jax.Array:
    """The first for each leading entry, and the last, (2,) -> (size,)."""
    return jnp.append(jnp.full(size - 1, pair[0]), pair[1])
