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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.privacy.discrete import INTEGER_CLIP_NORM, DiscreteNoise, discrete_noise, mu_from_budget

__all__ = [
    "INTEGER_CLIP_NORM",
    "DiscreteNoise",
    "check_available",
    "discrete_gaussian",
    "discrete_noise",
    "mu_from_budget",
    "noisy_sum",
]


def check_available() -> None:
    """Raises ImportError where OpenDP is not installed; nothing private is read."""
    _sampler(1)


@functools.lru_cache(maxsize=16)
def _sampler(scale: int) -> Any:
    """OpenDP's measurement, made once for the rounds of a release."""
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


def noisy_sum(total: np.ndarray, noise: DiscreteNoise, l2_clip_norm: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """The whitened sum in real numbers, **not private**, float64, and the same with its noise, of C's dtype; (k,) each.

    Args:
      total: int64 (k,), of `exact_clipping.integer_sum`.
      noise: in steps.
      l2_clip_norm: C, which 2^20 steps make up.

    Formal guarantee: the second is rho-zCDP with rho = Delta^2 / (2 noise.scale^2), and all that a hardened round knows
    of the data; the first is for diagnostics.
    """
    noisy = discrete_gaussian(total, noise.scale)
    # What one step is worth; from here on all is post-processing, floats included.
    step = float(l2_clip_norm) / noise.l2_clip_norm
    return total * step, jnp.asarray(noisy * step, l2_clip_norm.dtype)
