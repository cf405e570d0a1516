"""The public side of a release: metric, clip norm, length and number of rounds, from public records.

With the measured curvature H, N units and noise multiplier z:

    metric       M = (H + lambda I)^{1/2}, scaled to a largest eigenvalue of 1; lambda a hundredth of H's largest. The
                 exponent lies between clipping in the parameters' norm (0), which noise in steep directions ruins, and
                 in the curvature's (1), which noise in flat ones does.
    clip norm    and whether a round tunes all parameters or the leading directions alone: `preconditioner`
    length       what the steps of all rounds may add up to: the length at which the noise of all of them raises the
                 *public* loss by a tenth of its root mean square; within it, what the releases deserve (`step_size`)
    rounds       T = 12; 80 under a heavy shift (`preconditioner`)

The rule is ours; its numbers are in `rule`. It reads N and the budget, which are public, and is deterministic given its
key. What else was tried, and what each choice is worth, is in `experiments/ABLATIONS.md`.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, num_records
from qexp_jax.model.subspace import Layout, Subspace
from qexp_jax.numerics.keys import split
from qexp_jax.quadratic import public_curvature, public_samples
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.empirical_bayes import shift_prior
from qexp_jax.quadratic.first_round import first_round
from qexp_jax.quadratic.posterior import CurvatureEstimate
from qexp_jax.quadratic.preconditioner import (
    Candidate,
    Preconditioner,
    candidates,
    choose,
    is_heavy,
    kept_shares,
    precision_of,
)
from qexp_jax.quadratic.rule import RULE
from qexp_jax.quadratic.whitened import Whitened, metric, whiten

__all__ = ["Plan", "Preconditioner", "choose", "is_heavy", "looked_at", "make_plan", "precision_of"]

_LEAST_MOMENT = 1e-9  # over the largest: positive, since signals are measured against it


class Plan(NamedTuple):
    """What the rounds need beside the private records; all of it public.

    Attributes:
      subspace: P, with orthonormal columns.
      damping: lambda, in units of curvature.
      rounds: T.
      most_rounds: what T becomes under a heavy shift.
      estimate: curvature and moments in coordinates whitened by the first preconditioner, for `step_size`.
      preconditioners: among which a round chooses: first all parameters, then the leading directions.
      expected_cost: loss per record that the noise of one round is expected to cost, where the private gradient is as
        far from the public one as is common.
      evidence: the public numbers that decided, for the certificate.
    """

    subspace: Subspace
    damping: float
    rounds: int
    most_rounds: int
    estimate: CurvatureEstimate
    preconditioners: Preconditioner
    expected_cost: float
    evidence: dict[str, Any]


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
    layout: Layout | None = None,
    subspace: Subspace | None = None,
    subspace_dim: int | None = None,
    damping: float | None = None,
    l2_clip_norm: float | None = None,
    one_draw: bool = False,
    weights: np.ndarray | None = None,
    unit_weights: np.ndarray | None = None,
) -> Plan:
    """Chooses what is not given: the metric (T4), clip norms, lengths and the number of rounds.

    Args:
      key: public randomness: which records, which trial noise.
      loss_fn: loss of one record, for the curvature.
      params: initial parameters theta_0.
      public: public records.
      clip_loss_fn: loss of one unit, whose gradients are clipped.
      public_units: public units; the same as `public` where a unit is a record.
      num_units: N.
      noise_multiplier: z of the whole budget spent in one round.
      rounds: T, in place of the choice, whatever the shift.
      precision_rank: at most how many leading directions have their curvature measured; as many public gradients.
      layout: says which leaves are tuned where no subspace does; by default all.
      subspace: public subspace; by default all parameters, or a count-sketch of them where a sample of gradients would
        not fit.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda, in units of curvature.
      l2_clip_norm: C in the norm |M^{-1/2} g|, where M has largest eigenvalue 1.
      one_draw: A = M = H + lambda I, in one round, followed whole.
      weights: of the public records, as a tilt leaves them.
      unit_weights: of the public units.

    Raises:
      ValueError: if the public curvature is unusable, public losses or what follows from them are not finite, or public
        gradients vanish; no private record has been read then.
    """
    *measuring_keys, trial_key = _keys(key)
    measured = public_curvature.measure(
        measuring_keys, loss_fn, params, public, clip_loss_fn, public_units,
        precision_rank=precision_rank, layout=layout, subspace=subspace, subspace_dim=subspace_dim,
        weights=weights, unit_weights=unit_weights,
    )  # fmt: skip
    damping = _damping(measured.curvature, damping, one_draw)
    eigenvalues = metric(measured.curvature, damping, power=1.0 if one_draw else 0.5)
    whitened = whiten(trial_key, loss_fn, params, measured, eigenvalues)
    found = candidates(whitened, float(noise_multiplier) / num_units, l2_clip_norm)
    if one_draw:
        found = _uncorrected(found[:1])
    scale = float(measured.curvature.max()) + damping if one_draw else 0.0
    preconditioners = _stacked(found, scale, measured.directions.dtype)
    kept = kept_shares(whitened.squares @ whitened.dims, found[0].l2_clip_norm)
    moments = _moments(whitened.squares, kept)
    estimate = _estimate(measured.directions, whitened, moments, num_records(public_units))
    rounds, most_rounds = _num_rounds(1 if one_draw else rounds)
    first, expected_cost = first_round(estimate, preconditioners, noise_multiplier, num_units, rounds)
    evidence = _evidence(whitened, moments, kept, found[0], np.asarray(first.tuned))
    plan = Plan(measured.subspace, damping, rounds, most_rounds, estimate, preconditioners, expected_cost, evidence)
    _check_finite(plan)
    return plan


def _damping(curvature: np.ndarray, given: float | None, one_draw: bool) -> float:
    """Lambda, in units of curvature: as given, or a share of the largest curvature."""
    if given is not None:
        return given
    largest = float(curvature.max())
    # A whole draw with less damping may end far from where the quadratic holds.
    return largest if one_draw else RULE.damping * largest


def _uncorrected(found: list[Candidate]) -> list[Candidate]:
    """The same, but no clipping bias is taken off what they release, so that it is the draw (3) as it stands."""
    return [candidate._replace(bias=np.zeros_like(candidate.bias)) for candidate in found]


def _stacked(found: list[Candidate], scale: float, dtype: np.dtype) -> Preconditioner:
    """The candidates along a leading axis, on the device; of each, all of C is used until the releases say otherwise.

    Args:
      found: on the host.
      scale: A / M, where M has a largest eigenvalue of 1; 0 where the releases decide how far a draw is followed.
      dtype: of the device's numbers.
    """
    numbers = jax.tree.map(lambda *x: np.stack(x), *found)._asdict()
    numbers["share"] = np.ones(len(found))
    numbers["scale"] = np.full(len(found), scale)
    return Preconditioner(**_on_device(numbers, dtype))


def _moments(squares: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """v (r + 1,), of gradients as they are clipped, for the releases show no others."""
    moments = np.mean(squares * kept[:, None] ** 2, axis=0)
    return np.maximum(moments, _LEAST_MOMENT * moments.max())


def _estimate(
    directions: Directions | jax.Array, whitened: Whitened, moments: np.ndarray, num_public: int
) -> CurvatureEstimate:
    """What the rounds need of the public quadratic, and their prior, on the device.

    Args:
      directions: (r, k), on the device already.
      whitened: on the host.
      moments: (r + 1,) v.
      num_public: public units, whose sampling error is the least shift.
    """
    shifts, log_prior = shift_prior(num_public)
    numbers = {
        "curvature": whitened.curvature,
        "moments": moments,
        "dims": whitened.dims,
        "shifts": shifts,
        "log_prior": log_prior,
    }
    return CurvatureEstimate(directions=directions, **_on_device(numbers, directions.dtype))


def _num_rounds(given: int | None) -> tuple[int, int]:
    """T, and what it becomes under a heavy shift; a number that is given holds for both."""
    if given is not None:
        return given, given
    return RULE.rounds, RULE.heavy_rounds


def _evidence(
    whitened: Whitened, moments: np.ndarray, kept: np.ndarray, whole: Candidate, tuned_at_first: np.ndarray
) -> dict[str, Any]:
    """The public numbers that decided.

    Args:
      whitened: public measurements.
      moments: (r + 1,) v.
      kept: (n,) share of each public gradient that clipping keeps.
      whole: the candidate that tunes all parameters.
      tuned_at_first: (r + 1,) one, or zero where the first round holds the parameters fixed.
    """
    dims = whitened.dims
    return {
        "largest_curvature": float(whitened.curvature.max()),
        "leading_share_of_energy": float(np.sum(moments[:-1]) / np.sum(dims * moments)),
        "tolerated_noise": whitened.tolerance,
        # A float32, as the rounds have it.
        "longest_length": float(np.float32(whole.longest)),
        "tuned_at_first": int(np.sum(dims * tuned_at_first)),
        "public_fraction_clipped": float(np.mean(kept < 1)),
        "clipping_bias_in_clip_norms": float(np.linalg.norm(whole.bias)) / whole.l2_clip_norm,
    }


def _check_finite(plan: Plan) -> None:
    """Whatever a release rests on is finite before anything is paid for it; held parameters have an infinite M."""
    numbers = plan.evidence | {"damping": plan.damping, "expected_cost": plan.expected_cost}
    arrays = plan.estimate._asdict() | plan.preconditioners._asdict()
    numbers |= {name: x for name, x in arrays.items() if name not in ("directions", "eigenvalues")}
    is_finite = {name: np.all(np.isfinite(np.asarray(x, np.float64))) for name, x in numbers.items()}
    wrong = sorted(name for name in numbers if not is_finite[name])
    if wrong:
        raise ValueError(f"Expected a finite plan from the public records, found no finite {', '.join(wrong)}.")


def _on_device(tree: Any, dtype: np.dtype) -> Any:
    """In one transfer, rounded before."""
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), tree))


def looked_at(key: jax.Array, public: Record) -> Record:
    """The public records that a plan of this key reads; more where it has units, or a `subspace_dim`."""
    return public_samples.looked_at(_keys(key)[0], public)


def _keys(key: jax.Array) -> tuple[jax.Array, ...]:
    """Of records, units, sketch and trials."""
    return split(key, 4)
