"""A Gaussian restricted to the unit ball: its normaliser, and draws in bounded time that never reject.

Density proportional to exp(-kappa |y - m|^2 / 2) on |y| <= 1 in R^k. By symmetry only two numbers of y are not uniform:
t along m, and the distance rho from that axis. With b^2 = 1 - rho^2, the law of rho has density proportional to

    rho^{k-2} exp(-kappa rho^2 / 2) J(b),      J(b) = int_{-b}^{b} exp(-kappa (t - m)^2 / 2) dt,

and t given rho is a Gaussian on [-b, b]. Both are drawn in one way: the log-density is interpolated linearly between
the ends of a fixed number of cells; a cell is chosen by its exact mass, and a point in it by the inverse of its
exponential law. For rho the coordinate is tau = log(rho^2 / b^2): there the log-density is asymptotically linear, with
slopes (k-1)/2 and -3/2, so that no end is cut off. Nothing is rejected and no loop looks at a value: the time of a draw
is the same for every mean.

**Density error.** Cells are equal in chi, where b = sin(chi)^2; let h = pi / (2 cells). A cell costs its width squared
times an eighth of the second derivative of the log-density in its coordinate, which amounts, everywhere, to at most

    (k + 3) h^2 (one-sided, tails included)    from the powers of rho and b,
    +-kappa max(1/2, |m|) h^2                  from the exponent,
    +-kappa h^2 / 2                            from the rest of J,
    kappa / (2 cells^2) (one-sided)            for t given rho.

The density drawn from, being normalised too, is within exp(+-eta) of the exact one with eta the whole range, see
`density_error`. The constant of the third line was found numerically and is checked, with the sum, against float64 over
k, kappa and m in the tests. This is for real arithmetic; in the cases of the tests, rounding to float32 moves the
log-density by 1e-6 to 2e-4 where draws fall. All of it is ours.
"""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from qexp_jax.data import arguments

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_TAIL = 32.0  # what J leaves out is below exp(-32) of it


def density_error(dim: int, concentration: float, max_centre: float, num_cells: int) -> float:
    """eta: the density of `draw` is within exp(+-eta) of the exact one for every mean of norm up to `max_centre`.

    Args:
      dim: k >= 1.
      concentration: kappa > 0.
      max_centre: the largest |m|.
      num_cells: of the draw.

    >>> density_error(10, 1000.0, 1.0, num_cells=4096) < 1e-3
    True
    """
    dim = arguments.count("dim", dim)
    concentration = arguments.positive("concentration", concentration)
    max_centre = arguments.not_negative("max_centre", max_centre)
    width = math.pi / (2 * arguments.count("num_cells", num_cells))
    # The whole range of the four terms above: those with both signs count twice.
    across = dim + 3 + concentration * (2 * max(0.5, max_centre) + 1)
    along = 2 * concentration / math.pi**2
    return width**2 * (across * (dim > 1) + along)  # in one dimension there is nothing across


def log_mass(dim: int, concentration: float, centre: float) -> float:
    """log int_{|y| <= 1} exp(-kappa |y - m|^2 / 2) dy up to a constant of k alone; on the host, in float64.

    Args:
      dim: k >= 1.
      concentration: kappa > 0.
      centre: |m| >= 0.
    """
    concentration = arguments.positive("concentration", concentration)
    centre = arguments.not_negative("centre", centre)
    return log_excess_mass(dim, concentration, centre) - concentration * max(0.0, centre - 1) ** 2 / 2


def log_excess_mass(dim: int, concentration: float, centre: float) -> float:
    """The same for exp(-kappa (|y - m|^2 - d^2) / 2), where d is the distance of m from the ball."""
    dim = arguments.count("dim", dim)
    concentration = arguments.positive("concentration", concentration)
    centre = arguments.not_negative("centre", centre)
    if dim == 1:
        return float(_log_mean(concentration, centre, np.ones(1), np)[0] + np.log(2))
    # The midpoint rule in chi: its integrand is smooth and needs no end, so that it converges like a spectral method.
    points = 8192 + 16 * math.ceil(math.sqrt(concentration + dim))
    chi = np.pi / 2 * (np.arange(points) + 0.5) / points
    heights = _fixed_part(dim, concentration, chi) + _centred_part(concentration, centre, _chord(chi), np)
    log_integrand = heights + np.log(_stretch(chi))
    return float(logsumexp(log_integrand)) - math.log(points)


def mean_excess(dim: int, concentration: float, centre: float) -> float:
    """E[|y - m|^2 - d^2] / 2, by central differences of `log_excess_mass` in kappa, to about 1e-6 of it."""
    concentration = arguments.positive("concentration", concentration)
    # The mean of what kappa multiplies is minus the slope of the log of the normaliser.
    step = 1e-3 * concentration
    low = log_excess_mass(dim, concentration - step, centre)
    high = log_excess_mass(dim, concentration + step, centre)
    return (low - high) / (2 * step)


