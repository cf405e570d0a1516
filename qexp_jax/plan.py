"""The public side of a release: directions, precision, clip norm, step and number of rounds, from the anchor and public
records alone.

One rule, with nothing to tune on private data:

* *Precision*: M = ((H + lambda I) / top)^{1/2} on all parameters, where H is the public curvature in the leading
  eigenspace of the public gradients and zero elsewhere, and top its largest eigenvalue plus lambda. The exponent 1/2
  lies between clipping in the parameter norm (0) and in the curvature norm (1), as the geometric mean of the curvature
  and the identity: with exponent 1 noise swamps the low curvatures, with 0 the high ones.
* *Clip norm*: the .9 quantile of the public norms |M^{-1/2} g|.
* *Length*: the sum of the steps is as long as the noise allows: the noise of all rounds together, added to the anchor,
  raises the *public* loss by a fixed small fraction of its root mean square. The length does not depend on the number
  of rounds, since T rounds have sqrt(T) times the noise in steps of 1/T of the length.
* *Rounds*: as many as keep each step within half of one over the largest public curvature, 2 to 24: under shift the
  private curvature was found to be twice the public one.

A round is then one exact draw with precision M / step. The prior experience that this rule replaced: one draw with
precision H + lambda I needs a damping near the largest curvature to be safe and then gains a fifth as much; block
James-Stein shrinkage of the released sum over-shrinks, because steps far shorter than the minimiser are limited by how
long they are and not by their error; a private diagonal curvature (T7) cost more budget than it returned.

The rule is ours. It reads N and the budget, which are public, and is deterministic given its key.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax import precision as precisions
from qexp_jax import subspace as subspaces
from qexp_jax.accuracy import noise_tolerance
from qexp_jax.curvature import hessian_product, mean_loss, top_eigenspace
from qexp_jax.gradients import projected_gradients
from qexp_jax.precision import Precision
from qexp_jax.records import LossFn, Params, Record, microbatches, num_records, take
from qexp_jax.subspace import Subspace

_SAMPLE = 512
_CURVATURE_RECORDS = 256
_DAMPING = 0.01
_CLIP_QUANTILE = 0.9
_NOISE_COST = 0.006
_NOISE_DRAWS = 3
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 24
_STEP = 0.5
_GRADIENT_BYTES = 2**30
_SKETCH_DIM = 4096


class Plan(NamedTuple):
    """What the rounds need beside the private records; all of it public.

    Attributes:
      subspace: P, with orthonormal columns.
      precision: M / step, low rank plus identity; its vectors are the leading public directions.
      l2_clip_norm: C, in the norm whitened by `precision`.
      damping: lambda, in units of curvature.
      rounds: T.
      noise_cost: public loss per record that the noise of all rounds costs if no step is shortened.
      evidence: the public numbers that decided, for the certificate.
    """

    subspace: Subspace
    precision: Precision
    l2_clip_norm: float
    damping: float
    rounds: int
    noise_cost: float
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
    precision_rank: int = 32,
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
      precision_rank: at most how many leading directions have their curvature measured, a Hessian-vector product each.
      subspace: public subspace; by default all parameters, or a count-sketch of them where a sample of gradients would
        not fit.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda, in units of curvature.
      l2_clip_norm: C in the norm |M^{-1/2} g|.

    Raises:
      ValueError: if the public curvature is unusable, or public gradients vanish; no private record has been read then.
    """
    record_key, unit_key, sketch_key, trial_key = jax.random.split(key, 4)
    curved, held_out = _halves(record_key, public)
    _, clip_units = _halves(unit_key, public_units)
    space = _tuned_space(sketch_key, loss_fn, params, curved, public, subspace, subspace_dim)
    values, directions = _curvature(loss_fn, params, space, curved, precision_rank)
    damping = _DAMPING * float(values[0]) if damping is None else damping
    shape = _shape(values, directions, damping)
    norms = _whitened_norms(clip_loss_fn, params, space, shape, clip_units)[: num_records(clip_units)]
    clip_norm = float(np.quantile(norms, _CLIP_QUANTILE)) if l2_clip_norm is None else l2_clip_norm
    if not (np.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"Public gradients give the clip norm {clip_norm}; give l2_clip_norm.")
    tolerance, cost = _tolerated_noise(trial_key, loss_fn, params, space, shape, held_out)
    wanted = tolerance * num_units / (clip_norm * noise_multiplier)
    sharpest = float(np.max(values / np.sqrt((values + damping) / (values[0] + damping))))
    rounds = int(np.clip(np.ceil(wanted * sharpest / _STEP), _LEAST_ROUNDS, _MOST_ROUNDS)) if rounds is None else rounds
    step = min(wanted / rounds, _STEP / max(sharpest, 1e-30))
    evidence = {
        "largest_curvature": float(values[0]),
        "step": step,
        "tolerated_noise": tolerance,
        "public_fraction_clipped": float(np.mean(norms > clip_norm)),
    }
    return Plan(
        space,
        _scaled(shape, 1 / step),
        float(np.float32(clip_norm * step**0.5)),
        damping,
        rounds,
        cost * min(1.0, rounds * step / wanted) ** 2,
        evidence,
    )


