"""The public side of a round: subspace, precision and clip norm, from the anchor and public records alone.

One rule, with nothing to tune on private data:

* *Directions*: all of them where d is small; else the leading eigenvectors of the second moment of public gradients,
  rotated to the eigenvectors of the public Hessian among them, of which as many are kept as carry more signal than
  noise (`accuracy.useful_dimension`).
* *Damping*: the largest public curvature, doubled while the damped quadratic is no upper model of the public loss, at
  steps as long as the draw's, on public records that the curvature has not seen (`accuracy.taylor_ratio`). A step is
  then never longer than gradient descent with rate 1/(largest curvature) would make it: with less damping one draw goes
  further under mild shift, but where the private curvature exceeds the public one it overshoots (measured on the
  clinical task), and nothing public can tell.
* *Clip norm*: the .9 quantile of the public whitened norms. Higher quantiles send networks astray, since the clip norm
  also bounds the step.

The rule is ours. It reads (N, z), which are public, and is deterministic given its key.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from qexp_jax import precision as precisions
from qexp_jax import subspace as subspaces
from qexp_jax.accuracy import taylor_ratio, useful_dimension
from qexp_jax.clipping import clip
from qexp_jax.curvature import hessian_product, mean_gradient, psd_part, top_eigenspace
from qexp_jax.gradients import projected_gradients
from qexp_jax.precision import Precision
from qexp_jax.records import LossFn, Params, Record, microbatches, num_records, take
from qexp_jax.subspace import Subspace

_SAMPLE = 256
_CURVATURE_RECORDS = 128
_FULL_UP_TO = 512
_GRADIENT_BYTES = 2**30
_SKETCH_DIM = 4096
_CLIP_QUANTILE = 0.9
_SIGNAL_RECORDS = 32
_TRIAL_STEPS = 8
_MAX_DOUBLINGS = 20


class Plan(NamedTuple):
    """What a round needs beside the private records; all of it public.

    Attributes:
      subspace: P.
      precision: H = R R^T, damping included.
      l2_clip_norm: C, in the whitened norm.
      damping: lambda.
      evidence: the public numbers that decided, for the certificate.
    """

    subspace: Subspace
    precision: Precision
    l2_clip_norm: float
    damping: float
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
    subspace: Subspace | None = None,
    subspace_dim: int | None = None,
    max_subspace_dim: int = 48,
    damping: float | None = None,
    l2_clip_norm: float | None = None,
) -> Plan:
    """Chooses what is not given.

    Args:
      key: public randomness: which records, which trial steps.
      loss_fn: loss of one record, for the curvature.
      params: the anchor.
      public: public records.
      clip_loss_fn: loss of one unit, whose gradients are clipped.
      public_units: public units; the same as `public` where a unit is a record.
      num_units: N.
      noise_multiplier: z.
      subspace: public subspace, used as it is.
      subspace_dim: k, in place of the choice by signal and noise.
      max_subspace_dim: upper bound of that choice.
      damping: lambda, in units of curvature.
      l2_clip_norm: C.

    Raises:
      ValueError: if the damped curvature is not SPD, or public gradients vanish; no private record has been read then.
    """
    record_key, unit_key, sketch_key, trial_key = jax.random.split(key, 4)
    curved, held_out = _halves(record_key, public, _SAMPLE)
    _, clip_units = _halves(unit_key, public_units, _SAMPLE)
    chosen = subspace is None
    if subspace is None:
        dim = max_subspace_dim if subspace_dim is None else subspace_dim
        subspace = _default_subspace(sketch_key, loss_fn, params, curved, public, dim, subspace_dim is not None)
    matrix = _public_hessian(loss_fn, params, subspace, take(curved, slice(0, _CURVATURE_RECORDS)))
    gram = np.asarray(_gram(subspace))
    values, vectors = _spectrum(matrix, gram)
    if chosen:
        subspace, matrix, gram = _rotate(subspace, vectors), np.diag(values), np.eye(len(values))
    fixed_dim = None if chosen and subspace_dim is None else (subspace_dim or subspace.dim)
    rows = np.asarray(_gradient_rows(clip_loss_fn, params, subspace, clip_units))[: num_records(clip_units)]
    trial = float(values[0]) if damping is None else damping
    for _ in range(_MAX_DOUBLINGS):
        plan = _with_damping(subspace, matrix, gram, rows, trial, l2_clip_norm, fixed_dim, num_units, noise_multiplier)
        if damping is not None:
            return plan
        ratio = _trial_ratio(trial_key, loss_fn, params, plan, rows, held_out, num_units, noise_multiplier)
        plan.evidence["taylor_ratio"] = ratio
        if ratio <= 1:
            break
        trial *= 2
    return plan


@functools.partial(jax.jit, static_argnames="most")
def _halves(key: jax.Array, records: Record, most: int) -> tuple[Record, Record]:
    """Two disjoint random samples of at most `most` records; a single record serves as both."""
    n = num_records(records)
    order = jax.random.permutation(key, n)
    half = max(1, min(most, n // 2))
    return take(records, order[:half]), take(records, order[-half:] if n > half else order[:half])


def _default_subspace(key, loss_fn, params, curved, public, dim, exact):
    whole = subspaces.full(params)
    if exact and not 1 <= dim <= whole.dim:
        raise ValueError(f"Expected subspace_dim in [1, {whole.dim}], found {dim}.")
    if whole.dim <= _FULL_UP_TO:
        return whole
    n = num_records(curved)
    if dim > n and exact:
        n = min(num_records(public), dim)
        curved = take(public, slice(0, n))
    if exact and dim > n:
        raise ValueError(
            f"subspace_dim={dim} needs as many public records, found {n}; or give a subspace, such as count_sketch."
        )
    within = whole
    if whole.dim * n * 4 > _GRADIENT_BYTES:
        within = subspaces.count_sketch(key, params, max(_SKETCH_DIM, dim))
    basis, _ = _top_eigenspace(loss_fn, params, curved, min(dim, n), within)
    return basis


_top_eigenspace = jax.jit(
    lambda loss_fn, params, records, dim, within: top_eigenspace(loss_fn, params, records, dim, within=within),
    static_argnums=(0, 3),
)
_product = jax.jit(hessian_product, static_argnums=0)


def _public_hessian(loss_fn, params, subspace, records):
    """P^T |H| P. A host loop over columns: XLA's CPU convolutions are ten times slower in its loops or batched."""
    directions = np.eye(subspace.dim, dtype=subspace.layout.dtype)
    matrix = jnp.stack([_product(loss_fn, params, subspace, direction, records) for direction in directions])
    if not np.all(np.isfinite(matrix)):
        raise ValueError(f"The public curvature is not finite at the anchor, {matrix.shape=}.")
    return _psd(matrix)


