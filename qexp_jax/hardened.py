"""A release whose privacy does not rest on floating point: integers, and exact noise of cryptographic randomness.

Gaps between floating-point numbers betray what noise was added to (Mironov, CCS 2012); a floating-point sum depends on
its order, and moves by more than its real counterpart (Casacuberta et al., arXiv:2207.10635); and the gradient of one
record may have other last bits in a batch of other length. Here instead

1. the program of **one** unit, compiled once and the same for all units and any number of them, returns its whitened,
   clipped gradient in whole steps of a grid of C / 2^20;
2. on the host, in exact integers, a unit of norm above 2^20 steps is shrunk by integer division, which needs that unit
   alone: the bound is exact, whatever floating point did before;
3. the integers are added in 64 bits, which cannot overflow: the sum is the same in any order and on any devices;
4. OpenDP adds its exact discrete Gaussian (Canonne, Kamath and Steinke, arXiv:2004.00010), of integer sigma.

**Guarantee.** Neighbours' sums are integer vectors at a distance of at most Delta = 2^20 (twice that for replace-one),
so that a round is rho-zCDP with rho = Delta^2 / (2 sigma^2), and rounds add; `privacy.delta_from_rho` converts. What
follows is post-processing. It is **not** mu-GDP for the mu of the continuous Gaussian.

**Cost.** About a tenth more noise than the exact conversion of mu; a call of the program for each unit instead of each
microbatch, each with its own whole gradient and whitening, on a CPU ten (CNN) to sixty times (MLP on images, in whose
plain pass none is formed) the plain pass; k integers of each unit on the host; about ten microseconds of noise a
coordinate.

The grid and the shrinking are ours.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax import arguments, privacy
from qexp_jax.clipping import ClipInfo, clip
from qexp_jax.gradients import Mode, projected_gradients
from qexp_jax.outer_products import norms
from qexp_jax.precision import Precision, whiten
from qexp_jax.records import LossFn, Params, Record, is_key, num_records
from qexp_jax.subspace import Subspace

INTEGER_CLIP_NORM = 2**20
# Sums of squares over coordinates and sums over units stay below 2^63, and a scale is exact as a double.
_MOST_COORDINATES, _MOST_UNITS, _LARGEST_SCALE = 2**22, 2**40, 2**53


class DiscreteNoise(NamedTuple):
    """The public integers of a hardened release.

    Attributes:
      l2_clip_norm: 2^20, the exact bound on the norm of a unit's steps.
      scale: sigma of the discrete Gaussian in steps, an integer.
    """

    l2_clip_norm: int
    scale: int

    @property
    def multiplier(self) -> float:
        """z, in units of the clip norm."""
        return self.scale / self.l2_clip_norm


def mu_from_budget(epsilon: float, delta: float) -> float:
    """sqrt(2 rho) of the largest rho for which rho-zCDP is known to imply (epsilon, delta)-DP.

    The mu of the continuous twin: what calibrates noise, and **not** the mu of a GDP guarantee.
    """
    return math.sqrt(2 * privacy.rho_from_budget(epsilon, delta))


def discrete_noise(noise_multiplier: float, dim: int) -> DiscreteNoise:
    """Noise of at least the multiplier, rounded up to whole steps.

    Args:
      noise_multiplier: z > 0 of one round.
      dim: k.

    Raises:
      ValueError: if integers of 64 bits would not hold a release of such noise or dimension.

    >>> noise = discrete_noise(3.0, 100)
    >>> noise.scale == 3 * 2**20, noise.multiplier
    (True, 3.0)
    """
    dim = arguments.count("dim", dim)
    noise_multiplier = arguments.real("noise_multiplier", noise_multiplier)
    if not 0 < noise_multiplier < _LARGEST_SCALE / INTEGER_CLIP_NORM:
        raise ValueError(f"Expected a noise multiplier in (0, 2^33) of a hardened release, found {noise_multiplier}.")
    scale = math.ceil(noise_multiplier * INTEGER_CLIP_NORM)
    if dim > _MOST_COORDINATES:
        raise ValueError(f"Expected at most {_MOST_COORDINATES} coordinates of a hardened release, found k = {dim}.")
    return DiscreteNoise(INTEGER_CLIP_NORM, scale)


def check_available() -> None:
    """Raises ImportError where OpenDP is not installed; nothing private is read."""
    _sampler(1)


@functools.lru_cache(maxsize=16)
def _sampler(scale):
    try:
        import opendp.prelude as dp
    except ImportError:
        raise ImportError("A hardened release draws its noise with OpenDP: pip install 'qexp_jax[hardened]'.") from None
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    return dp.m.make_gaussian(*space, scale=float(scale))


def discrete_gaussian(total: np.ndarray, scale: int) -> np.ndarray:
    """The integers `total` (k,) plus exact discrete Gaussian noise of the system's entropy, int64.

    Coordinates are independent with P(x) proportional to exp(-x^2 / (2 scale^2)) on all integers.

    Args:
      total: int64 (k,).
      scale: sigma >= 1, an integer below 2^53.
    """
    return np.asarray(_sampler(scale)(np.asarray(total, np.int64)), np.int64)


@functools.partial(jax.jit, static_argnames=("loss_fn", "mode"))
def unit_steps(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    precision: Precision,
    unit: Record,
    l2_clip_norm: float,
    mode: Mode = "reverse",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One unit's whitened, clipped gradient in steps of the grid, int32 (k,), whether clipped, whether finite."""
    record = jax.tree.map(lambda x: jnp.asarray(x)[None], unit)
    whitened = whiten(precision, projected_gradients(loss_fn, params, subspace, record, mode=mode)[0])
    clipped, was_clipped, finite = clip(whitened, norms([whitened[None]])[0], l2_clip_norm)
    steps = jnp.round(clipped * (INTEGER_CLIP_NORM / l2_clip_norm))
    steps = jnp.nan_to_num(steps, nan=0.0, posinf=0.0, neginf=0.0)
    return jnp.clip(steps, -INTEGER_CLIP_NORM, INTEGER_CLIP_NORM).astype(jnp.int32), was_clipped, finite


