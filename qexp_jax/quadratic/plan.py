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

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, num_records
from qexp_jax.model.subspace import Layout, Subspace
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic import public_curvature, public_samples, step_size
from qexp_jax.quadratic.accuracy import noise_cost
from qexp_jax.quadratic.empirical_bayes import shift_prior
from qexp_jax.quadratic.posterior import CurvatureEstimate, before_release
from qexp_jax.quadratic.preconditioner import (
    Preconditioner,
    candidates,
    choose,
    is_heavy,
    kept_shares,
    multiples_of,
    precision_of,
)
from qexp_jax.quadratic.rule import RULE

__all__ = ["Plan", "Preconditioner", "choose", "is_heavy", "looked_at", "make_plan", "precision_of"]

_SMALLEST_NOISE, _LARGEST_NOISE = 1e-15, 1e11  # of the mean gradient: products of four are within float32


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
    *keys, trial_key = _keys(key)
    measured = public_curvature.measure(
        keys, loss_fn, params, public, clip_loss_fn, public_units,
        precision_rank=precision_rank, layout=layout, subspace=subspace, subspace_dim=subspace_dim,
        weights=weights, unit_weights=unit_weights,
    )  # fmt: skip
    largest = float(measured.curvature.max())
    if damping is None:
        # A whole draw with less damping may end far from where the quadratic holds.
        damping = largest if one_draw else RULE.damping * largest
    dims = measured.dims
    eigenvalues = _metric(measured.curvature, damping, power=1.0 if one_draw else 0.5)
    # From here on in coordinates whitened by M.
    leading = measured.leading / np.sqrt(eigenvalues[:-1])
    squares = measured.squares / eigenvalues
    as_arrays = functools.partial(_on_device, dtype=measured.directions.dtype)

    root = as_arrays(eigenvalues)
    precision = precisions.spectral(root[-1], measured.directions, root[:-1])
    tolerance, cost = public_curvature.tolerated_noise(
        trial_key, loss_fn, params, measured.subspace, precision, measured.tried, RULE.noise_cost
    )
    # Noise of scale s costs a quadratic s^2 tr(K) / 2: a cost that was met tells the trace, and a trace the scale.
    curvature = _whitened_curvature(measured.curvature / eigenvalues, dims, 2 * cost / tolerance**2)
    tolerance_of_leading = np.sqrt(2 * cost / np.sum(curvature[:-1]))

    per_unit = float(noise_multiplier) / num_units
    found = candidates(
        leading, squares, dims, eigenvalues, curvature, (tolerance, tolerance_of_leading), per_unit, l2_clip_norm
    )
    if one_draw:
        found = [found[0]._replace(bias=np.zeros_like(found[0].bias))]
        rounds = 1
    scale = largest + damping if one_draw else 0.0  # M is scaled to a largest eigenvalue of 1
    clip_norm = found[0].l2_clip_norm
    _check_noise(clip_norm * per_unit)
    stacked = jax.tree.map(lambda *x: np.stack(x), *found)._asdict()
    shares, scales = np.ones(len(found)), np.full(len(found), scale)
    preconditioners = Preconditioner(**as_arrays(stacked | {"share": shares, "scale": scales}))

    kept = kept_shares(squares @ dims, clip_norm)
    moments = _moments(squares, kept)
    shifts, log_prior = shift_prior(num_records(public_units))
    estimate = CurvatureEstimate(measured.directions, *as_arrays((curvature, moments, dims, shifts, log_prior)))
    if rounds is None:
        rounds, most_rounds = RULE.rounds, RULE.heavy_rounds
    else:
        most_rounds = rounds
    first, expected_cost = _first_round(estimate, preconditioners, noise_multiplier, num_units, rounds)
    evidence = {
        "largest_curvature": float(curvature.max()),
        "leading_share_of_energy": float(np.sum(moments[:-1]) / np.sum(dims * moments)),
        "tolerated_noise": tolerance,
        "longest_length": float(np.float32(found[0].longest)),
        "tuned_at_first": int(np.sum(dims * np.asarray(first.tuned))),
        "public_fraction_clipped": float(np.mean(kept < 1)),
        "clipping_bias_in_clip_norms": float(np.linalg.norm(found[0].bias)) / clip_norm,
    }
    made = Plan(measured.subspace, damping, rounds, most_rounds, estimate, preconditioners, expected_cost, evidence)
    _check_finite(made)
    return made


