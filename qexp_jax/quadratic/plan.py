"""The public side of a release: metric, clip norm, length and number of rounds, from public records.

With the measured curvature H, N units and noise multiplier z:

    metric       M = (H + lambda I)^{1/2}, scaled to a largest eigenvalue of 1; lambda a hundredth of H's largest. The
                 exponent lies between clipping in the parameters' norm (0), which noise in steep directions ruins, and
                 in the curvature's (1), which noise in flat ones does.
    clip norm    C, the .95 quantile of the public norms |M^{-1/2} g|. What clipping adds to the public mean gradient
                 is taken off every release.
    length       what the steps of all rounds may add up to: the length at which the noise of all of them raises the
                 *public* loss by a tenth of its root mean square; within it, what the releases deserve (`step_size`)
    rounds       T = 12
    what moves   a round tunes all parameters or, with an infinite M elsewhere, the leading directions alone: they hold
                 about half of a gradient's energy and little of its noise. The one of less expected excess, given the
                 releases before it (`choose`).

**A heavy shift** is one whose expected size, given the releases, exceeds .02. Far from the anchor no public
quadratic says how much there is to gain. What is left of the budget is then split over so many rounds that there are 80
in all, steps may be twice as long, units are clipped at .7 C, since most are clipped there, and a round takes the step
that lowers the loss most by itself (`step_size.best_step`). It tunes all parameters, unless no step of all is expected
to lower the loss; but one round in ten looks at all again, where more may have emerged.

The rule is ours; its numbers are in `rule`. It reads N and the budget, which are public, and is deterministic given its
key. What else was tried, and what each choice is worth, is in `experiments/ABLATIONS.md`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments
from qexp_jax.data.records import LossFn, Params, Record, num_records
from qexp_jax.model.subspace import Layout, Subspace, certified_name
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic import public_curvature, step_size
from qexp_jax.quadratic.accuracy import noise_cost
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.precision import Precision
from qexp_jax.quadratic.rule import RULE
from qexp_jax.quadratic.step_size import CurvatureEstimate, Posterior

_SMALLEST_CLIP_NORM = 1e-18  # C, C z and sums of C stay within float32
_SMALLEST_NOISE, _LARGEST_NOISE = 1e-15, 1e11  # of the mean gradient: products of four are within float32


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
    """

    eigenvalues: jax.Array
    tuned: jax.Array
    l2_clip_norm: jax.Array
    longest: jax.Array
    bias: jax.Array
    share: jax.Array


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
    damping = RULE.damping * float(measured.curvature.max()) if damping is None else damping
    curvature, dims, space = measured.curvature, measured.dims, measured.subspace
    eigenvalues = np.sqrt((curvature + damping) / (curvature.max() + damping))
    leading, squares = measured.leading / np.sqrt(eigenvalues[:-1]), measured.squares / eigenvalues
    as_arrays = functools.partial(_on_device, dtype=measured.directions.dtype)
    root = as_arrays(eigenvalues)
    precision = precisions.spectral(root[-1], measured.directions, root[:-1])
    tolerance, cost = public_curvature.tolerated_noise(
        trial_key, loss_fn, params, space, precision, measured.tried, RULE.noise_cost
    )  # fmt: skip
    curvature = _whitened_curvature(curvature / eigenvalues, dims, 2 * cost / tolerance**2)
    prior = step_size.shift_prior(num_records(public_units))
    estimate = CurvatureEstimate(measured.directions, *as_arrays((curvature, dims, dims, *prior)))
    per_unit = float(noise_multiplier) / num_units
    tolerances = tolerance, np.sqrt(2 * cost / np.sum(curvature[:-1]))
    found = _preconditioners(leading, squares, dims, eigenvalues, curvature, tolerances, per_unit, l2_clip_norm)
    _, _, clip_norm, longest, bias = found[0]
    _check_noise(clip_norm * per_unit)
    longest = float(np.float32(longest))
    stacked = [np.stack(x) for x in zip(*found, strict=True)]
    preconditioners = Preconditioner(*as_arrays([*stacked, np.ones(len(found))]))
    kept = _kept(squares @ dims, clip_norm)
    moments = np.mean(squares * kept[:, None] ** 2, axis=0)
    moments = np.maximum(moments, 1e-9 * moments.max())
    estimate = estimate._replace(moments=as_arrays(moments))
    rounds, most_rounds = (RULE.rounds, RULE.heavy_rounds) if rounds is None else (rounds, rounds)
    first, expected_cost = _first_round(estimate, preconditioners, noise_multiplier, num_units, rounds)
    evidence = {
        "largest_curvature": float(curvature.max()),
        "leading_share_of_energy": float(np.sum(moments[:-1]) / np.sum(dims * moments)),
        "tolerated_noise": tolerance,
        "longest_length": longest,
        "tuned_at_first": int(np.sum(dims * np.asarray(first.tuned))),
        "public_fraction_clipped": float(np.mean(kept < 1)),
        "clipping_bias_in_clip_norms": float(np.linalg.norm(bias)) / clip_norm,
    }
    made = Plan(space, damping, rounds, most_rounds, estimate, preconditioners, expected_cost, evidence)
    _check_finite(made)
    return made


