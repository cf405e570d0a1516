"""How a round clips, draws and moves: one of the plan's preconditioners, which the releases before it choose.

    clip norm    C, the .95 quantile of the public norms |M^{-1/2} g|. What clipping adds to the public mean gradient
                 is taken off every release.
    what moves   a round tunes all parameters or, with an infinite M elsewhere, the leading directions alone: they hold
                 about half of a gradient's energy and little of its noise. The one of less expected excess, given the
                 releases before it (`choose`).

**A heavy shift** is one whose expected size, given the releases, exceeds .02. Far from theta_0 no public
quadratic says how much there is to gain. What is left of the budget is then split over so many rounds that there are 80
in all, steps may be twice as long, units are clipped at .7 C, since most are clipped there, and a round takes the step
that lowers the loss most by itself (`step_size.best_step`). It tunes all parameters, unless no step of all is expected
to lower the loss; but one round in ten looks at all again, where more may have emerged.

The rule is ours; its numbers are in `rule`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.numerics.compilation import FEW, compiled
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic import step_size
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.empirical_bayes import pooled_shift, pooled_signal
from qexp_jax.quadratic.posterior import CurvatureEstimate, Posterior
from qexp_jax.quadratic.precision import Precision
from qexp_jax.quadratic.rule import RULE
from qexp_jax.quadratic.whitened import Whitened

_SMALLEST_CLIP_NORM = 1e-18  # C, C z and sums of C stay within float32
# Standard deviations of the noise in the mean gradient; products of four such numbers stay within float32.
_SMALLEST_NOISE = 1e-15
_LARGEST_NOISE = 1e11


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


class Choice(NamedTuple):
    """What the releases choose for a round.

    Attributes:
      preconditioner: with the clip norm that the round uses.
      multiples: (r + 1,) F of one of as many rounds of the length that all of them together deserve.
      heavy: whether the shift is.
    """

    preconditioner: Preconditioner
    multiples: jax.Array
    heavy: jax.Array


class Candidate(NamedTuple):
    """A `Preconditioner` but for its share, on the host and in double precision."""

    eigenvalues: np.ndarray
    tuned: np.ndarray
    l2_clip_norm: float
    longest: float
    bias: np.ndarray


def precision_of(directions: Directions | jax.Array, preconditioner: Preconditioner) -> Precision:
    """M of a preconditioner (4); which form it has, all processes read off the same releases."""
    leading = preconditioner.eigenvalues[:-1]
    rest = preconditioner.eigenvalues[-1]
    # Made of releases, so it may be branched on. A traced branch would not do: sums have k coordinates or r.
    if float(preconditioner.tuned[-1]) > 0:
        return precisions.spectral(rest, directions, leading)
    return precisions.leading(directions, leading)


@functools.partial(compiled, few=FEW)
def choose(
    posterior: Posterior,
    estimate: CurvatureEstimate,
    preconditioners: Preconditioner,
    noise_multiplier: jax.Array | float,
    num_units: int,
    rounds: jax.Array | float,
) -> Choice:
    """The preconditioner of least expected excess given all releases: post-processing (T5).

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
    # At all of C: a round divides its sum by the share of C at which it clips, and so its noise.
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
    # One of so many rounds, each of which has as much of the budget, has as many times the variance of all together.
    noise_var = rounds * noise_vars[0]
    _, change = step_size.best_step(posterior, estimate, noise_var, num_units, of_all.longest / rounds, of_all.tuned)
    must_look = posterior.idle[-1] >= RULE.heavy_hold
    far_away = jnp.where(must_look | (change < 0), 0, len(costs) - 1)
    chosen = jnp.where(heavy, far_away, jnp.argmin(costs))
    best_one = jax.tree.map(lambda x: x[chosen], preconditioners)
    multiples, _ = step_size.advance(posterior, estimate, lengths[chosen] / rounds, num_units, best_one.tuned)
    return Choice(best_one, multiples_of(best_one, multiples), heavy)