def _metric(curvature: np.ndarray, damping: float, power: float) -> np.ndarray:
    """Eigenvalues (r + 1,) of M, a power of the damped curvature, scaled to a largest one of 1."""
    damped = (curvature + damping) / (curvature.max() + damping)
    return np.sqrt(damped) if power == 0.5 else damped**power


def _moments(squares: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """v (r + 1,), of clipped gradients; positive, since signals are measured against it."""
    moments = np.mean(squares * kept[:, None] ** 2, axis=0)
    return np.maximum(moments, 1e-9 * moments.max())


def _whitened_curvature(curvature: np.ndarray, dims: np.ndarray, trace: float) -> np.ndarray:
    """K (r + 1,).

    The rest has what the leading directions leave of the trace that the tolerated noise shows, but not less than its
    second moments say, and not more than a leading direction.

    Args:
      curvature: (r + 1,) as second moments give it, whitened.
      dims: (r + 1,) how many coordinates each entry stands for.
      trace: of K.
    """
    leading, rest = curvature[:-1], curvature[-1]
    remainder = (trace - np.sum(leading)) / max(1, dims[-1])
    curvature = np.append(leading, min(max(rest, remainder), leading.min()))
    return np.maximum(curvature, 1e-6 * curvature.max())  # positive: J divides by it


def _first_round(
    estimate: CurvatureEstimate,
    preconditioners: Preconditioner,
    noise_multiplier: float,
    num_units: int,
    rounds: int,
) -> tuple[Preconditioner, float]:
    """The preconditioner before any release, and what the noise of a round is expected to cost in it."""
    preconditioner, multiples = _first_step(estimate, preconditioners, noise_multiplier, num_units, rounds)
    noise_std = float(preconditioner.l2_clip_norm) * noise_multiplier * rounds**0.5
    cost, _ = noise_cost(estimate.curvature, multiples, estimate.dims, noise_std=noise_std, num_units=num_units)
    return preconditioner, cost


@jax.jit
def _first_step(
    estimate: CurvatureEstimate,
    preconditioners: Preconditioner,
    noise_multiplier: jax.Array | float,
    num_units: int,
    rounds: jax.Array | int,
) -> tuple[Preconditioner, jax.Array]:
    """The preconditioner before any release, and the multiples (r + 1,) of a round in it."""
    posterior = before_release(estimate)
    preconditioner, length = choose(posterior, estimate, preconditioners, noise_multiplier, num_units, rounds)
    multiples, _ = step_size.advance(posterior, estimate, length / rounds, num_units, preconditioner.tuned)
    return preconditioner, multiples_of(preconditioner, multiples)


def _check_noise(noise_std: float) -> None:
    if not _SMALLEST_NOISE <= noise_std <= _LARGEST_NOISE:
        raise ValueError(
            f"Expected noise of {_SMALLEST_NOISE} to {_LARGEST_NOISE} in the mean gradient, found {noise_std}: "
            "multiply the loss by a number that brings its gradients near 1."
        )


def _check_finite(plan: Plan) -> None:
    """Whatever a release rests on is finite before anything is paid for it; held parameters have an infinite M."""
    numbers = plan.evidence | {"damping": plan.damping, "expected_cost": plan.expected_cost}
    arrays = plan.estimate._asdict() | plan.preconditioners._asdict()
    numbers |= {name: x for name, x in arrays.items() if name not in ("directions", "eigenvalues")}
    wrong = sorted(name for name, x in numbers.items() if not np.all(np.isfinite(np.asarray(x, np.float64))))
    if wrong:
        raise ValueError(f"Expected a finite plan from the public records, found no finite {', '.join(wrong)}.")


def _on_device(tree: Any, dtype: np.dtype) -> Any:
    """In one transfer, rounded before."""
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), tree))


def looked_at(key: jax.Array, public: Record) -> Record:
    """The public records that a plan of this key reads; more where it has units, or a `subspace_dim`."""
    return public_samples.looked_at(_keys(key)[0], public)


def _keys(key: jax.Array) -> jax.Array:
    """Of records, units, sketch and trials."""
    return jax.random.split(key, 4)