_psd = jax.jit(psd_part)
_gram = jax.jit(subspaces.gram)


def _spectrum(matrix, gram):
    """Curvature relative to the parameter space: eigenvalues and eigenvectors of H v = a (P^T P) v, descending."""
    try:
        values, vectors = scipy.linalg.eigh(np.asarray(matrix, np.float64), np.asarray(gram, np.float64))
    except np.linalg.LinAlgError:
        raise ValueError(f"Expected linearly independent directions, found a singular P^T P, {gram.shape=}.") from None
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def _rotate(subspace, vectors):
    return subspaces.compose(
        subspace, jnp.asarray(vectors), orthonormal=True, name=f"{subspace.name}, public eigenbasis"
    )


@functools.partial(jax.jit, static_argnums=0)
def _gradient_rows(loss_fn, params, subspace, records):
    batches, _ = microbatches(records, min(32, num_records(records)))
    rows = jax.lax.map(lambda batch: projected_gradients(loss_fn, params, subspace, batch), batches)
    return rows.reshape(-1, subspace.dim)


def _with_damping(subspace, matrix, gram, rows, damping, l2_clip_norm, dim, num_units, noise_multiplier):
    """The plan at one damping; with `dim` None the leading directions are kept as far as they are useful."""
    damped = np.asarray(matrix, np.float64) + damping * np.asarray(gram, np.float64)
    try:
        factor = np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:
        factor = np.full_like(damped, np.nan)
    if not np.all(np.isfinite(factor)):
        raise ValueError(f"The public curvature {damped.shape} is not SPD with {damping=}; give a larger damping.")
    whitened = scipy.linalg.solve_triangular(factor, rows.astype(np.float64).T, lower=True).T
    norms = np.sqrt(np.cumsum(whitened**2, axis=1))
    clips = np.quantile(norms, _CLIP_QUANTILE, axis=0) if l2_clip_norm is None else np.full(len(damped), l2_clip_norm)
    moments = np.mean(np.minimum(norms, clips) ** 2, axis=0)
    best, net = useful_dimension(moments, clips * noise_multiplier, num_units, _SIGNAL_RECORDS)
    dim = best if dim is None else dim
    if not (np.isfinite(clips[dim - 1]) and clips[dim - 1] > 0):
        raise ValueError(f"Public gradients give the clip norm {clips[dim - 1]}; give l2_clip_norm.")
    if dim < subspace.dim:
        subspace = _leading(subspace, dim)
    precision = precisions.dense(jnp.asarray(damped[:dim, :dim], subspace.layout.dtype))
    if not precisions.is_spd(precision):
        raise ValueError(f"The public curvature ({dim}, {dim}) is not SPD in {subspace.layout.dtype} with {damping=}.")
    clipped = float(np.mean(norms[:, dim - 1] > clips[dim - 1]))
    evidence = {"predicted_gain": float(net[dim - 1]), "public_fraction_clipped": clipped}
    return Plan(subspace, precision, float(np.float32(clips[dim - 1])), float(damping), evidence)