def within_norm(steps: np.ndarray) -> np.ndarray:
    """Rows of norm at most 2^20, exactly: a longer row is multiplied by 2^20 / (floor(norm) + 1), towards zero.

    Args:
      steps: integers (m, k), each at most 2^20 in absolute value, k <= 2^22.

    >>> within_norm(np.array([[3, -4], [2**20, 2**20]])).tolist()
    [[3, -4], [741454, 741454]]
    """
    steps = np.asarray(steps, np.int64)
    squares = np.einsum("ij,ij->i", steps, steps)
    for i in np.flatnonzero(squares > INTEGER_CLIP_NORM**2):
        longer = math.isqrt(int(squares[i])) + 1
        steps[i] = np.sign(steps[i]) * (np.abs(steps[i]) * INTEGER_CLIP_NORM // longer)
    return steps


def integer_sum(
    loss_fn: LossFn,
    params: Params,
    subspace: Subspace,
    precision: Precision,
    units: Record,
    *,
    l2_clip_norm: float,
    microbatch_size: int | None = None,
    mode: Mode = "reverse",
) -> tuple[np.ndarray, ClipInfo]:
    """The exact sum over units of their clipped gradients in steps of the grid.

    Args:
      loss_fn: loss of one unit.
      params: the anchor: public, or an earlier release.
      subspace: public.
      precision: public.
      units: pytree with leading axis n < 2^40.
      l2_clip_norm: C > 0, public, in the whitened norm; 2^20 steps.
      microbatch_size: units whose integers are held at a time, by default 32.
      mode: see `gradients.projected_gradients`.

    Returns:
      int64 (k,), **not private** without noise, and `ClipInfo`, not private at all. Sums of several parts of the
      units, from any devices, add up to the same integers.

    Formal guarantee: between neighbouring datasets the sum differs by an integer vector of norm at most 2^20 (2^21 for
    replace-one), exactly, provided that `unit_steps` depends on its unit and on public values alone. A unit whose
    gradient is not finite contributes zero.
    """
    n = num_records(units)
    if n > _MOST_UNITS:
        raise ValueError(f"Expected at most {_MOST_UNITS} units, found {n}.")
    units = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), units)
    total, counts = np.zeros(subspace.dim, np.int64), np.zeros(2, np.int64)
    size = microbatch_size or 32
    for start in range(0, n, size):
        members = [jax.tree.map(operator.itemgetter(i), units) for i in range(start, min(n, start + size))]
        launched = [unit_steps(loss_fn, params, subspace, precision, unit, l2_clip_norm, mode) for unit in members]
        steps, clipped, finite = (np.stack([np.asarray(x) for x in part]) for part in zip(*launched, strict=True))
        total += np.sum(within_norm(steps), axis=0)
        counts += np.sum(clipped), np.sum(~finite)
    return total, ClipInfo(*map(jnp.asarray, (n, *counts)))


def noisy_sum(total: np.ndarray, noise: DiscreteNoise, l2_clip_norm: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """The whitened sum in real numbers, **not private**, float64, and the same with its noise, of C's dtype; (k,) each.

    Formal guarantee: the second is rho-zCDP with rho = Delta^2 / (2 noise.scale^2), and all that a hardened round knows
    of the data; the first is for diagnostics.
    """
    noisy = discrete_gaussian(total, noise.scale)
    grid, dtype = float(l2_clip_norm) / noise.l2_clip_norm, l2_clip_norm.dtype
    return total * grid, jnp.asarray(noisy * grid, dtype)