def draw(key: jax.Array, mean: jax.Array, concentration: float, num_cells: int) -> jax.Array:
    """One draw y (k,) of N(mean, I / kappa) restricted to |y| <= 1.

    Args:
      key: typed.
      mean: m (k,), any norm.
      concentration: kappa > 0, static.
      num_cells: static; `density_error` says how exact it makes the draw.
    """
    concentration = arguments.positive("concentration", concentration)
    num_cells = arguments.count("num_cells", num_cells)
    cell_key, point_key, direction_key = jax.random.split(key, 3)
    # Gumbel-max needs no cumulative sum, which would lose cells of small mass.
    gumbels = jax.random.gumbel(cell_key, (2, num_cells), mean.dtype, mode="high")
    shares = jax.random.uniform(point_key, (2,), mean.dtype)
    centre, axis = _norm_and_direction(mean)
    if len(mean) == 1:
        return _along(gumbels[0], shares[0], centre, jnp.ones((), mean.dtype), concentration) * axis
    rho, chord = _across(gumbels[0], shares[0], centre, len(mean), concentration)
    t = _along(gumbels[1], shares[1], centre, chord, concentration)
    # A Gaussian vector without its part along the axis has a uniform direction across.
    spread = jax.random.normal(direction_key, mean.shape, mean.dtype)
    along = jnp.vdot(spread, axis, precision=jax.lax.Precision.HIGHEST)
    _, across = _norm_and_direction(spread - along * axis)
    return t * axis + rho * across


def _norm_and_direction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|x| and x/|x|; for 0 the first axis, which rotational symmetry allows."""
    # Scaled first: the squares of very large or small numbers would leave the range of float32.
    largest = jnp.max(jnp.abs(x))
    scaled = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(scaled)
    direction = scaled / jnp.where(norm > 0, norm, 1)
    first_axis = jnp.zeros_like(x).at[0].set(1)
    return largest * norm, jnp.where(largest > 0, direction, first_axis)


def _nodes(num_cells: int) -> np.ndarray:
    """chi between the cells, from b near 1 to b near 0; the first and the last cell are tails."""
    return np.pi / 2 * (1 - np.arange(1, num_cells) / num_cells)


def _stretch(chi: np.ndarray) -> np.ndarray:
    """|d tau / d chi|."""
    b = _chord(chi)
    return 4 * np.cos(chi) / np.sin(chi) / (np.cos(chi) ** 2 * (1 + b))


def _chord(chi: np.ndarray) -> np.ndarray:
    """b."""
    return np.sin(chi) ** 2


def _log_squares(chi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log rho^2 and log b^2, without cancellation: rho^2 = (1 - b)(1 + b)."""
    log_rho2 = 2 * np.log(np.cos(chi)) + np.log1p(_chord(chi))
    log_b2 = 4 * np.log(np.sin(chi))
    return log_rho2, log_b2


def _fixed_part(dim: int, concentration: float, chi: np.ndarray) -> np.ndarray:
    """What of the log-density in tau does not depend on the mean."""
    log_rho2, log_b2 = _log_squares(chi)
    return (dim - 1) / 2 * log_rho2 + 1.5 * log_b2 - concentration / 2 * np.exp(log_rho2)


def _centred_part(concentration: float, centre: Any, b: Any, xp: ModuleType) -> Any:
    """What does: log(J(b) / b) without the part of its exponent that all b share."""
    beyond = xp.maximum(centre - b, 0)
    outside = xp.maximum(centre - 1, 0)
    # A difference of squares as a product: the squares alone may be so large that their difference has no digit left.
    exponent = (beyond - outside) * (beyond + outside)
    return _log_mean(concentration, centre, b, xp) - concentration / 2 * exponent


def _log_mean(concentration: float, centre: Any, b: Any, xp: ModuleType) -> Any:
    """log of 1/(2b) int_{-b}^{b} exp(-kappa [(t - m)^2 - (m - b)_+^2] / 2) dt, by Gauss-Legendre where it has mass."""
    # In units of the standard deviation, z = sqrt(kappa) t.
    root = math.sqrt(concentration)
    mode = root * xp.minimum(centre, b)
    half = root * b
    push = root * xp.maximum(centre - b, 0)
    # How far below the mode the exponent reaches _TAIL: less far where the mean lies beyond b and pushes.
    reach = 2 * _TAIL / (push + xp.sqrt(push**2 + 2 * _TAIL))
    low = xp.maximum(-half, mode - reach)
    high = xp.minimum(half, mode + math.sqrt(2 * _TAIL))
    middle = (low + high)[..., None] / 2
    z = middle + (high - low)[..., None] / 2 * _NODES.astype(low.dtype)
    # (z - M)^2 - (z* - M)^2 as a product, which keeps its relative accuracy.
    depth = (z - mode[..., None]) * (z + mode[..., None] - 2 * root * centre) / 2
    inside = xp.sum(_WEIGHTS.astype(low.dtype) * xp.exp(-depth), axis=-1)
    return xp.log(inside * (high - low) / (4 * half))


