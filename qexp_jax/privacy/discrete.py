"""The public numbers of a hardened release: an integer grid, and discrete Gaussian noise on it, accounted in zCDP.

A unit adds integers of norm at most Delta = 2^20 (replace-one: neighbours differ by twice that). Discrete Gaussian
noise of integer sigma makes a round rho-zCDP with rho = Delta^2 / (2 sigma^2), and rounds add (Canonne, Kamath and
Steinke, arXiv:2004.00010). It is **not** mu-GDP for the mu of the continuous Gaussian.
"""

import math
from typing import NamedTuple

from qexp_jax.data import arguments
from qexp_jax.privacy import accounting

INTEGER_CLIP_NORM = 2**20
_MOST_COORDINATES = 2**22  # sums of squares stay below 2^63
_LARGEST_SCALE = 2**53  # exact as a double


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
    return math.sqrt(2 * accounting.rho_from_budget(epsilon, delta))


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
    # Upwards: the noise is never less than what was accounted for.
    scale = math.ceil(noise_multiplier * INTEGER_CLIP_NORM)
    if dim > _MOST_COORDINATES:
        raise ValueError(f"Expected at most {_MOST_COORDINATES} coordinates of a hardened release, found k = {dim}.")
    return DiscreteNoise(INTEGER_CLIP_NORM, scale)
