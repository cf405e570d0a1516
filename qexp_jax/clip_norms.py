"""How large the clip norm: what clipping loses of a shift, against what the noise of keeping it costs. All public.

Noise is in proportion to C, so that a small C is cheap; but what is clipped away is never followed, however long the
flow, and where noise is small that is the larger loss. Both are in one expected excess. A new population re-weights
records, and so moves the mean of whatever is made of their gradients by tau times its second moment (`flow`). The mean
of all gradients becomes g_j, of which clipping keeps the mean of f_i g_ij, f_i = min(1, C / |g_i|). A flow of length L
along what is kept, with e_j = 1 - exp(-L K_j), leaves a gradient of expected square

    tau mean_i( g_ij^2 (1 - e_j f_i)^2 ) = tau ( A_j - 2 e_j B_j + e_j^2 v_j ),

where A, B and v are the public means of g_ij^2, f_i g_ij^2 and f_i^2 g_ij^2. Even without a shift clipping *pulls*:
where the mean of all gradients is 0, that of the clipped ones is some b_j, and a flow along it moves away from the
least loss, which adds e_j^2 b_j^2. Over 2 K_j, and with what `flow` counts for sampling and noise, that is the excess;
`least` is its minimum over L.

The mean of what clipping takes was measured on private gradients: at tau = .005 its square is .8 to 1 times what this
says on MNIST by writers, 1 to 4 times on PhysioNet 2012 by ICU, and a tenth without a shift, as tau is. Of the .9, .95
and .98 quantiles the excess picks the larger ones from about 4000 records at epsilon 8 or 10,000 at epsilon 2, where
they gained .0005 to .005 against .9; above .9 everywhere lost up to .007 at small budgets.

A pull makes it pick them earlier. Where it stands out of its sampling error, the square of that of private records was
found 5 to 7 times the public one's under a shift (.9 quantile), for more of them are clipped, and one to two times
without; six are counted. On PhysioNet by ICU, where one class is rare, the mean clipped gradient of an MLP's private
records has in the leading directions a cosine with the mean gradient of -.04 at the .9 quantile, .45 at .95 and .93 at
.98; on MNIST after few epochs of .92 to .99.

What of b the public records show is taken off every release, shrunk by the share of sampling error in it (`pull`). That
leaves nothing of a pull where nothing shifts, and under a shift about half of it. Judged by other public records, what
is left of the public pull costs a quadratic .3 to .5 times what it did on PhysioNet and .5 to 1.8 times on images,
whose mean is mostly sampling error; taken off whole, half as much with an MLP on PhysioNet, and 2 to 30 times as much
elsewhere. On PhysioNet by ICU (30 seeds) the test loss fell by .0023 +- .0003 with an MLP and by .0005 +- .0003 with a
linear model, and the AUROC changed by .0000 +- .0002.

*Under a heavy shift* most private units are clipped, whatever the quantile, and a walk of many steps corrects itself
but for the pull that clipping has where the loss is least: there the mean of all gradients is 0 and that of the clipped
ones is not. It is read off the public records, whose anchor is such a place. At a share s of C, over s, the pull is

    b_j = mean_i( (min(1/s, C / |g_i|) - min(1, C / |g_i|)) g_ij ),

and a flow of length L pays e_j^2 b_j^2 / (2 K_j) for it, as it does for noise of variance s^2 p_j
(`share_under_heavy_shift`). Where classes are as good as balanced pulls cancel, where one is rare they do not. The last
quarter of a walk clips at C, whole, and takes the pull back. On MNIST turned by 40 degrees (4000 records, ten seeds)
that took an MLP from .8805 to .8844 and a CNN from .9105 to .9134 at epsilon 8 and kept both at epsilon 1; 52 small
tasks changed by +.0014 +- .0010. Without the last quarter the loss on PhysioNet was up to .1 higher.

The derivation is ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax import flow
from qexp_jax.flow import Spectrum

_PRIVATE_PULL = 6.0  # private over public squares of pulls
_SHARES = np.linspace(1, 0.25, 16)
_PULL_OF_SHARE = 2.0  # the like, but the last quarter of a walk takes the pull back


class Gradients(NamedTuple):
    """Public units' whitened gradients.

    Attributes:
      leading: (n, r) along the leading directions.
      squares: (n, r + 1) in each leading direction, and the mean of all others.
      dims: (r + 1,) how many coordinates each entry stands for, 0 where the parameters are held fixed.
    """

    leading: np.ndarray
    squares: np.ndarray
    dims: np.ndarray


class Clipped(NamedTuple):
    """What a clip norm leaves of public units' gradients, whitened.

    Attributes:
      l2_clip_norm: C.
      fraction: share of the units that are clipped.
      whole: (r + 1,) A, second moments of gradients.
      mixed: (r + 1,) B, means of products of gradients and clipped gradients.
      moments: (r + 1,) v, second moments of clipped gradients.
      pulls: (r + 1,) b^2, squares of what clipping takes from the mean gradient, less those of its sampling error; in
        all others nobody measured them, and they are 0.
    """

    l2_clip_norm: float
    fraction: float
    whole: np.ndarray
    mixed: np.ndarray
    moments: np.ndarray
    pulls: np.ndarray


def norms(gradients: Gradients) -> np.ndarray:
    """(n,) of the units' gradients."""
    return np.sqrt(gradients.squares @ gradients.dims)


