"""The public side of a release: directions, precision, clip norm, length, rounds, from anchor and public records.

One rule, with nothing to tune on private data:

* *Precision*: M = (H + lambda I)^{1/2}, scaled to a largest eigenvalue of 1, on all parameters. H is diagonal in the
  leading eigenspace of the public gradients, with their second moments on *other* public records, and equal in all
  other directions; a few Hessian-vector products give its scale. The exponent 1/2 lies between clipping in the
  parameter norm (0) and in the curvature norm (1): with 1 noise swamps the low curvatures, with 0 the high ones.
* *Clip norm*: the .9 quantile of the public norms |M^{-1/2} g|.
* *Length*: at most four times what makes the noise of all rounds together, added to the anchor, raise the *public* loss
  by a fixed small fraction of its root mean square; within that, what the releases deserve (`flow`).
* *Rounds*: as many as keep each step of the length expected before the first within one over the largest private
  curvature expected, 8 to 12; what the releases then deserve may be up to four times as long.

A round is then one exact draw with precision M, followed for a step of the flow.

What was measured and not kept. One draw with precision H + lambda I needs a damping near the largest curvature to be
safe and then gains a fifth as much. Hessian-vector products in each of 32 directions cost ten times as much as second
moments in 128 and gained less. Correcting the clipped sum by the public clipping bias helped where clipping was heavy
(.7 quantile, images) and hurt where the classes are unequal, as did any clip norm below the .9 quantile. A
Kronecker-factored whole spectrum gained up to .006 on linear models, nothing on networks, and varied with the public
sample. Pooled Newton steps matched this rule at small budgets and failed at large ones on networks, which are no
quadratics there. Steps bounded by the public curvature overshot in every round on PhysioNet by ICU, where the private
one is five times as steep along the shift. Six rounds in place of twelve lost .001 to .003 at epsilon 8; a length of
its own for the block of all other directions changed nothing. Block James-Stein shrinkage of the released sum
over-shrinks; a private diagonal curvature (T7) cost more budget than it returned.

The rule is ours. It reads N and the budget, which are public, and is deterministic given its key.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax import flow
from qexp_jax import precision as precisions
from qexp_jax import subspace as subspaces
from qexp_jax.accuracy import noise_tolerance
from qexp_jax.curvature import hessian_product, mean_loss, top_eigenspace
from qexp_jax.flow import Spectrum
from qexp_jax.gradients import projected_gradients
from qexp_jax.precision import Precision
from qexp_jax.records import LossFn, Params, Record, microbatches, num_records, take
from qexp_jax.subspace import Subspace

_CURVED, _HELD_OUT, _TRIED = 1024, 2048, 512
_SCALED_DIRECTIONS, SCALING_RECORDS = 8, 256
_DAMPING = 0.01
_CLIP_QUANTILE = 0.9
_SMALLEST_CLIP_NORM = 1e-18  # C, C z and sums of C stay within float32
_NOISE_COST = 0.006
_NOISE_DRAWS = 3
_LONGEST = 4.0
_LEAST_ROUNDS, _MOST_ROUNDS = 8, 12
_LONGEST_ROUND = 4.0
_PRIVATE_CURVATURE = 1.5  # private over public curvature: 1 to 2.4 was found under shift
_EXPECTED_SHIFT = 1.5e-3
_GRADIENT_BYTES = 2**30
_SKETCH_DIM = 4096


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
      longest_round: most of one round.
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
    longest_round: float
    expected_multiples: jax.Array
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
      subspace: public subspace; by default all parameters, or a count-sketch of them where a sample of gradients would
        not fit.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda, in units of curvature.
      l2_clip_norm: C in the norm |M^{-1/2} g|, where M has largest eigenvalue 1.

    Raises:
      ValueError: if the public curvature is unusable, or public gradients vanish; no private record has been read then.
    """
    record_key, unit_key, sketch_key, trial_key = jax.random.split(key, 4)
    curved, held_out = _samples(record_key, public)
    space = _tuned_space(sketch_key, loss_fn, params, curved, public, subspace, subspace_dim)
    rank = min(precision_rank, space.dim, num_records(curved))
    directions = leading_directions(loss_fn, params, curved, rank, space)[0].arrays[1].T
    squares = _squares(loss_fn, params, space, directions, held_out)
    dims = np.append(np.ones(rank), space.dim - rank)
    curvature = _curvature(loss_fn, params, space, directions, squares, dims, held_out)
    damping = _DAMPING * float(curvature.max()) if damping is None else damping
    shape = np.sqrt((curvature + damping) / (curvature.max() + damping))
    precision = precisions.low_rank(shape[-1], directions, jnp.asarray(shape[:-1] - shape[-1], directions.dtype))
    if clip_loss_fn is not loss_fn:
        squares = _squares(clip_loss_fn, params, space, directions, _samples(unit_key, public_units)[1])
    norms, clip_norm, moments = _clipping(squares / shape, dims, l2_clip_norm)
    tolerance, cost = _tolerated_noise(trial_key, loss_fn, params, space, precision, take(held_out, slice(0, _TRIED)))
    curvature = _whitened_curvature(curvature / shape, dims, 2 * cost / tolerance**2)
    numbers = curvature, moments, dims, *flow.shift_prior()
    spectrum = Spectrum(directions, *(jnp.asarray(x, directions.dtype) for x in numbers))
    noise_std, largest_curvature = clip_norm * noise_multiplier / num_units, float(curvature.max())
    longest = _LONGEST * tolerance / noise_std
    expected = float(_expected_length(spectrum, noise_std**2, num_units, longest))
    if rounds is None:
        rounds = int(np.clip(np.ceil(expected * largest_curvature), _LEAST_ROUNDS, _MOST_ROUNDS))
    evidence = {
        "largest_curvature": largest_curvature,
        "leading_share_of_energy": float(np.sum(moments[:-1]) / np.sum(dims * moments)),
        "tolerated_noise": tolerance,
        "longest_length": longest,
        "expected_length": expected,
        "public_fraction_clipped": float(np.mean(norms > clip_norm)),
    }
    longest_round = _LONGEST_ROUND / largest_curvature
    multiples, _ = flow.advance(flow.before_release(spectrum), spectrum, min(expected / rounds, longest_round))
    return Plan(space, precision, clip_norm, damping, rounds, spectrum, longest, longest_round, multiples, evidence)