def _across(
    gumbels: jax.Array, share: jax.Array, centre: jax.Array, dim: int, concentration: float
) -> tuple[jax.Array, jax.Array]:
    """A draw of rho and b: cells are chosen by `gumbels` (cells,), the point in one by `share` in [0, 1)."""
    chi = _nodes(len(gumbels))
    # What the mean does not enter is computed in float64, on the host, and rounded once.
    fixed = _fixed_part(dim, concentration, chi)
    log_rho2, log_b2 = _log_squares(chi)
    heights = jnp.asarray(fixed - fixed.max(), centre.dtype)
    heights += _centred_part(concentration, centre, jnp.asarray(_chord(chi), centre.dtype), jnp)
    nodes = log_rho2 - log_b2
    tau = _piecewise_exponential(gumbels, share, nodes, heights, slopes=((dim - 1) / 2, 1.5))
    # rho^2 + b^2 = 1, so that both are sigmoids; in logarithms neither is rounded to 0 or 1 too early.
    rho = jnp.exp(jax.nn.log_sigmoid(tau) / 2)
    b = jnp.exp(jax.nn.log_sigmoid(-tau) / 2)
    return rho, b


def _along(gumbels: jax.Array, share: jax.Array, centre: jax.Array, b: jax.Array, concentration: float) -> jax.Array:
    """A draw of t on [-b, b], by a cell and a point in it as in `_across`."""
    t = b * jnp.linspace(-1, 1, len(gumbels) + 1, dtype=centre.dtype)
    mode = jnp.minimum(centre, b)
    # The exponent without its value at the mode, as a product, which is accurate near the mode.
    heights = -concentration / 2 * (t - mode) * (t + mode - 2 * centre)
    return _piecewise_exponential(gumbels, share, t, heights)


def _piecewise_exponential(
    gumbels: jax.Array,
    u: jax.Array,
    nodes: Any,
    heights: jax.Array,
    slopes: tuple[float, float] | None = None,
) -> jax.Array:
    """A draw from the density whose log interpolates `heights` linearly, with exponential tails if given.

    Args:
      gumbels: standard Gumbel variables, one for each cell, tails included.
      u: uniform on [0, 1).
      nodes: (n,) ends of the cells, increasing.
      heights: (n,) log-densities there, up to a constant.
      slopes: of the tails on the left and on the right, both > 0.
    """
    widths = jnp.asarray(nodes[1:] - nodes[:-1], heights.dtype)
    nodes = jnp.asarray(nodes, heights.dtype)
    rise = jnp.diff(heights)
    drop = jnp.abs(rise)
    masses = jnp.maximum(heights[1:], heights[:-1]) + jnp.log(widths) + jnp.log(_mean_decay(drop))
    if slopes is not None:
        # The mass of a tail is its height over its slope; the two come last, after the cells.
        tails = heights[jnp.array([0, -1])] - jnp.log(jnp.asarray(slopes, heights.dtype))
        masses = jnp.concatenate([masses, tails])
    cell = jnp.argmax(masses + gumbels)
    inner = jnp.minimum(cell, len(widths) - 1)
    # From the higher end of the cell downwards.
    fall = widths[inner] * _inverse_decay(u, drop[inner])
    point = jnp.where(rise[inner] > 0, nodes[inner + 1] - fall, nodes[inner] + fall)
    if slopes is None:
        return point
    beyond = -jnp.log1p(-u)
    point = jnp.where(cell == len(widths), nodes[0] - beyond / slopes[0], point)
    return jnp.where(cell == len(widths) + 1, nodes[-1] + beyond / slopes[1], point)


def _mean_decay(drop: jax.Array) -> jax.Array:
    """(1 - e^{-d}) / d."""
    # By its series near 0, where the quotient is 0/0.
    small = drop < 1e-4
    safe = jnp.where(small, 1, drop)
    return jnp.where(small, 1 - drop / 2, -jnp.expm1(-safe) / safe)


def _inverse_decay(u: jax.Array, drop: jax.Array) -> jax.Array:
    """The u-quantile of the density proportional to e^{-d x} on [0, 1]."""
    small = drop < 1e-4
    safe = jnp.where(small, 1, drop)
    return jnp.where(small, u, -jnp.log1p(u * jnp.expm1(-safe)) / safe)