def clipped(gradients: Gradients, l2_clip_norm: float) -> Clipped:
    """The moments that a clip norm leaves.

    >>> gradients = Gradients(np.zeros((2, 0)), np.array([[9.0], [1.0]]), np.ones(1))
    >>> found = clipped(gradients, 1.5)
    >>> float(found.whole[0]), float(found.mixed[0]), float(found.moments[0]), found.fraction
    (5.0, 2.75, 1.625, 0.5)
    """
    squares, whole_norms = gradients.squares, norms(gradients)
    kept = _kept(whole_norms, l2_clip_norm)
    shares = kept[:, None]
    whole, mixed, moments = (np.mean(x, axis=0) for x in (squares, squares * shares, squares * shares**2))
    mean, error = _added(gradients.leading, kept)
    fraction = float(np.mean(whole_norms > l2_clip_norm))
    return Clipped(l2_clip_norm, fraction, whole, mixed, moments, np.append(mean**2 - error, 0))


def pull(gradients: Gradients, l2_clip_norm: float, curvature: np.ndarray) -> np.ndarray:
    """An estimate of b (r,), what clipping adds to the mean gradient along the leading directions.

    The public mean, shrunk by the share of sampling error in what it costs a quadratic (James and Stein, 1961).

    Args:
      gradients: public.
      l2_clip_norm: C.
      curvature: (r,) K of the leading directions.

    >>> g = np.tile([[3.0], [-1.0], [-2.0]], (1000, 1))
    >>> pull(Gradients(g, np.hstack([g**2, 0 * g]), np.array([1, 0])), 1.5, np.ones(1)).round(3)
    array([-0.333])
    """
    mean, error = _added(gradients.leading, _kept(norms(gradients), l2_clip_norm))
    cost = np.sum(mean**2 / curvature)
    return max(0, 1 - np.sum(error / curvature) / cost) * mean if cost > 0 else mean


def _kept(whole_norms, l2_clip_norm):
    """(n,) the share of each gradient that clipping keeps."""
    return np.minimum(whole_norms, l2_clip_norm) / np.maximum(whole_norms, np.finfo(np.float64).tiny)


def _added(leading, kept):
    """What clipping adds to the mean gradient, and the variance of that mean (r,)."""
    added = (kept - 1)[:, None] * leading
    return np.mean(added, axis=0), np.var(added, axis=0) / len(added)


def excess(
    length: jax.Array | float,
    shift: float,
    clipped: Clipped,
    spectrum: Spectrum,
    noise_var: jax.Array | float,
    num_units: int,
) -> jax.Array:
    """The expected excess of a flow of one `length` along clipped gradients, from the minimiser of all of them.

    Args:
      length: L.
      shift: tau.
      clipped: public.
      spectrum: public; its moments are not looked at.
      noise_var: variance in each coordinate of the mean gradient's noise.
      num_units: N.
    """
    curvature = flow.signal_curvature(spectrum)
    followed = -jnp.expm1(-length * curvature)
    left = shift * (clipped.whole - 2 * followed * clipped.mixed + followed**2 * clipped.moments)
    spectrum = spectrum._replace(moments=jnp.asarray(clipped.moments))
    paid = flow.excess(length, jnp.zeros_like(curvature), spectrum, noise_var, num_units)
    # Squares less those of their sampling error: a negative sum of them says that there is no pull.
    pull = jnp.maximum(jnp.sum(clipped.pulls * followed**2 / (2 * curvature)), 0)
    return jnp.sum(spectrum.dims * left / (2 * curvature)) + _PRIVATE_PULL * pull + paid


@jax.jit
def least(
    shift: float,
    clipped: Clipped,
    spectrum: Spectrum,
    noise_var: jax.Array | float,
    num_units: int,
    longest: jax.Array | float,
) -> jax.Array:
    """The least `excess` over lengths up to `longest`."""
    return jax.vmap(lambda length: excess(length, shift, clipped, spectrum, noise_var, num_units))(
        flow.lengths_up_to(longest)
    ).min()


def share_under_heavy_shift(
    gradients: Gradients, l2_clip_norm: float, spectrum: Spectrum, noise_var: float, length: float
) -> float:
    """The share of C, from 1 down to a quarter, at which pull and noise together cost a flow least.

    The pull is counted twice, and in the leading directions alone.

    Args:
      gradients: public.
      l2_clip_norm: C.
      spectrum: public; its moments are not looked at.
      noise_var: variance in each coordinate of the mean gradient's noise where C is whole.
      length: L.
    """
    curvature, dims = (np.asarray(x, np.float64) for x in (spectrum.curvature, spectrum.dims))
    paid = np.expm1(-length * curvature) ** 2 / (2 * curvature)
    reach, leading = l2_clip_norm / np.maximum(norms(gradients), np.finfo(np.float64).tiny), gradients.leading

    def cost(share):
        added = (np.minimum(1 / share, reach) - np.minimum(1, reach)) @ leading / len(leading)
        return _PULL_OF_SHARE * (added**2 @ paid[:-1]) + share**2 * noise_var * (dims @ paid)

    return float(min(_SHARES, key=cost))
