"""The stages of a release between what was asked for and its rounds, in the order of `fine_tune`.

    prepared_tilt    features of the public records
    plan_at          the public plan of the rounds
    entered          the release in its ledger, its checkpoint open; only now are private values read
    tilted           the draw of the tilt, and what it moves

`needs_exact` and `roundings` say how the plan's sums are rounded, `calibration_of_rounds` how the budget is spent.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Params, group_by_unit, num_records, take, unit_loss
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import entry, tilting
from qexp_jax.fine_tuning.job import Job
from qexp_jax.fine_tuning.one_pass import PassOptions
from qexp_jax.model.gradients import is_in_factors
from qexp_jax.numerics.keys import split
from qexp_jax.privacy import accounting
from qexp_jax.privacy.certificate import make_provenance
from qexp_jax.private_pass import clipping, devices
from qexp_jax.private_pass.noise import Calibration
from qexp_jax.quadratic import tilted_training, weighting
from qexp_jax.quadratic.plan import Plan, looked_at, make_plan
from qexp_jax.quadratic.preconditioner import precision_of

# The plan's randomness is public, and not a child of the secret key: the certificate tells what the plan saw.
_PLAN_SEED = 0

# Shares of the clip norm.
_MOST_ROUNDING = 0.02
_TOO_MUCH_ROUNDING = 0.25


class PreparedTilt(NamedTuple):
    """A tilt before it is drawn; public.

    Attributes:
      prepared: features of the public records.
      share: of mu^2.
      steps: of training.
    """

    prepared: tilting.Preparation
    share: float
    steps: int


def prepared_tilt(job: Job) -> PreparedTilt | None:
    """The tilt that shapes, N and mu allow; None where they allow none, or where it is not wanted."""
    data = job.data
    share = weighting.share(data.num_units, job.budget.mu)
    wanted = job.plan.tilt and not job.plan.one_draw
    if not (wanted and share and data.private.has_shapes_of(data.public)):
        return None
    steps = tilted_training.num_steps(job.loss_fn, job.params, take(data.public, 0), num_records(data.public))
    if not steps:
        return None
    job.announce("tilt, public features")
    prepared = tilting.prepare(jax.random.fold_in(_plan_key(), 1), job.pretrained, data.public, job.plan.features)
    return None if prepared is None else PreparedTilt(prepared, share, steps)


def _mu_of_tilt(job: Job, tilt: PreparedTilt) -> float:
    return job.budget.mu * tilt.share**0.5


def _mu_of_rounds(job: Job, tilt: PreparedTilt | None) -> float:
    return job.budget.mu if tilt is None else job.budget.mu * (1 - tilt.share) ** 0.5


def _plan_key() -> jax.Array:
    return jax.random.key(_PLAN_SEED)


def provenance(job: Job, tilt: PreparedTilt | None) -> Future[dict[str, Any]]:
    """Digests of what the plan reads alone, made beside the rounds: of a hundred megabytes they take longer."""
    reads_all = tilt is not None or job.data.public_unit_ids is not None or job.plan.subspace_dim is not None
    public = job.data.public if reads_all else looked_at(_plan_key(), job.data.public)
    arrays = None if job.plan.subspace is None else job.plan.subspace.arrays
    return ThreadPoolExecutor(1).submit(make_provenance, job.params, public, arrays)


def plan_at(job: Job, tilt: PreparedTilt | None, params: Params, **weights: Any) -> Plan:
    """The plan of the rounds around parameters.

    Args:
      job: what was asked for.
      tilt: which leaves the rounds the rest of the budget.
      params: in working precision.
      **weights: of public records and units, by default one each.
    """
    options = job.plan
    data = job.data
    noise_multiplier = accounting.noise_multiplier(_mu_of_rounds(job, tilt), job.relation)
    return make_plan(
        _plan_key(), job.loss_fn, params, data.public, job.public_fn, job.public_units,
        num_units=data.num_units, noise_multiplier=noise_multiplier, rounds=options.rounds,
        precision_rank=options.precision_rank, layout=job.layout, subspace=options.subspace,
        subspace_dim=options.subspace_dim, damping=options.damping, l2_clip_norm=options.l2_clip_norm,
        one_draw=options.one_draw, **weights,
    )  # fmt: skip


def entered(job: Job, tilt: PreparedTilt | None, made: Plan) -> PassOptions:
    """How private passes run, with the release entered in its ledger and its checkpoint open.

    Args:
      job: what was asked for.
      tilt: before it is drawn.
      made: the plan, before the tilt.

    Raises:
      ValueError: if the checkpoint is of another release or of other data, or the ledger refuses the release.
    """
    run = job.run
    store = entry.enter(
        job.ledger, job.data.key, _store(job, tilt, made), job.units, run.mesh,
        mu=job.budget.mu, hardened=job.noise.hardened, neighboring_relation=job.relation, privacy_unit=job.data.unit,
    )  # fmt: skip
    return PassOptions(
        loss_fn=job.unit_fn,
        microbatch_size=run.microbatch_size,
        mode=run.mode,
        mesh=run.mesh,
        noise=job.noise,
        exact=job.has_private_n,
        diagnostics=run.diagnostics,
        store=store,
        announce=job.announce,
    )


def _store(job: Job, tilt: PreparedTilt | None, made: Plan) -> checkpoints.Store | None:
    """The open checkpoint, if there is one."""
    checkpoint = job.checkpoint
    if checkpoint is None:
        return None
    settings = _settings(job, tilt, made)
    return devices.in_step(job.run.mesh, lambda: checkpoints.open_store(checkpoint, settings))


def _settings(job: Job, tilt: PreparedTilt | None, made: Plan) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    of_tilt = tilt and (tilt.prepared.features[1:], tilt.prepared.rows, _mu_of_tilt(job, tilt), tilt.steps)
    return {
        "plan": made,
        "pretrained parameters": job.pretrained,
        "noise_multiplier": calibration_of_rounds(job, tilt, made).multiplier,
        "neighboring_relation": job.relation.name,
        "num_units": job.data.num_units,
        "microbatch_size": job.run.microbatch_size,
        "mode": job.run.mode,
        "hardened": job.noise.hardened,
        "devices": devices.num_shares(devices.local_mesh(job.run.mesh)),
        "processes": jax.process_count() if devices.spans_processes(job.run.mesh) else 1,
        "tilt": of_tilt,
    }


class Tilted(NamedTuple):
    """Where the rounds begin; released.

    Attributes:
      pretrained: the parameters after the tilt, in working precision.
      plan: around them.
      terms: what a certificate says of the tilt, None without one.
      noise_key: secret, left for the rounds.
    """

    pretrained: Params
    plan: Plan
    terms: dict[str, Any] | None
    noise_key: jax.Array


def tilted(job: Job, tilt: PreparedTilt | None, made: Plan, options: PassOptions) -> Tilted:
    """The draw of a tilt, if there is one, and what follows from it by post-processing (T9).

    Args:
      job: what was asked for.
      tilt: before it is drawn.
      made: the plan before it.
      options: of `entered`.
    """
    key = job.data.key
    if tilt is None:
        return Tilted(job.pretrained, made, terms=None, noise_key=key)
    tilt_key, noise_key = split(key, 2)
    noise_multiplier = accounting.noise_multiplier(_mu_of_tilt(job, tilt), job.relation)
    noise_multiplier = job.noise.calibrate(noise_multiplier, 1).multiplier
    feature_loss = tilting.loss(tilt.prepared.features)
    if job.data.unit_ids is not None:
        feature_loss = unit_loss(feature_loss)
    options = options._replace(loss_fn=feature_loss, mode="reverse")
    noisy, noise_std = tilting.draw(key, tilt_key, tilt.prepared, job.units, options, noise_multiplier=noise_multiplier)
    weighted, moved = tilting.move(
        jax.random.fold_in(_plan_key(), 2), tilt.prepared, noisy, noise_std, job.loss_fn, job.pretrained,
        made.subspace, job.data.public, num_units=job.data.num_units, steps=tilt.steps, announce=job.announce,
    )  # fmt: skip
    terms = tilting.terms(tilt.prepared, weighted, noise_multiplier, tilt.steps)
    if weighted.accepted:
        # Around other parameters the curvature is another, and so it is where other records count.
        job.announce("public curvature")
        unit_weights = _of_units(weighted.weights, job.data.public_unit_ids)
        made = plan_at(job, tilt, moved, weights=weighted.weights, unit_weights=unit_weights)
    return Tilted(moved, made, terms=terms, noise_key=noise_key)


def calibration_of_rounds(job: Job, tilt: PreparedTilt | None, plan: Plan) -> Calibration:
    """The noise of each of the plan's rounds."""
    mu = _mu_of_rounds(job, tilt)
    noise_multiplier = accounting.noise_multiplier(mu / plan.rounds**0.5, job.relation)
    return job.noise.calibrate(noise_multiplier, plan.subspace.dim)


