"""The Gaussian draw restricted to a ball, of pure epsilon; see `pure`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.data import arguments
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.mechanism import truncated
from qexp_jax.mechanism.gaussian import Quadratic, protecting_key, release_step
from qexp_jax.privacy import accounting
from qexp_jax.quadratic.precision import uncolor

_ERROR_SHARE = 1e-3  # of epsilon, spent on the density error of the ball draw
_LEAST_CELLS = 2**10
_MOST_CELLS = 2**20


class Ball(NamedTuple):
    """A calibrated ball mechanism; public, from `calibrate_ball`.

    Attributes:
      dim: k.
      num_units: N.
      radius: r, of |R^T w|.
      sum_bound: B.
      inverse_temperature: beta.
      epsilon: what `ball_draw` guarantees, density error included.
      density_error: eta; 2 eta of epsilon pays for it.
      mu: Delta sqrt(beta/N), Gaussian DP of the exact law.
      zcdp_rho: of the law as drawn.
      num_cells: of `truncated.draw`.
    """

    dim: int
    num_units: int
    radius: float
    sum_bound: float
    inverse_temperature: float
    epsilon: float
    density_error: float
    mu: float
    zcdp_rho: float
    num_cells: int


def calibrate_ball(
    *,
    dim: int,
    num_units: int,
    l2_clip_norm: float,
    epsilon: float,
    relation: NeighboringRelation,
    radius: float | None = None,
    sum_bound: float | None = None,
) -> Ball:
    """The largest beta at which the ball draw is epsilon-DP; public numbers only, on the host.

    Args:
      dim: k.
      num_units: N, public.
      l2_clip_norm: C.
      epsilon: in [1e-4, 1e4].
      relation: neighbouring relation.
      radius: r, public; by default B/N, so that the ball just holds the minimiser of every allowed sum.
      sum_bound: B, public, at most N C, which is the default. Sums beyond it are moved to it: bias instead of noise.

    Raises:
      ValueError: for numbers that are not positive or beyond their range, or so large that the draw would need more
        than 2^20 cells.

    >>> zero_out = NeighboringRelation.REPLACE_SPECIAL
    >>> ball = calibrate_ball(dim=3, num_units=100, l2_clip_norm=1.0, epsilon=1.0, relation=zero_out, radius=2.0)
    >>> round(ball.inverse_temperature / (1.0 / (2 * 2.0 * 1.0)), 2)  # over the textbook's
    1.33
    """
    dim = arguments.count("dim", dim)
    num_units = arguments.count("num_units", num_units)
    l2_clip_norm = arguments.positive("l2_clip_norm", l2_clip_norm)
    epsilon = accounting.check_epsilon(epsilon)
    delta = accounting.sensitivity(l2_clip_norm, relation)
    largest_sum = num_units * l2_clip_norm
    sum_bound = largest_sum if sum_bound is None else min(arguments.positive("sum_bound", sum_bound), largest_sum)
    radius = sum_bound / num_units if radius is None else arguments.positive("radius", radius)

    def spent(beta: float) -> float:
        return exact_epsilon(dim, num_units, delta, radius, sum_bound, beta)

    target = (1 - 2 * _ERROR_SHARE) * epsilon
    textbook = epsilon / (2 * radius * delta)
    concentration = 2 * textbook * num_units * radius**2
    centre = sum_bound / (num_units * radius)
    # Enough cells for twice the textbook's beta, which is more than any.
    eta = truncated.density_error(dim, concentration, centre, num_cells=1)
    cells = max(_LEAST_CELLS, math.ceil(math.sqrt(eta / (_ERROR_SHARE * epsilon))))
    if cells > _MOST_CELLS:
        raise ValueError(f"Expected a ball draw of at most 2^20 cells, found {cells}: {num_units=}, {radius=}, {dim=}.")
    # In units of the textbook's: beta may be of any scale, and a tolerance is not.
    from scipy.optimize import brentq  # slow to import

    multiple = brentq(lambda multiple: spent(multiple * textbook) - target, 0.5, 2.0, xtol=1e-14, rtol=1e-12)
    beta = multiple * textbook
    concentration = beta * num_units * radius**2
    error = truncated.density_error(dim, concentration, centre, cells)
    mu = delta * math.sqrt(beta / num_units)
    # Log-ratios lie in an interval of length at most 2 beta r Delta: bounded range, which is zCDP.
    rho = (2 * beta * radius * delta + 4 * error) ** 2 / 8
    return Ball(dim, num_units, radius, sum_bound, beta, spent(beta) + 2 * error, error, mu, rho, cells)


def exact_epsilon(
    dim: int, num_units: int, delta: float, radius: float, sum_bound: float, inverse_temperature: float
) -> float:
    """beta r Delta + log Z(B) - log Z(B - Delta): the pure epsilon of the exact ball law.

    Args:
      dim: k.
      num_units: N.
      delta: Delta, the sensitivity of S; no probability.
      radius: r.
      sum_bound: B.
      inverse_temperature: beta.
    """
    dim = arguments.count("dim", dim)
    num_units = arguments.count("num_units", num_units)
    delta = arguments.positive("delta", delta)
    radius = arguments.positive("radius", radius)
    sum_bound = arguments.positive("sum_bound", sum_bound)
    inverse_temperature = arguments.positive("inverse_temperature", inverse_temperature)
    concentration = inverse_temperature * num_units * radius**2
    # Sums are no shorter than zero; B is less than Delta where it is given small.
    lowest_sum = max(0.0, sum_bound - delta)
    upper = sum_bound / (num_units * radius)
    lower = lowest_sum / (num_units * radius)
    # log Z(s) = log int exp(-kappa |y - m|^2 / 2) + kappa m^2 / 2, with m = s / (N r).
    masses = truncated.log_mass(dim, concentration, upper) - truncated.log_mass(dim, concentration, lower)
    squares = concentration / 2 * (upper - lower) * (upper + lower)
    return inverse_temperature * radius * delta + masses + squares


def ball_draw(key: jax.Array, quadratic: Quadratic, ball: Ball) -> jax.Array:
    """One draw of the ball mechanism, (k,), with |R^T w| <= r, in time that depends on nothing private.

    Args:
      key: secret, typed.
      quadratic: utility, with the N and k of `ball`.
      ball: from `calibrate_ball`; static.

    Formal guarantee: epsilon-DP with `ball.epsilon` and zCDP with `ball.zcdp_rho`, for real arithmetic and ideal
    uniform numbers, density error included.
    """
    total = quadratic.whitened_sum
    if (len(total), quadratic.num_units) != (ball.dim, ball.num_units):
        raise ValueError(
            f"Expected the ball's dim and num_units {ball.dim, ball.num_units}, found {total.shape=}, "
            f"{quadratic.num_units=}."
        )
    scale = jnp.asarray([ball.inverse_temperature, ball.radius, ball.sum_bound], total.dtype)
    draw_key = protecting_key(key, total, scale)
    concentration = ball.inverse_temperature * ball.num_units * ball.radius**2
    mean = -_bounded(total, ball.sum_bound) / (ball.num_units * ball.radius)
    x = ball.radius * truncated.draw(draw_key, mean, concentration, ball.num_cells)
    return release_step(quadratic, -ball.num_units * x)


def _bounded(total: jax.Array, sum_bound: float) -> jax.Array:
    """The nearest point with norm at most B."""
    norm = jnp.linalg.norm(total)
    # `maximum` keeps a sum of zero from a division by zero.
    return total * jnp.minimum(1, sum_bound / jnp.maximum(norm, jnp.finfo(total.dtype).tiny))


def ball_log_density(ball: Ball, quadratic: Quadratic, w: jax.Array) -> jax.Array:
    """Log density of the exact ball law at w within the ball, up to a constant of k and H; **not private**.

    Host-side in its normaliser, hence not for jit.
    """
    total = _bounded(quadratic.whitened_sum, ball.sum_bound)
    concentration = ball.inverse_temperature * ball.num_units * ball.radius**2
    x = uncolor(quadratic.precision, w)
    centre = jnp.linalg.norm(total) / (ball.num_units * ball.radius)
    distance = jnp.sum((x / ball.radius + total / (ball.num_units * ball.radius)) ** 2)
    log_normaliser = truncated.log_mass(ball.dim, concentration, float(centre))
    return -concentration / 2 * distance - log_normaliser


def ball_expected_excess(ball: Ball, sum_norm: float) -> float:
    """Mean excess of the quadratic loss per record of `ball_draw` over the best w of the ball.

    Args:
      ball: calibrated.
      sum_norm: a **public** guess of |S|, at most `ball.sum_bound`; the actual one is private.
    """
    concentration = ball.inverse_temperature * ball.num_units * ball.radius**2
    centre = min(arguments.not_negative("sum_norm", sum_norm), ball.sum_bound) / (ball.num_units * ball.radius)
    return ball.radius**2 * truncated.mean_excess(ball.dim, concentration, centre)
