"""What public records say, in coordinates whitened by the metric M in which gradients are clipped (T4).

M has the directions of the measured curvature, so that whitening by it divides by its eigenvalues. From here on nothing
of a plan is in the units of the parameters.
"""

from typing import NamedTuple

import jax
import numpy as np

from qexp_jax.data.records import LossFn, Params
from qexp_jax.quadratic import noise_trials
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic.public_curvature import Measurement
from qexp_jax.quadratic.rule import RULE

_LEAST_CURVATURE = 1e-6  # over the largest: positive, since the expected excess divides by it


class Whitened(NamedTuple):
    """Public measurements in whitened coordinates, on the host and in double precision.

    Attributes:
      eigenvalues: (r + 1,) of M.
      leading: (n, r) gradients of public units along the leading directions.
      squares: (n, r + 1) of these gradients: in each leading direction, and the mean of all others.
      dims: (r + 1,) how many coordinates each entry stands for: 1, ..., 1, k - r.
      curvature: (r + 1,) K.
      tolerance: scale of the noise in all parameters that raises the public loss as far as the rule allows.
      tolerance_of_leading: that of noise in the leading directions alone.
    """

    eigenvalues: np.ndarray
    leading: np.ndarray
    squares: np.ndarray
    dims: np.ndarray
    curvature: np.ndarray
    tolerance: float
    tolerance_of_leading: float


def metric(curvature: np.ndarray, damping: float, power: float) -> np.ndarray:
    """Eigenvalues (r + 1,) of M, a power of the damped curvature (4), scaled to a largest one of 1.

    >>> metric(np.array([7.0, 1.0]), damping=1.0, power=0.5)
    array([1. , 0.5])
    """
    damped = (curvature + damping) / (curvature.max() + damping)
    return np.sqrt(damped) if power == 0.5 else damped**power


def whiten(key: jax.Array, loss_fn: LossFn, params: Params, measured: Measurement, eigenvalues: np.ndarray) -> Whitened:
    """The measurements whitened by M, and how much noise of covariance M^{-1} the public loss tolerates.

    Args:
      key: public randomness: the trial noise.
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      measured: in the units of the parameters.
      eigenvalues: (r + 1,) of M.
    """
    of_metric = np.asarray(eigenvalues, measured.directions.dtype)
    precision = precisions.spectral(of_metric[-1], measured.directions, of_metric[:-1])
    tolerance, cost = noise_trials.tolerated_noise(key, loss_fn, params, measured, precision, RULE.noise_cost)
    # Noise of scale s costs a quadratic s^2 tr(K) / 2: a cost that was met tells the trace, and a trace the scale.
    trace = 2 * cost / tolerance**2
    curvature = _curvature(measured.curvature / eigenvalues, measured.dims, trace)
    trace_of_leading = np.sum(curvature[:-1])
    return Whitened(
        eigenvalues=eigenvalues,
        leading=measured.leading / np.sqrt(eigenvalues[:-1]),
        squares=measured.squares / eigenvalues,
        dims=measured.dims,
        curvature=curvature,
        tolerance=tolerance,
        tolerance_of_leading=np.sqrt(2 * cost / trace_of_leading),
    )


def _curvature(from_moments: np.ndarray, dims: np.ndarray, trace: float) -> np.ndarray:
    """K (r + 1,).

    The rest has what the leading directions leave of the trace that the tolerated noise shows, but not less than its
    second moments say, and not more than a leading direction.

    Args:
      from_moments: (r + 1,) as second moments give it, whitened.
      dims: (r + 1,) how many coordinates each entry stands for.
      trace: of K.
    """
    leading = from_moments[:-1]
    of_rest = from_moments[-1]
    remainder = (trace - np.sum(leading)) / max(1, dims[-1])
    rest = min(max(of_rest, remainder), leading.min())
    curvature = np.append(leading, rest)
    return np.maximum(curvature, _LEAST_CURVATURE * curvature.max())
