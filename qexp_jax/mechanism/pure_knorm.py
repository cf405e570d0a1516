"""The K-norm gradient mechanism of the quadratic, of pure epsilon; see `pure`."""

import jax
import jax.numpy as jnp
from scipy.special import gammaincinv

from qexp_jax.data import arguments
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.mechanism.gaussian import Quadratic, protecting_key, release_step
from qexp_jax.privacy import accounting
from qexp_jax.quadratic.precision import uncolor


def knorm_draw(
    key: jax.Array, quadratic: Quadratic, l2_clip_norm: float, epsilon: float, relation: NeighboringRelation
) -> jax.Array:
    """One draw of the K-norm gradient mechanism, (k,).

    Args:
      key: secret, typed.
      quadratic: utility.
      l2_clip_norm: C.
      epsilon: in [1e-4, 1e4].
      relation: neighbouring relation.

    Formal guarantee: epsilon-DP, hence zCDP with rho = epsilon^2 / 2, for real arithmetic and ideal noise.

    References:
      Reimherr and Awan, arXiv:1905.09436.
    """
    total = quadratic.whitened_sum
    scale = jnp.asarray(_knorm_scale(l2_clip_norm, epsilon, relation), total.dtype)
    length_key, direction_key = jax.random.split(protecting_key(key, total, scale))
    # Gamma(k) as k exponentials: no rejection, the same time always.
    length = scale * jnp.sum(jax.random.exponential(length_key, total.shape, total.dtype))
    direction = jax.random.normal(direction_key, total.shape, total.dtype)
    noise = length * direction / jnp.linalg.norm(direction)
    return release_step(quadratic, total + noise)


def knorm_log_density(
    quadratic: Quadratic, w: jax.Array, l2_clip_norm: float, epsilon: float, relation: NeighboringRelation
) -> jax.Array:
    """Log density of `knorm_draw` at w, up to a public constant; **not private** at a release.

    Args:
      quadratic: utility.
      w: (k,).
      l2_clip_norm: C.
      epsilon: in [1e-4, 1e4].
      relation: neighbouring relation.
    """
    noise = quadratic.num_units * uncolor(quadratic.precision, w) + quadratic.whitened_sum
    return -jnp.linalg.norm(noise) / _knorm_scale(l2_clip_norm, epsilon, relation)


def knorm_expected_excess(
    dim: int, l2_clip_norm: float, epsilon: float, relation: NeighboringRelation, num_units: int
) -> float:
    """Mean excess of the quadratic loss per record that the noise costs: k (k+1) Delta^2 / (2 N^2 epsilon^2).

    Args:
      dim: k.
      l2_clip_norm: C.
      epsilon: in [1e-4, 1e4].
      relation: neighbouring relation.
      num_units: N, public.

    >>> round(knorm_expected_excess(10, 1.0, 1.0, NeighboringRelation.REPLACE_SPECIAL, 1000), 8)
    5.5e-05
    """
    dim = arguments.count("dim", dim)
    num_units = arguments.count("num_units", num_units)
    # k (k+1) is E[length^2] of Gamma(k).
    return dim * (dim + 1) * _knorm_scale(l2_clip_norm, epsilon, relation) ** 2 / (2 * num_units**2)


def knorm_excess_quantile(
    probability: float,
    dim: int,
    l2_clip_norm: float,
    epsilon: float,
    relation: NeighboringRelation,
    num_units: int,
) -> float:
    """The exact quantile of the same excess, a squared Gamma(k) variable.

    Args:
      probability: in (0, 1).
      dim: k.
      l2_clip_norm: C.
      epsilon: in [1e-4, 1e4].
      relation: neighbouring relation.
      num_units: N, public.
    """
    probability = arguments.proportion("probability", probability)
    dim = arguments.count("dim", dim)
    num_units = arguments.count("num_units", num_units)
    length = _knorm_scale(l2_clip_norm, epsilon, relation) * float(gammaincinv(dim, probability))
    return length**2 / (2 * num_units**2)


def _knorm_scale(l2_clip_norm: float, epsilon: float, relation: NeighboringRelation) -> float:
    """Delta / epsilon."""
    clip_norm = arguments.positive("l2_clip_norm", l2_clip_norm)
    delta = accounting.sensitivity(clip_norm, relation)
    return delta / accounting.check_epsilon(epsilon)
