"""The two kinds of noise: how a pass adds up for each, how its sum is drawn, and by which account it is paid.

                     `GAUSSIAN`                                `DISCRETE`, of a hardened release
    a unit adds      its clipped coordinates in whole steps    integers of a program of its own (`exact_clipping`)
    a sum is         two words a coordinate, on devices        int64 on the host
    noise            Gaussian, rounded to the steps            exact discrete Gaussian of the system's entropy
    a draw is        mu-GDP, mu = Delta / (C z)                rho-zCDP, rho = Delta^2 / (2 sigma^2)

A release holds one of them, and nothing else asks which it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qexp_jax.data.records import Record
from qexp_jax.mechanism import gaussian, hardened
from qexp_jax.numerics import integers
from qexp_jax.numerics.compilation import compiled
from qexp_jax.privacy import accounting, discrete
from qexp_jax.privacy.discrete import DiscreteNoise
from qexp_jax.private_pass import clipping, devices, passes
from qexp_jax.private_pass.passes import BatchSum, Linearisation
from qexp_jax.quadratic.precision import Precision


class Calibration(NamedTuple):
    """How much noise a draw gets; public.

    Attributes:
      multiplier: z, in units of the clip norm.
      discrete: the integers of discrete noise, None of Gaussian noise.
    """

    multiplier: float
    discrete: DiscreteNoise | None


class Drawn(NamedTuple):
    """A sum and the draw of it; only `noisy` and `noise_std` may leave the curator.

    Attributes:
      total: (k,), the exact sum, whitened, in float64; **not private**. None unless somebody looks at it.
      noisy: (k,), with its noise.
      noise_std: C z.
    """

    total: Any
    noisy: jax.Array
    noise_std: Any


class Noise(NamedTuple):
    """One kind of noise, with the sums that it protects.

    Attributes:
      hardened: whether the promise holds on a computer as it is, not for real numbers; ledgers and certificates say it.
      check_available: raises ImportError where the noise cannot be drawn.
      mu_from_budget: `(epsilon, delta) -> mu` that rounds share: of Gaussian DP, or sqrt(2 rho).
      calibrate: `(noise_multiplier, dim) -> Calibration` of at least this noise, on k coordinates.
      num_coordinates: of the sum of a pass at a `Linearisation`.
      zeros: `(num_coordinates) -> total`, the sum over no unit.
      placed: units in memory where a pass without a mesh reads them.
      batch_sum: `passes.device_sum` or `passes.host_sum`.
      draw: `(key, linearisation, total, noise_std, multiplier, mesh, exactly) -> Drawn`, the release of T1. The key is
        secret, the noise of this draw alone; of a hardened release the system's entropy is used in its place. C z is
        found anew of integers. The last argument asks for `total`.
    """

    hardened: bool
    check_available: Callable[[], None]
    mu_from_budget: Callable[[float, float], float]
    calibrate: Callable[[float, int], Calibration]
    num_coordinates: Callable[[Linearisation], int]
    zeros: Callable[[int], Any]
    placed: Callable[[Record], Record]
    batch_sum: BatchSum
    draw: Callable[[jax.Array, Linearisation, Any, Any, float, Mesh | None, bool], Drawn]


# --- Gaussian ---


def _draw_gaussian(
    key: jax.Array,
    linearisation: Linearisation,
    total: Any,
    noise_std: Any,
    multiplier: float,
    mesh: Mesh | None,
    looked_at: bool,
) -> Drawn:
    """Noise of the same key in every process, on a sum that is the same in every process."""
    precision = linearisation.precision
    step = _step_size(precision, linearisation.l2_clip_norm)
    noisy = noisy_sum(key, total, precision, step, noise_std)
    return Drawn(_whitened_exactly(precision, total, step) if looked_at else None, noisy, noise_std)


# Random bits take long without optimisations: of more numbers, twelve rounds of it as long as its compilation.
noisy_sum = compiled(gaussian.noisy_whitened_sum, few=2**18)
_step_size = compiled(clipping.step_size)


def _whitened_exactly(precision: Precision, total: Any, step: jax.Array) -> np.ndarray:
    """The sum in float64: float32 would round a long one by more than a unit's part."""
    with jax.enable_x64(True):
        precision, step = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), np.float64), (precision, step))
        return np.asarray(_whiten_numbers(precision, integers.to_int64(total) * step))


@compiled
def _whiten_numbers(precision: Precision, numbers: jax.Array) -> jax.Array:
    return precision.root.whiten_sum(precision.arrays, numbers)


GAUSSIAN = Noise(
    hardened=False,
    check_available=lambda: None,
    mu_from_budget=accounting.mu_from_budget,
    calibrate=lambda noise_multiplier, dim: Calibration(noise_multiplier, None),
    num_coordinates=lambda linearisation: linearisation.precision.num_coordinates,
    zeros=integers.zeros,
    placed=lambda units: jax.tree.map(jnp.asarray, units),
    batch_sum=passes.device_sum,
    draw=_draw_gaussian,
)


# --- discrete ---


def _calibrate_discrete(noise_multiplier: float, dim: int) -> Calibration:
    noise = discrete.discrete_noise(noise_multiplier, dim)
    return Calibration(noise.multiplier, noise)


def _draw_discrete(
    key: jax.Array,
    linearisation: Linearisation,
    total: Any,
    noise_std: Any,
    multiplier: float,
    mesh: Mesh | None,
    looked_at: bool,
) -> Drawn:
    """Noise is fresh in each process; that of the first is the release."""
    l2_clip_norm = jnp.asarray(linearisation.l2_clip_norm, linearisation.subspace.layout.dtype)
    noise = discrete.discrete_noise(multiplier, linearisation.subspace.dim)
    whitened, noisy = hardened.noisy_sum(total, noise, l2_clip_norm)
    total = whitened if looked_at else None
    return Drawn(total, devices.from_first(mesh, noisy), l2_clip_norm * noise.multiplier)


DISCRETE = Noise(
    hardened=True,
    check_available=hardened.check_available,
    mu_from_budget=discrete.mu_from_budget,
    calibrate=_calibrate_discrete,
    num_coordinates=lambda linearisation: linearisation.subspace.dim,
    zeros=lambda num_coordinates: np.zeros(num_coordinates, np.int64),
    # Units are read one by one, so that they may stay on the host.
    placed=lambda units: units,
    batch_sum=passes.host_sum,
    draw=_draw_discrete,
)