def _leading(subspace, dim):
    outer, basis = subspace.arrays
    return subspaces.compose(outer, basis[:, :dim], orthonormal=True, name=subspace.name)


def _trial_ratio(key, loss_fn, params, plan, rows, held_out, num_units, noise_multiplier):
    """Largest Taylor ratio over trial steps: clipped means of a few public units, plus the noise of the draw."""
    noise_std = plan.l2_clip_norm * noise_multiplier
    return float(
        _trial_ratios(
            loss_fn, params, plan.subspace, plan.precision, rows[:, : plan.subspace.dim], key, held_out,
            plan.l2_clip_norm, noise_std / num_units,
        )
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _trial_ratios(loss_fn, params, subspace, precision, rows, key, held_out, l2_clip_norm, relative_noise):
    pick_key, noise_key = jax.random.split(key)
    whitened = jax.vmap(lambda g: precisions.whiten(precision, g))(rows)
    clipped, *_ = jax.vmap(clip, in_axes=(0, None))(whitened, l2_clip_norm)
    picks = jax.random.randint(pick_key, (_TRIAL_STEPS, _SIGNAL_RECORDS), 0, len(rows))
    noise = relative_noise * jax.random.normal(noise_key, (_TRIAL_STEPS, subspace.dim), rows.dtype)
    pulls = jnp.mean(clipped[picks], axis=1) + noise
    steps = -jax.vmap(lambda v: precisions.color(precision, v))(pulls)
    gradient = mean_gradient(loss_fn, params, subspace, held_out, microbatch_size=_SAMPLE)
    predicted = jnp.sum(pulls**2, axis=1) / 2
    ratios = taylor_ratio(loss_fn, params, subspace, steps, gradient, predicted, held_out, microbatch_size=_SAMPLE)
    return jnp.max(jnp.where(jnp.isfinite(ratios), ratios, jnp.inf))