def num_curved(num_public: int) -> int:
    """Public records whose gradients give the directions."""
    return max(1, min(_CURVED, num_public // 2))


@jax.jit
def _samples(key: jax.Array, records: Record) -> tuple[Record, Record]:
    """Two disjoint random samples, for directions and for what is measured; a single record serves as both."""
    n = num_records(records)
    order = jax.random.permutation(key, n)
    curved = num_curved(n)
    return take(records, order[:curved]), take(records, order[curved : curved + _HELD_OUT] if n > 1 else order)


def tuned_space(key: jax.Array, params: Params, num_records: int, subspace: Subspace | None, dim: int = 0) -> Subspace:
    """The given subspace; or all parameters, or a count-sketch of them where a sample of gradients would not fit."""
    if subspace is not None:
        return subspace
    whole = subspaces.full(params)
    if whole.dim * num_records * 4 <= _GRADIENT_BYTES:
        return whole
    return subspaces.count_sketch(key, params, max(_SKETCH_DIM, dim))


def _tuned_space(key, loss_fn, params, curved, public, subspace, dim):
    """The space that is tuned in, with orthonormal columns."""
    if subspace is not None:
        return subspaces.orthonormalise(subspace)
    num_params = subspaces.layout_of(params).num_params
    if dim is not None and not 1 <= dim <= num_params:
        raise ValueError(f"Expected subspace_dim in [1, {num_params}], found {dim}.")
    records = public if dim is not None and dim > num_records(curved) else curved
    whole = tuned_space(key, params, num_records(records), None, dim or 0)
    if dim is None or dim == whole.dim:
        return whole
    if dim > num_records(records):
        raise ValueError(
            f"subspace_dim={dim} needs as many public records, found {num_records(records)}; or give a subspace, "
            "such as count_sketch."
        )
    return leading_directions(loss_fn, params, take(records, slice(0, max(dim, num_records(curved)))), dim, whole)[0]


def at_a_time(space: Subspace, most: int) -> int:
    """Records whose gradients are held together: a few for a large model."""
    return int(np.clip(_GRADIENT_BYTES // (16 * space.layout.num_params), 1, most))


@functools.partial(jax.jit, static_argnums=(0, 3))
def leading_directions(
    loss_fn: LossFn, params: Params, records: Record, dim: int, within: Subspace
) -> tuple[Subspace, jax.Array]:
    """`curvature.top_eigenspace`, with microbatches that fit."""
    return top_eigenspace(loss_fn, params, records, dim, within=within, microbatch_size=at_a_time(within, 64))


@functools.partial(jax.jit, static_argnums=0)
def product_along(loss_fn: LossFn, params: Params, space: Subspace, direction: jax.Array, records: Record) -> jax.Array:
    """`curvature.hessian_product`, with microbatches that fit."""
    size = at_a_time(space, SCALING_RECORDS)
    return hessian_product(loss_fn, params, space, direction, records, microbatch_size=size)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_squares(loss_fn, params, space, directions, records):
    batches, _ = microbatches(records, min(at_a_time(space, 64), num_records(records)))

    def squares(batch):
        return jax.vmap(lambda g: flow.energies(directions, g))(projected_gradients(loss_fn, params, space, batch))

    return jax.lax.map(squares, batches).reshape(-1, len(directions) + 1)


def _squares(loss_fn, params, space, directions, records):
    """Squares of each record's gradient: in the leading directions, and the mean of all others (n, r + 1)."""
    squares = np.asarray(_gradient_squares(loss_fn, params, space, directions, records), np.float64)
    return squares[: num_records(records)]


def _curvature(loss_fn, params, space, directions, squares, dims, records):
    """Curvature (r + 1,): second moments of the gradients, scaled to the Hessian along the steepest directions.

    For the likelihood of a model that fits, the two agree (Fisher); for other losses only their shape does. A host
    loop: XLA's CPU convolutions are ten times slower in its loops or batched.
    """
    moments = squares.mean(axis=0)
    steepest = np.argsort(-moments[:-1])[:_SCALED_DIRECTIONS]
    few = take(records, slice(0, SCALING_RECORDS))
    products = (product_along(loss_fn, params, space, v, few) for v in directions[steepest])
    curved = [float(jnp.vdot(v, product)) for v, product in zip(directions[steepest], products, strict=True)]
    if not (np.all(np.isfinite(curved)) and np.all(np.isfinite(moments))):
        raise ValueError(f"The public curvature is not finite at the anchor, {moments.shape=}.")
    with np.errstate(over="ignore"):  # refused below
        scale = np.sum(np.abs(curved)) / max(np.sum(moments[steepest]), np.finfo(np.float64).tiny)
    if not (0 < scale < np.inf and moments.max() > 0):
        raise ValueError(
            f"Public gradients or curvature vanish at the anchor, {moments.shape=}: there is no quadratic."
        )
    return scale * moments


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
def _expected_length(spectrum, noise_var, num_units, longest):
    """The length that the expected shift deserves."""
    return flow.best_length(_EXPECTED_SHIFT * spectrum.moments, spectrum, noise_var, num_units, longest)


def _tolerated_noise(key, loss_fn, params, space, shape, held_out):
    """The largest s for which the anchor moved by s M^{-1/2} xi costs the share of the loss's scale, and that cost."""
    losses = np.asarray(_losses(loss_fn, params, held_out, at_a_time(space, _TRIED)), np.float64)
    limit = _NOISE_COST * float(np.sqrt(np.mean(losses**2)))
    moves = [_noise_move(k, shape, space) for k in jax.random.split(key, _NOISE_DRAWS)]

    def cost(scale):
        moved = [_moved_loss(loss_fn, params, space, scale * move, held_out) for move in moves]
        return float(np.mean(jax.device_get(moved))) - float(np.mean(losses))

    return noise_tolerance(cost, limit), limit


@jax.jit
def _noise_move(key, shape, space):
    return precisions.color(shape, jax.random.normal(key, (space.dim,), space.layout.dtype))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _losses(loss_fn, params, records, size):
    if size >= num_records(records):
        return jax.vmap(loss_fn, in_axes=(None, 0))(params, records)
    return jax.lax.map(lambda record: loss_fn(params, record), records, batch_size=size)


@functools.partial(jax.jit, static_argnums=0)
def _moved_loss(loss_fn, params, space, move, records):
    moved = subspaces.displace(space, params, move)
    return mean_loss(loss_fn, moved, records, microbatch_size=at_a_time(space, _TRIED))