def _check_finite(plan):
    """Whatever a release rests on is finite before anything is paid for it; held parameters have an infinite M."""
    numbers = plan.evidence | {"damping": plan.damping, "expected_cost": plan.expected_cost}
    arrays = plan.estimate._replace(directions=None)._asdict() | plan.preconditioners._asdict()
    numbers |= {name: x for name, x in arrays.items() if x is not None and name != "eigenvalues"}
    wrong = sorted(name for name, x in numbers.items() if not np.all(np.isfinite(np.asarray(x, np.float64))))
    if wrong:
        raise ValueError(f"Expected a finite plan from the public records, found no finite {', '.join(wrong)}.")


def terms(plan: Plan, roundings: list[float]) -> dict[str, Any]:
    """What a certificate says of a plan.

    Args:
      plan: public.
      roundings: of each preconditioner, the share of the clip norm kept for what rounding adds (`clipping.rounding`).
    """
    return {
        "rounds": arguments.count("rounds", plan.rounds),
        "most_rounds": arguments.count("most_rounds", plan.most_rounds),
        "geometries": _certified(plan, roundings),
        "subspace": certified_name(plan.subspace),
        "subspace_dim": round(float(np.sum(plan.estimate.dims))),
        "precision_rank": len(plan.estimate.directions),
        "damping": arguments.real("damping", plan.damping),
        "expected_excess_loss_per_round": arguments.real("expected_cost", plan.expected_cost),
        "public_evidence": {name: _plain(name, value) for name, value in plan.evidence.items()},
        "dtype": str(plan.subspace.layout.dtype),
    }


def _certified(plan, roundings):
    """How many dimensions each tunes, C, and the share of C that holds what rounding adds to a unit's part."""
    tuned = np.asarray(plan.preconditioners.tuned, np.float64) @ np.asarray(plan.estimate.dims, np.float64)
    norms = np.asarray(plan.preconditioners.l2_clip_norm)
    return [
        {"tuned_dim": round(t), "l2_clip_norm": float(c), "rounding": float(r)}
        for t, c, r in zip(tuned, norms, roundings, strict=True)
    ]


def _plain(name, value):
    """As JSON knows numbers: whatever scalar the plan made it."""
    is_integer = np.asarray(value).dtype.kind in "iu"
    return int(value) if is_integer else arguments.real(name, value)


def looked_at(key: jax.Array, public: Record) -> Record:
    """The public records that a plan of this key reads; more where it has units, or a `subspace_dim`."""
    return public_curvature.looked_at(_keys(key)[0], public)


def _keys(key):
    """Of records, units, sketch and trials."""
    return jax.random.split(key, 4)


def _on_device(tree, dtype):
    """In one transfer, rounded before."""
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), tree))


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
    signals = step_size.pooled_signal(posterior, estimate, num_units)
    heavy = is_heavy(posterior, estimate, num_units)
    noise_vars = (preconditioners.l2_clip_norm * noise_multiplier / num_units) ** 2
    share = jnp.where(heavy, RULE.heavy_clip, preconditioners.share)
    longer = jnp.where(heavy, RULE.heavy_longer, 1)
    preconditioners = preconditioners._replace(
        l2_clip_norm=share * preconditioners.l2_clip_norm, share=share, longest=longer * preconditioners.longest,
        bias=jnp.where(heavy, 0, preconditioners.bias),
    )  # fmt: skip

    def best(preconditioner, noise_var):
        return step_size.best_length(
            signals, estimate, noise_var, num_units, preconditioner.longest, preconditioner.tuned
        )

    lengths, costs = jax.vmap(best)(preconditioners, noise_vars)
    of_all = jax.tree.map(lambda x: x[0], preconditioners)
    _, change = step_size.best_step(
        posterior, estimate, rounds * noise_vars[0], num_units, of_all.longest / rounds, of_all.tuned
    )  # fmt: skip
    must_look = posterior.idle[-1] >= RULE.heavy_hold
    far_from_anchor = jnp.where(must_look | (change < 0), 0, len(costs) - 1)
    chosen = jnp.where(heavy, far_from_anchor, jnp.argmin(costs))
    return jax.tree.map(lambda x: x[chosen], preconditioners), lengths[chosen]


