"""The exact draw: the exponential mechanism of a quadratic utility.

With S the clipped sum, N the public number of units and H = R R^T the public precision, the utility

    U(w) = -( N/2 w^T H w + w^T R S )

is N times the local quadratic model of the mean loss, sign reversed. The exponential mechanism with density
proportional to exp(beta U(w)) is, completing the square, exactly the multivariate normal

    w ~ N( -(1/N) R^{-T} S,  (beta N)^{-1} H^{-1} ),      w = -(1/N) R^{-T} (S + C z xi),   beta = N / (C z)^2.

**T1.** Neighbours change S alone, by at most Delta. The two laws are Gaussians of equal covariance at Mahalanobis
distance |S - S'| / (C z) <= Delta / (C z) = mu, and two such Gaussians have exactly the trade-off curve of N(0, 1)
against N(distance, 1): the release is mu-GDP, tight where a unit sits on the clip boundary. H, N and C enter the
covariance, so all three must be public. The release is not pure epsilon-DP: the log-ratio is linear in w (`pure` has
draws that are). The exponential mechanism is McSherry and Talwar's (FOCS 2007); trade-off curves and mu-GDP are Dong,
Roth and Su's (arXiv:1905.02383); utility from a local quadratic and exact sampling are those of the abstract of
arXiv:2605.20521; whitened clipping and this proof are ours. `tests/test_guarantee.py` computes the attained curve for
adversarial neighbours and rejects seven broken twins; `tests/test_audit.py` does so from outputs alone.

Utility and density evaluated at a release are **not private**: U measures |xi|, which tells neighbours apart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from qexp_jax.numerics import integers
from qexp_jax.numerics.integers import Words
from qexp_jax.numerics.keys import THREEFRY, as_threefry
from qexp_jax.quadratic.precision import Precision, color, shaped_noise, uncolor, whiten_sum

_HIGHEST = jax.lax.Precision.HIGHEST


class Quadratic(NamedTuple):
    """The utility, **not private**.

    Attributes:
      precision: public H.
      whitened_sum: S (k,), from `clipping.clipped_sum`; None where only a draw is made into a step.
      num_units: public N.
    """

    precision: Precision
    whitened_sum: Any
    num_units: int


def inverse_temperature(num_units: int, noise_std: Any) -> Any:
    """beta = N / (C z)^2."""
    return num_units / noise_std**2


def minimiser(quadratic: Quadratic) -> jax.Array:
    """argmax U = -(1/N) H^{-1} g, (k,); not private."""
    return -color(quadratic.precision, quadratic.whitened_sum) / quadratic.num_units


def utility(quadratic: Quadratic, w: jax.Array) -> jax.Array:
    """U(w), in units of the summed loss; not private."""
    x = uncolor(quadratic.precision, w)
    square = jnp.vdot(x, x, precision=_HIGHEST)
    linear = jnp.vdot(x, quadratic.whitened_sum, precision=_HIGHEST)
    return -(quadratic.num_units / 2 * square + linear)


def excess_utility(quadratic: Quadratic, w: jax.Array) -> jax.Array:
    """max U - U(w) >= 0; not private."""
    x = uncolor(quadratic.precision, w) + quadratic.whitened_sum / quadratic.num_units
    return quadratic.num_units / 2 * jnp.vdot(x, x, precision=_HIGHEST)


def log_density(quadratic: Quadratic, w: jax.Array, noise_std: jax.Array | float) -> jax.Array:
    """Log density of `draw` at w; not private at a release."""
    k = quadratic.precision.dim
    beta = inverse_temperature(quadratic.num_units, noise_std)
    # On the host where it can be: N and k are numbers, and their logarithms need no program.
    log_normaliser = k / 2 * np.log(2 * np.pi / quadratic.num_units) - k / 2 * jnp.log(beta)
    return -beta * excess_utility(quadratic, w) - log_normaliser + quadratic.precision.log_det / 2


def draw(key: jax.Array, quadratic: Quadratic, noise_std: jax.Array | float) -> jax.Array:
    """One exact draw of the exponential mechanism, (k,): the private release.

    Args:
      key: secret, typed.
      quadratic: utility.
      noise_std: C z, with z from `privacy.noise_multiplier`.

    Formal guarantee: mu-GDP with mu = Delta/(C z) for real arithmetic and ideal Gaussian noise; see the module.
    """
    return release_step(quadratic, noisy_sum(key, quadratic.whitened_sum, noise_std))


def draws(key: jax.Array, quadratic: Quadratic, noise_std: jax.Array | float, num_draws: int) -> jax.Array:
    """Independent exact draws, (m, k), in the matrix products of one solve.

    Args:
      key: secret, typed.
      quadratic: utility.
      noise_std: C z of each draw.
      num_draws: m.

    Formal guarantee: sqrt(m) mu-GDP with the mu of one `draw`: each is a release of its own, so calibrate the noise for
    `mu / sqrt(m)`.
    """
    noise_std = jnp.asarray(noise_std, quadratic.whitened_sum.dtype)
    noise_key = protecting_key(key, quadratic.whitened_sum, noise_std)
    shape = (num_draws, quadratic.precision.dim)
    noisy = quadratic.whitened_sum + noise_std * jax.random.normal(noise_key, shape, quadratic.whitened_sum.dtype)
    return jax.vmap(lambda x: release_step(quadratic, x))(noisy)


def noisy_sum(key: jax.Array, whitened_sum: jax.Array, noise_std: jax.Array | float) -> jax.Array:
    """S + C z xi (k,): private, and all that the release knows of the data."""
    noise_std = jnp.asarray(noise_std, whitened_sum.dtype)
    noise_key = protecting_key(key, whitened_sum, noise_std)
    return whitened_sum + noise_std * jax.random.normal(noise_key, whitened_sum.shape, whitened_sum.dtype)


def noisy_whitened_sum(
    key: jax.Array, total: Words, precision: Precision, step: jax.Array | float, noise_std: jax.Array | float
) -> jax.Array:
    """S + C z xi (k,) from the exact sum of `clipping.unit_sum`: private, and all that the release knows of the data.

    Noise is rounded to the sum's grid and added to it in integers; floats begin after that. So the rounding of
    whitening, and of sums beyond 2^24 steps, is post-processing.

    Args:
      key: secret, typed.
      total: (c,) in steps.
      precision: public.
      step: what one is worth, `clipping.step_size`.
      noise_std: C z, at most 2^27 C.

    Formal guarantee: mu-GDP with mu = Delta/(C z), rounding included, for ideal Gaussian noise: the integers are those
    of `total` plus real noise, rounded.
    """
    dtype = precision.log_det.dtype
    step = jnp.asarray(step, dtype)
    noise_std = jnp.asarray(noise_std, dtype)
    noise_key = protecting_key(key, total.high, total.low, step, noise_std)
    noise = shaped_noise(precision, jax.random.normal(noise_key, total.high.shape, dtype))
    noise_in_steps = integers.from_float(noise * (noise_std / step))
    return whiten_sum(precision, integers.add(total, noise_in_steps), step)


def release_step(quadratic: Quadratic, noisy_sum: jax.Array) -> jax.Array:
    """-(1/N) R^{-T} (S + C z xi): post-processing of the noisy sum with public numbers."""
    return -color(quadratic.precision, noisy_sum) / quadratic.num_units


def protecting_key(key: jax.Array, *arrays: jax.Array) -> jax.Array:
    """The key folded with a 64-bit digest of the arrays that its noise will protect.

    Two noisy sums with one noise reveal their difference exactly. The noise therefore depends on what it protects, here
    on all that the noisy sum is made of: a key reused on other data, or with another noise scale, draws fresh noise (up
    to a collision of probability 2^-64), and the same call repeated gives the same release. The digest is the XOR of
    threefry blocks, one of each word and its position, as in an XOR MAC (Bellare, Guerin and Rogaway, CRYPTO 1995), so
    that it reveals nothing itself; the key is the block of the digest. A key of another generator becomes a threefry
    key first.
    """
    secret = jax.random.key_data(as_threefry(key))
    words = jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.uint32).ravel() for x in arrays])
    positions = jnp.arange(len(words), dtype=jnp.uint32)
    blocks = threefry_2x32(secret, jnp.concatenate([positions, words])).reshape(2, -1)
    digest = jax.lax.reduce(blocks, np.uint32(0), jax.lax.bitwise_xor, (1,))
    return jax.random.wrap_key_data(threefry_2x32(secret, digest), impl=THREEFRY)
