"""How a round clips, draws and moves: one of the plan's preconditioners, which the releases before it choose.

    clip norm    C, the .95 quantile of the public norms |M^{-1/2} g|. What clipping adds to the public mean gradient
                 is taken off every release.
    what moves   a round tunes all parameters or, with an infinite M elsewhere, the leading directions alone: they hold
                 about half of a gradient's energy and little of its noise. The one of less expected excess, given the
                 releases before it (`choose`).

**A heavy shift** is one whose expected size, given the releases, exceeds .02. Far from the anchor no public
quadratic says how much there is to gain. What is left of the budget is then split over so many rounds that there are 80
in all, steps may be twice as long, units are clipped at .7 C, since most are clipped there, and a round takes the step
that lowers the loss most by itself (`step_size.best_step`). It tunes all parameters, unless no step of all is expected
to lower the loss; but one round in ten looks at all again, where more may have emerged.

The rule is ours; its numbers are in `rule`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic import step_size
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.empirical_bayes import pooled_shift, pooled_signal
from qexp_jax.quadratic.posterior import CurvatureEstimate, Posterior
from qexp_jax.quadratic.precision import Precision
from qexp_jax.quadratic.rule import RULE

_SMALLEST_CLIP_NORM = 1e-18  # C, C z and sums of C stay within float32


class Preconditioner(NamedTuple):
    """How a round clips, draws and moves; public. A plan holds several, with a leading axis.

    Attributes:
      eigenvalues: (r + 1,) of M, in the estimate's directions and in all others.
      tuned: (r + 1,) one, or zero where M is infinite, which holds the parameters fixed.
      l2_clip_norm: C, in the norm whitened by M.
      longest: most that the steps of all rounds may add up to, unless the shift is heavy.
      bias: (r,) what clipping at C adds to the public mean gradient along the leading directions; a round takes it off
        the mean it released. Of a round's preconditioner 0 under a heavy shift.
      share: of a round's preconditioner, what its C is a share of C: less than one under a heavy shift. Sums are
        divided by it, so that gradients that are clipped either way count the same.
      scale: A / M, where the model curvature A is that multiple of M (`PlanOptions.one_draw`); 0 where the releases
        decide how far a draw is followed.
    """

    eigenvalues: jax.Array
    tuned: jax.Array
    l2_clip_norm: jax.Array
    longest: jax.Array
    bias: jax.Array
    share: jax.Array
    scale: jax.Array


class Candidate(NamedTuple):
    """A `Preconditioner` but for its share, on the host and in double precision."""

    eigenvalues: np.ndarray
    tuned: np.ndarray
    l2_clip_norm: float
    longest: float
    bias: np.ndarray


def precision_of(directions: Directions | jax.Array, preconditioner: Preconditioner) -> Precision:
    """M of a preconditioner; which form it has, all processes read off the same releases."""
    leading, rest = preconditioner.eigenvalues[:-1], preconditioner.eigenvalues[-1]
    if float(preconditioner.tuned[-1]) > 0:
        return precisions.spectral(rest, directions, leading)
    return precisions.leading(directions, leading)


@jax.jit
def choose(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    preconditioners: Preconditioner,
    noise_multiplier: jax.Array | float,
    num_units: int,
    rounds: jax.Array | float,
) -> tuple[Preconditioner, jax.Array]:
    """The preconditioner of least expected excess given all releases, and its length: post-processing (T5).

    Under a heavy shift the first, of all parameters, where its best step is expected to lower the loss or none of the
    last nine rounds tuned all; else the last. Units are then clipped at a share of C.

    Args:
      posterior: what the releases say.
      estimate: public.
      preconditioners: of the plan.
      noise_multiplier: z of all rounds together, that of one round over sqrt(T).
      num_units: N.
      rounds: how many such as the next one would spend the whole budget.
    """
    signals = pooled_signal(posterior, estimate, num_units)
    heavy = is_heavy(posterior, estimate, num_units)
    noise_vars = (preconditioners.l2_clip_norm * noise_multiplier / num_units) ** 2
    share = jnp.where(heavy, RULE.heavy_clip, preconditioners.share)
    longer = jnp.where(heavy, RULE.heavy_longer, 1)
    preconditioners = preconditioners._replace(
        l2_clip_norm=share * preconditioners.l2_clip_norm,
        share=share,
        longest=longer * preconditioners.longest,
        bias=jnp.where(heavy, 0, preconditioners.bias),
    )

    def best(preconditioner, noise_var):
        return step_size.best_length(
            signals, estimate, noise_var, num_units, preconditioner.longest, preconditioner.tuned
        )

    lengths, costs = jax.vmap(best)(preconditioners, noise_vars)
    of_all = jax.tree.map(lambda x: x[0], preconditioners)
    _, change = step_size.best_step(
        posterior, estimate, rounds * noise_vars[0], num_units, of_all.longest / rounds, of_all.tuned
    )
    must_look = posterior.idle[-1] >= RULE.heavy_hold
    far_from_anchor = jnp.where(must_look | (change < 0), 0, len(costs) - 1)
    chosen = jnp.where(heavy, far_from_anchor, jnp.argmin(costs))
    return jax.tree.map(lambda x: x[chosen], preconditioners), lengths[chosen]


@jax.jit
def is_heavy(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """Whether the releases show a shift that asks for more rounds and longer ones: post-processing (T5)."""
    return pooled_shift(posterior, estimate, num_units) > RULE.heavy_shift


def candidates(
    leading: np.ndarray,
    squares: np.ndarray,
    dims: np.ndarray,
    eigenvalues: np.ndarray,
    curvature: np.ndarray,
    tolerances: tuple[float, float],
    per_unit: float,
    l2_clip_norm: float | None,
) -> list[Candidate]:
    """Those among which a round chooses: of all parameters, and of the leading directions where there are others.

    Args:
      leading: (n, r) whitened gradients of public units along the leading directions.
      squares: (n, r + 1) of these gradients: in each leading direction, and the mean of all others.
      dims: (r + 1,) how many coordinates each entry stands for.
      eigenvalues: (r + 1,) of M.
      curvature: (r + 1,) in whitened coordinates.
      tolerances: of noise in all parameters, and in the leading directions alone.
      per_unit: z / N.
      l2_clip_norm: C in place of the quantile.

    Raises:
      ValueError: if C would leave float32.
    """
    whole = np.ones_like(dims)
    leading_alone = np.append(whole[:-1], 0)
    found = []
    for tuned, tolerance in zip((whole, leading_alone), tolerances, strict=True):
        squared_norms = squares @ (dims * tuned)
        clip_norm = _clip_norm(squared_norms, l2_clip_norm)
        found.append(
            Candidate(
                eigenvalues=np.where(tuned, eigenvalues, np.inf),
                tuned=tuned,
                l2_clip_norm=clip_norm,
                longest=tolerance / (clip_norm * per_unit),
                bias=_clipping_bias(leading, kept_shares(squared_norms, clip_norm), curvature[:-1]),
            )
        )
    return found if dims[-1] > 0 else found[:1]


def multiples_of(preconditioner: Preconditioner, multiples: jax.Array) -> jax.Array:
    """Of a draw that are followed (r + 1,): one over A / M where A is a multiple of M, else `multiples`."""
    scale = preconditioner.scale
    whole_draw = preconditioner.tuned / jnp.where(scale > 0, scale, 1)
    return jnp.where(scale > 0, whole_draw, multiples)


def kept_shares(squared_norms: np.ndarray, clip_norm: float) -> np.ndarray:
    """(n,) the share of each gradient that clipping keeps."""
    norms = np.sqrt(squared_norms)
    return np.minimum(norms, clip_norm) / np.maximum(norms, np.finfo(np.float64).tiny)


def _clip_norm(squared_norms: np.ndarray, given: float | None) -> float:
    """C, a float32."""
    clip_norm = np.sqrt(np.quantile(squared_norms, RULE.clip_quantile)) if given is None else given
    if not _SMALLEST_CLIP_NORM <= clip_norm <= 1 / _SMALLEST_CLIP_NORM:
        raise ValueError(f"Expected a clip norm in [1e-18, 1e18], found {clip_norm}; give l2_clip_norm.")
    return float(np.float32(clip_norm))


def _clipping_bias(leading: np.ndarray, kept: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """What clipping adds to the mean gradient along the leading directions (r,), as far as it is no sampling error.

    The public mean of it, shrunk by the share of its sampling error in what it costs a quadratic (James and Stein,
    1961). Where errors are skewed it moves a model that fits, and without a shift all of it is known.
    """
    added = (kept - 1)[:, None] * leading
    mean = np.mean(added, axis=0)
    error = np.var(added, axis=0) / len(added)
    cost = np.sum(mean**2 / curvature)
    if cost > 0:
        return max(0, 1 - np.sum(error / curvature) / cost) * mean
    return mean