@jax.jit
def is_heavy(posterior: Posterior, estimate: CurvatureEstimate, num_units: int) -> jax.Array:
    """Whether the releases show a shift that asks for more rounds and longer ones: post-processing (T5)."""
    return step_size.pooled_shift(posterior, estimate, num_units) > RULE.heavy_shift


def _preconditioners(leading, squares, dims, eigenvalues, curvature, tolerances, per_unit, given):
    """Each but for its share: of all parameters, and of the leading directions where there are others."""
    whole = np.ones_like(dims)
    found = []
    for tuned, tolerance in zip((whole, np.append(whole[:-1], 0)), tolerances, strict=True):
        squared_norms = squares @ (dims * tuned)
        clip_norm = _clip_norm(squared_norms, given)
        held, longest = np.where(tuned, eigenvalues, np.inf), tolerance / (clip_norm * per_unit)
        bias = _clipping_bias(leading, _kept(squared_norms, clip_norm), curvature[:-1])
        found.append((held, tuned, clip_norm, longest, bias))
    return found if dims[-1] > 0 else found[:1]


def _kept(squared_norms, clip_norm):
    """(n,) the share of each gradient that clipping keeps."""
    norms = np.sqrt(squared_norms)
    return np.minimum(norms, clip_norm) / np.maximum(norms, np.finfo(np.float64).tiny)


def _clipping_bias(leading, kept, curvature):
    """What clipping adds to the mean gradient along the leading directions (r,), as far as it is no sampling error.

    The public mean of it, shrunk by the share of its sampling error in what it costs a quadratic (James and Stein,
    1961). Where errors are skewed it moves a model that fits, and without a shift all of it is known.
    """
    added = (kept - 1)[:, None] * leading
    mean, error = np.mean(added, axis=0), np.var(added, axis=0) / len(added)
    cost = np.sum(mean**2 / curvature)
    return max(0, 1 - np.sum(error / curvature) / cost) * mean if cost > 0 else mean


def _first_round(estimate, preconditioners, noise_multiplier, num_units, rounds):
    """The preconditioner before any release, and what the noise of a round is expected to cost in it."""
    preconditioner, multiples = _first_step(estimate, preconditioners, noise_multiplier, num_units, rounds)
    noise_std = float(preconditioner.l2_clip_norm) * noise_multiplier * rounds**0.5
    cost, _ = noise_cost(estimate.curvature, multiples, estimate.dims, noise_std=noise_std, num_units=num_units)
    return preconditioner, cost


@jax.jit
def _first_step(estimate, preconditioners, noise_multiplier, num_units, rounds):
    posterior = step_size.before_release(estimate)
    preconditioner, length = choose(posterior, estimate, preconditioners, noise_multiplier, num_units, rounds)
    multiples, _ = step_size.advance(posterior, estimate, length / rounds, num_units, preconditioner.tuned)
    return preconditioner, multiples


def _clip_norm(squared_norms, given):
    """C, a float32."""
    clip_norm = np.sqrt(np.quantile(squared_norms, RULE.clip_quantile)) if given is None else given
    if not _SMALLEST_CLIP_NORM <= clip_norm <= 1 / _SMALLEST_CLIP_NORM:
        raise ValueError(f"Expected a clip norm in [1e-18, 1e18], found {clip_norm}; give l2_clip_norm.")
    return float(np.float32(clip_norm))


def _check_noise(noise_std):
    if not _SMALLEST_NOISE <= noise_std <= _LARGEST_NOISE:
        raise ValueError(
            f"Expected noise of {_SMALLEST_NOISE} to {_LARGEST_NOISE} in the mean gradient, found {noise_std}: "
            "multiply the loss by a number that brings its gradients near 1."
        )


def _whitened_curvature(curvature, dims, trace):
    """K (r + 1,).

    The rest has what the leading directions leave of the trace that the tolerated noise shows, but not less than its
    second moments say, and not more than a leading direction.
    """
    leading, rest = curvature[:-1], curvature[-1]
    remainder = (trace - np.sum(leading)) / max(1, dims[-1])
    curvature = np.append(leading, min(max(rest, remainder), leading.min()))
    return np.maximum(curvature, 1e-6 * curvature.max())
