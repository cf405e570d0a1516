"""The public side of a release: where to tune, precision, clip norm, length, rounds, from a survey of public records.

One rule, with nothing to tune on private data:

* *Precision*: M = (H + lambda I)^{1/2}, scaled to a largest eigenvalue of 1, with the surveyed curvature H. The
  exponent 1/2 lies between clipping in the parameter norm (0) and in the curvature norm (1): with 1 noise swamps the
  low curvatures, with 0 the high ones.
* *Clip norm*: the .9 quantile of the public norms |M^{-1/2} g|.
* *Where*: in all parameters, or in the leading directions alone, where more is expected to be gained under the prior of
  the shift. The others hold about half of the gradients' energy, and so of the clip norm, and most of the noise; where
  noise is large they cost more than they hold.
* *Length*: at most four times what makes the noise of all rounds together, added to the anchor, raise the *public* loss
  by a fixed small fraction of its root mean square; within that, what the releases deserve (`flow`).
* *Rounds*: as many as keep each step of the length expected before the first within one over the largest private
  curvature expected, 8 to 12; where that would take more than 24, as many as keep it within two, up to 24. What the
  releases then deserve may be up to four times as long.

A round is then one exact draw with precision M, followed for a step of the flow.

What was measured and not kept. One draw with precision H + lambda I needs a damping near the largest curvature to be
safe and then gains a fifth as much. Correcting the clipped sum by the public clipping bias helped where clipping was
heavy (.7 quantile, images) and hurt where the classes are unequal, as did any clip norm below the .9 quantile. Pooled
Newton steps matched this rule at small budgets and failed at large ones on networks, which are no quadratics there.
Steps bounded by the public curvature overshot in every round on PhysioNet by ICU, where the private one is five times
as steep along the shift. Six rounds in place of twelve lost .001 to .003 at epsilon 8, and twelve in place of 24 as
much at 10,000 records; a length of its own for the
block of all other directions changed nothing. Eight or 32 leading directions in place of 128 lost more on images than
they saved in noise. To count on half the shift in all other directions, as was found in the arena, gained .001 to .002
there in cells of middling noise and lost .02 to .1 under a heavy shift, which the leading directions cannot follow.
Block James-Stein shrinkage of the released sum over-shrinks; a private diagonal curvature (T7) cost more budget than it
returned.

The rule is ours. It reads N and the budget, which are public, and is deterministic given its key.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax import flow
from qexp_jax import precision as precisions
from qexp_jax import survey as surveys
from qexp_jax.flow import Spectrum
from qexp_jax.precision import Precision
from qexp_jax.records import LossFn, Params, Record
from qexp_jax.subspace import Subspace
from qexp_jax.survey import Survey

_DAMPING = 0.01
_CLIP_QUANTILE = 0.9
_SMALLEST_CLIP_NORM = 1e-18  # C, C z and sums of C stay within float32
_NOISE_COST = 0.006
_LONGEST = 4.0
_LEAST_ROUNDS, _COMMON_ROUNDS, _MOST_ROUNDS = 8, 12, 24
_PRIVATE_CURVATURE = 1.5  # private over public curvature: 1 to 2.4 was found under shift
_EXPECTED_SHIFT = 1.5e-3


class Plan(NamedTuple):
    """What the rounds need beside the private records; all of it public.

    Attributes:
      subspace: P, with orthonormal columns.
      precision: M, low rank plus identity.
      l2_clip_norm: C, in the norm whitened by `precision`.
      damping: lambda, in units of curvature.
      rounds: T.
      spectrum: curvature and moments in whitened coordinates, for `flow`.
      longest: most that the steps of all rounds may add up to.
      expected_multiples: (r + 1,) of a draw that a round follows, where the private gradient is as far from the public
        one as is common.
      evidence: the public numbers that decided, for the certificate.
    """

    subspace: Subspace
    precision: Precision
    l2_clip_norm: float
    damping: float
    rounds: int
    spectrum: Spectrum
    longest: float
    expected_multiples: jax.Array
    evidence: dict[str, Any]


class Candidate(NamedTuple):
    """A space to tune in, and what follows from it.

    Attributes:
      subspace: P.
      precision: M.
      l2_clip_norm: C.
      spectrum: in whitened coordinates.
      longest: most that the steps of all rounds may add up to.
      length: what the common shift deserves.
      gain: the loss per record that it is expected to save.
      tolerance: noise that the public loss tolerates, in units of the whitened draw.
      clipped: share of public units above C.
    """

    subspace: Subspace
    precision: Precision
    l2_clip_norm: float
    spectrum: Spectrum
    longest: float
    length: float
    gain: float
    tolerance: float
    clipped: float


def make_plan(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    public: Record,
    clip_loss_fn: LossFn,
    public_units: Record,
    *,
    num_units: int,
    noise_multiplier: float,
    rounds: int | None = None,
    precision_rank: int = 128,
    subspace: Subspace | None = None,
    subspace_dim: int | None = None,
    damping: float | None = None,
    l2_clip_norm: float | None = None,
) -> Plan:
    """Chooses what is not given.

    Args:
      key: public randomness: which records, which trial noise.
      loss_fn: loss of one record, for the curvature.
      params: the anchor.
      public: public records.
      clip_loss_fn: loss of one unit, whose gradients are clipped.
      public_units: public units; the same as `public` where a unit is a record.
      num_units: N.
      noise_multiplier: z of the whole budget spent in one round.
      rounds: T, in place of the choice.
      precision_rank: at most how many leading directions have their curvature measured; as many public gradients.
      subspace: public subspace to tune in. By default all parameters, or a count-sketch of them where a sample of
        gradients would not fit; or the leading directions in it.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda, in units of curvature.
      l2_clip_norm: C in the norm |M^{-1/2} g|, where M has largest eigenvalue 1.

    Raises:
      ValueError: if the public curvature is unusable, or public gradients vanish; no private record has been read then.
    """
    *keys, trial_key = jax.random.split(key, 4)
    surveyed = surveys.survey(
        keys, loss_fn, params, public, clip_loss_fn, public_units,
        precision_rank=precision_rank, subspace=subspace, subspace_dim=subspace_dim,
    )  # fmt: skip
    damping = _DAMPING * float(surveyed.curvature.max()) if damping is None else damping
    candidate = functools.partial(
        _candidate, trial_key, loss_fn, params,
        damping=damping, l2_clip_norm=l2_clip_norm, num_units=num_units, noise_multiplier=noise_multiplier,
    )  # fmt: skip
    chosen, gains = candidate(surveyed), {}
    if subspace is None and subspace_dim is None and surveyed.dims[-1] > 0:
        leading = candidate(surveys.leading_alone(surveyed))
        gains = {"expected_gain_all": chosen.gain, "expected_gain_leading": leading.gain}
        chosen = chosen if chosen.gain > leading.gain else leading
    spectrum, largest_curvature = chosen.spectrum, float(chosen.spectrum.curvature.max())
    if rounds is None:
        rounds = _rounds(chosen.length * largest_curvature)
    evidence = gains | {
        "largest_curvature": largest_curvature,
        "leading_share_of_energy": float(jnp.sum(spectrum.moments[:-1]) / jnp.vdot(spectrum.dims, spectrum.moments)),
        "tolerated_noise": chosen.tolerance,
        "longest_length": chosen.longest,
        "expected_length": chosen.length,
        "public_fraction_clipped": chosen.clipped,
    }
    multiples, _ = flow.advance(flow.before_release(spectrum), spectrum, chosen.length / rounds)
    return Plan(
        chosen.subspace, chosen.precision, chosen.l2_clip_norm, damping, rounds,
        spectrum, chosen.longest, multiples, evidence,
    )  # fmt: skip


def _rounds(length: float) -> int:
    """T for a length in units of one over the largest curvature."""
    most = np.clip(np.ceil(length / 2), _COMMON_ROUNDS, _MOST_ROUNDS)
    return int(np.clip(np.ceil(length), _LEAST_ROUNDS, most))


def _candidate(
    key, loss_fn, params, surveyed: Survey, *, damping, l2_clip_norm, num_units, noise_multiplier
) -> Candidate:
    """Tuning in the surveyed space."""
    curvature, space = surveyed.curvature, surveyed.subspace
    shape = np.sqrt((curvature + damping) / (curvature.max() + damping))
    values = jnp.asarray(shape[:-1] - shape[-1], surveyed.directions.dtype)
    precision = precisions.low_rank(shape[-1], surveyed.directions, values)
    norms, clip_norm, moments = _clipping(surveyed.squares / shape, surveyed.dims, l2_clip_norm)
    tolerance, cost = surveys.tolerated_noise(key, loss_fn, params, space, precision, surveyed.tried, _NOISE_COST)
    curvature = _whitened_curvature(curvature / shape, surveyed.dims, 2 * cost / tolerance**2)
    numbers = curvature, moments, surveyed.dims, *flow.shift_prior()
    spectrum = Spectrum(surveyed.directions, *(jnp.asarray(x, values.dtype) for x in numbers))
    noise_std = clip_norm * noise_multiplier / num_units
    longest = _LONGEST * tolerance / noise_std
    length, gain = map(float, _expected(spectrum, noise_std**2, num_units, longest))
    clipped = float(np.mean(norms > clip_norm))
    return Candidate(space, precision, clip_norm, spectrum, longest, length, gain, tolerance, clipped)


def _clipping(squares, dims, clip_norm):
    """Public norms, the clip norm, and the second moments of clipped gradients (r + 1,); all whitened."""
    norms = np.sqrt(squares @ dims)
    clip_norm = float(np.quantile(norms, _CLIP_QUANTILE)) if clip_norm is None else clip_norm
    if not _SMALLEST_CLIP_NORM <= clip_norm <= 1 / _SMALLEST_CLIP_NORM:
        raise ValueError(f"Expected a clip norm in [1e-18, 1e18], found {clip_norm}; give l2_clip_norm.")
    kept = np.minimum(1, clip_norm / np.maximum(norms, np.finfo(np.float64).tiny))
    moments = np.mean(squares * kept[:, None] ** 2, axis=0)
    return norms, float(np.float32(clip_norm)), np.maximum(moments, 1e-9 * moments.max())


def _whitened_curvature(curvature, dims, trace):
    """K (r + 1,), for the private quadratic.

    The rest has what the leading directions leave of the trace that the tolerated noise shows, but not less than its
    second moments say, and not more than a leading direction.
    """
    leading, rest = curvature[:-1], curvature[-1]
    remainder = (trace - np.sum(leading)) / max(1, dims[-1])
    curvature = np.append(leading, min(max(rest, remainder), leading.min()))
    return _PRIVATE_CURVATURE * np.maximum(curvature, 1e-6 * curvature.max())


@jax.jit
def _expected(spectrum, noise_var, num_units, longest):
    """The length that the common shift deserves, and what the best one gains: mean over the prior of the shift."""

    def best(shift):
        return flow.best_length(shift * spectrum.moments, spectrum, noise_var, num_units, longest)

    def gain(shift):
        lengths, signals = (0.0, best(shift)), shift * spectrum.moments
        before, after = (flow.excess(x, signals, spectrum, noise_var, num_units) for x in lengths)
        return jnp.maximum(before - after, 0)

    return best(_EXPECTED_SHIFT), jnp.vdot(jax.nn.softmax(spectrum.log_prior), jax.vmap(gain)(spectrum.shifts))