@jax.jit
def is_heavy(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """Whether the releases show a shift that asks for more rounds and longer ones: post-processing (T5)."""
    return pooled_shift(posterior, estimate, num_units) > RULE.heavy_shift


def candidates(whitened: Whitened, per_unit: float, l2_clip_norm: float | None) -> list[Candidate]:
    """Those among which a round chooses: of all parameters, and of the leading directions where there are others.

    Args:
      whitened: public measurements.
      per_unit: z / N.
      l2_clip_norm: C in place of the quantile.

    Raises:
      ValueError: if C, or the noise of a mean gradient, would leave float32.
    """
    whole = np.ones_like(whitened.dims)
    leading_alone = np.append(whole[:-1], 0)
    found = [
        _candidate(whitened, whole, whitened.tolerance, per_unit, l2_clip_norm),
        _candidate(whitened, leading_alone, whitened.tolerance_of_leading, per_unit, l2_clip_norm),
    ]
    _check_noise(found[0].l2_clip_norm * per_unit)
    has_others = whitened.dims[-1] > 0
    return found if has_others else found[:1]


def _candidate(
    whitened: Whitened, tuned: np.ndarray, tolerance: float, per_unit: float, l2_clip_norm: float | None
) -> Candidate:
    """The one that tunes where `tuned` (r + 1,) is one, with a clip norm and a length of its own.

    Args:
      whitened: public measurements.
      tuned: (r + 1,) one, or zero where M is infinite.
      tolerance: scale of the noise there that the public loss tolerates.
      per_unit: z / N.
      l2_clip_norm: C in place of the quantile.
    """
    squared_norms = whitened.squares @ (whitened.dims * tuned)
    clip_norm = _clip_norm(squared_norms, l2_clip_norm)
    kept = kept_shares(squared_norms, clip_norm)
    return Candidate(
        eigenvalues=np.where(tuned, whitened.eigenvalues, np.inf),
        tuned=tuned,
        l2_clip_norm=clip_norm,
        # A flow of length L multiplies the noise, of standard deviation C z / N, by at most L.
        longest=tolerance / (clip_norm * per_unit),
        bias=_clipping_bias(whitened.leading, kept, whitened.curvature[:-1]),
    )


def multiples_of(preconditioner: Preconditioner, multiples: jax.Array) -> jax.Array:
    """F of (5), (r + 1,): one over A / M where A is a multiple of M, else `multiples`."""
    scale = preconditioner.scale
    whole_draw = preconditioner.tuned / jnp.where(scale > 0, scale, 1)
    return jnp.where(scale > 0, whole_draw, multiples)


def kept_shares(squared_norms: np.ndarray, clip_norm: float) -> np.ndarray:
    """(n,) the share min(1, C / |v_i|) of each gradient that clipping keeps (1)."""
    norms = np.sqrt(squared_norms)
    return np.minimum(norms, clip_norm) / np.maximum(norms, np.finfo(np.float64).tiny)


def _clip_norm(squared_norms: np.ndarray, given: float | None) -> float:
    """C, a float32."""
    clip_norm = given
    if clip_norm is None:
        clip_norm = np.sqrt(np.quantile(squared_norms, RULE.clip_quantile))
    if not _SMALLEST_CLIP_NORM <= clip_norm <= 1 / _SMALLEST_CLIP_NORM:
        raise ValueError(f"Expected a clip norm in [1e-18, 1e18], found {clip_norm}; give l2_clip_norm.")
    return float(np.float32(clip_norm))


def _check_noise(noise_std: float) -> None:
    if not _SMALLEST_NOISE <= noise_std <= _LARGEST_NOISE:
        raise ValueError(
            f"Expected noise of {_SMALLEST_NOISE} to {_LARGEST_NOISE} in the mean gradient, found {noise_std}: "
            "multiply the loss by a number that brings its gradients near 1."
        )


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
        cost_of_error = np.sum(error / curvature)
        return max(0, 1 - cost_of_error / cost) * mean
    return mean