def _of_units(weights: np.ndarray, unit_ids: np.ndarray | None) -> np.ndarray:
    """The weight of each unit, the mean of its records'."""
    if unit_ids is None:
        return weights
    grouped, mask = group_by_unit(weights, unit_ids)
    return np.asarray(jnp.sum(grouped * mask, axis=1) / jnp.sum(mask, axis=1))


# --- rounding ---


def needs_exact(plan: Plan, neighboring_relation: NeighboringRelation) -> bool:
    """Whether each unit has to be rounded by itself: where units have no places, or eigenvalues are far apart."""
    has_places = neighboring_relation is not NeighboringRelation.ADD_OR_REMOVE_ONE
    return not has_places or max(roundings(plan, exact=False)) > _MOST_ROUNDING


def roundings(plan: Plan, exact: bool) -> list[float]:
    """The share of the clip norm that each preconditioner keeps for rounding, `clipping.rounding`; on the host.

    Raises:
      ValueError: where rounding would take a quarter of the clip norm or more.
    """
    in_factors = is_in_factors(plan.subspace)
    preconditioners = jax.device_get(plan.preconditioners)
    found = []
    for i in range(len(preconditioners.l2_clip_norm)):
        preconditioner = jax.tree.map(lambda x, i=i: x[i], preconditioners)
        precision = precision_of(plan.estimate.directions, preconditioner)
        is_leading = precision.num_coordinates < precision.dim
        found.append(float(clipping.rounding(precision, exact or is_leading or not in_factors)))
    if exact and max(found) >= _TOO_MUCH_ROUNDING:
        raise ValueError(
            f"Rounding in float32 would take {max(found):.2g} of the clip norm: damping={plan.damping} is too small "
            f"for curvatures up to {float(plan.estimate.curvature.max()):.2g}."
        )
    return found