@jax.jit
def _halves(key: jax.Array, records: Record) -> tuple[Record, Record]:
    """Two disjoint random samples of at most `_SAMPLE` records; a single record serves as both."""
    n = num_records(records)
    order = jax.random.permutation(key, n)
    half = max(1, min(_SAMPLE, n // 2))
    return take(records, order[:half]), take(records, order[-half:] if n > half else order[:half])


def _tuned_space(key, loss_fn, params, curved, public, subspace, dim):
    """The space that is tuned in, with orthonormal columns."""
    if subspace is not None:
        return subspaces.orthonormalise(subspace)
    whole = subspaces.full(params)
    if dim is not None and not 1 <= dim <= whole.dim:
        raise ValueError(f"Expected subspace_dim in [1, {whole.dim}], found {dim}.")
    records = public if dim is not None and dim > num_records(curved) else curved
    if whole.dim * num_records(records) * 4 > _GRADIENT_BYTES:
        whole = subspaces.count_sketch(key, params, max(_SKETCH_DIM, dim or 0))
    if dim is None or dim == whole.dim:
        return whole
    if dim > num_records(records):
        raise ValueError(
            f"subspace_dim={dim} needs as many public records, found {num_records(records)}; or give a subspace, "
            "such as count_sketch."
        )
    return _top_eigenspace(loss_fn, params, take(records, slice(0, max(dim, num_records(curved)))), dim, whole)[0]


_top_eigenspace = jax.jit(
    lambda loss_fn, params, records, dim, within: top_eigenspace(loss_fn, params, records, dim, within=within),
    static_argnums=(0, 3),
)
_product = jax.jit(hessian_product, static_argnums=0)


def _curvature(loss_fn, params, space, records, most):
    """Curvatures (r,), descending, and orthonormal directions (r, k) of the leading public eigenspace."""
    rank = min(most, space.dim, num_records(records))
    leading, _ = _top_eigenspace(loss_fn, params, records, rank, space)
    matrix = _public_hessian(loss_fn, params, leading, take(records, slice(0, _CURVATURE_RECORDS)))
    values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(-np.abs(values))
    directions = jnp.matmul(jnp.asarray(vectors[:, order].T, space.layout.dtype), leading.arrays[1].T)
    return np.abs(values)[order], directions


def _public_hessian(loss_fn, params, subspace, records):
    """P^T H P. A host loop over columns: XLA's CPU convolutions are ten times slower in its loops or batched."""
    directions = np.eye(subspace.dim, dtype=subspace.layout.dtype)
    columns = [_product(loss_fn, params, subspace, direction, records) for direction in directions]
    matrix = np.asarray(jnp.stack(columns), np.float64)
    if not np.all(np.isfinite(matrix)):
        raise ValueError(f"The public curvature is not finite at the anchor, {matrix.shape=}.")
    return (matrix + matrix.T) / 2


def _shape(values, directions, damping):
    """M = ((H + lambda I) / top)^{1/2}, of largest eigenvalue 1; negative curvature counts by its absolute value."""
    top = values[0] + damping
    if not top > 0:
        raise ValueError(f"The public curvature {values.shape} is not SPD with {damping=}; give a larger damping.")
    leading, rest = np.sqrt((values + damping) / top), np.sqrt(damping / top)
    return precisions.low_rank(rest, directions, jnp.asarray(leading - rest, directions.dtype))


def _scaled(shape, factor):
    scale, vectors, values = shape.arrays
    return precisions.low_rank(scale * factor, vectors, values * factor)


@functools.partial(jax.jit, static_argnums=0)
def _whitened_norms(loss_fn, params, subspace, precision, records):
    batches, _ = microbatches(records, min(32, num_records(records)))

    def norms(batch):
        rows = projected_gradients(loss_fn, params, subspace, batch)
        return jnp.linalg.norm(jax.vmap(lambda g: precisions.whiten(precision, g))(rows), axis=1)

    return jax.lax.map(norms, batches).ravel()


def _tolerated_noise(key, loss_fn, params, space, shape, held_out):
    """The largest s for which the anchor moved by s M^{-1/2} xi costs the share of the loss's scale, and that cost."""
    losses = np.asarray(_losses(loss_fn, params, held_out), np.float64)
    limit = _NOISE_COST * float(np.sqrt(np.mean(losses**2)))
    moves = [_noise_move(k, shape, space) for k in jax.random.split(key, _NOISE_DRAWS)]

    def cost(scale):
        return float(_moved_loss(loss_fn, params, space, scale, moves, held_out)) - float(np.mean(losses))

    return noise_tolerance(cost, limit), limit


@jax.jit
def _noise_move(key, shape, space):
    return precisions.color(shape, jax.random.normal(key, (space.dim,), space.layout.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _losses(loss_fn, params, records):
    return jax.vmap(loss_fn, in_axes=(None, 0))(params, records)


@functools.partial(jax.jit, static_argnums=0)
def _moved_loss(loss_fn, params, space, scale, moves, records):
    # Unrolled: convolutions with several kernels at once are slow.
    moved = [subspaces.displace(space, params, scale * move) for move in moves]
    return jnp.mean(jnp.stack([mean_loss(loss_fn, p, records, microbatch_size=_SAMPLE) for p in moved]))
