"""The one call: checks, a public plan, its rounds, and a certificate."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation

from qexp_jax.data import arguments, validation
from qexp_jax.data.dataset import Dataset, as_dataset
from qexp_jax.data.records import LossFn, Params, Record, group_by_unit, held, num_records, take, unit_loss
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import inputs, preflight, rounds, tilting
from qexp_jax.fine_tuning.checkpoint import Checkpoint
from qexp_jax.fine_tuning.options import PlanOptions, RunOptions, checked_plan, checked_run, with_progress
from qexp_jax.fine_tuning.rounds import announce, needs_exact
from qexp_jax.fine_tuning.rounds import roundings as roundings_of
from qexp_jax.mechanism import hardened as hardened_noise
from qexp_jax.model import isolation
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import moving_leaves
from qexp_jax.model.subspace import Layout
from qexp_jax.privacy import accounting, discrete
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.privacy.certificate import make_certificate, make_provenance
from qexp_jax.privacy.ledger import Ledger
from qexp_jax.private_pass import passes
from qexp_jax.quadratic import weighting
from qexp_jax.quadratic.plan import looked_at, make_plan, terms

# The plan's randomness is public, and not a child of the secret key: the certificate tells what the plan saw.
_PLAN_SEED = 0


class Release(NamedTuple):
    """What may leave the curator.

    Attributes:
      params: the private model; structure and dtypes of the pretrained parameters.
      certificate: JSON-able; depends on public values only.
    """

    params: Params
    certificate: dict[str, Any]


@inputs.with_usual_promotion
def fine_tune(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    *,
    public: Record | Dataset,
    private: Record | Dataset,
    epsilon: float,
    delta: float,
    neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL,
    hardened: bool = False,
    ledger: Ledger | str | os.PathLike[str] | None = None,
    checkpoint: Checkpoint | None = None,
    plan: PlanOptions = PlanOptions(),  # noqa: B008, frozen
    run: RunOptions = RunOptions(),  # noqa: B008
) -> Any:
    """Fine-tunes a pretrained model on private records under (epsilon, delta)-differential privacy.

    Args:
      key: secret typed key; the noise of one release.
      loss_fn: `(params, record) -> scalar`, the loss of one record: pure, of operations that keep records apart
        (`isolation`), and with loops that end whatever a record holds.
      params: pretrained pytree, public. Half-precision leaves are worked on in float32 and cast back at the end.
      public: public records, pytree with a leading axis: curvature, clip norm and dimension come from them; or a
        stream of batches, of which a sample is held; or a `Dataset` of records with unit ids, which only the clip norm
        uses.
      private: private records, the same pytree, of other arrays; or a stream of batches of units (`stream`), of any
        lengths, read once a round; or a `Dataset` of either, for units of several records or another public N.
      epsilon: in [1e-4, 1e4].
      delta: in [1e-30, 0.999].
      neighboring_relation: REPLACE_SPECIAL (zero-out one unit; default), ADD_OR_REMOVE_ONE or REPLACE_ONE.
      hardened: integers, and exact discrete Gaussian noise, instead of floating point; see `hardened`, also for what it
        costs. Needs OpenDP. Of a mesh it uses one device a process.
      ledger: of the dataset, or its path; the release is entered there before a private value is read, and stays
        entered if it is then interrupted; one that goes on from its checkpoint is not entered again, and draws no round
        a second time. A hardened one that is killed between the draw of a round and its saving is lost.
      checkpoint: where a release in progress is saved; called again with the same arguments, it goes on there, or ends
        with the same release. Other private data, or the same in another order, are refused. Holds sums that are **not
        private**.
      plan: public choices in place of the rule's.
      run: memory, devices, progress.

    Returns:
      A `Release`, or `(Release, list[RoundInfo])` with `run.diagnostics`.

    Formal guarantee: `release` is mu-GDP with `certificate["mu"]`, hence (epsilon, delta)-DP, with respect to
    `neighboring_relation` on units of `private`, under the certificate's assumptions; a hardened one is rho-zCDP with
    `certificate["zcdp_rho"]`, hence (epsilon, delta)-DP. No exception and no branch depends on a private value.

    Raises:
      ValueError: for bad static or public input, before any private value is read; if a stream changes its length
        between rounds, if the data are not those that the checkpoint was made of, or if a round would be drawn twice
        for one entry of the ledger; nothing is released then.
      BudgetExceeded: where the ledger does not allow the release; a ValueError.
      ImportError: if a hardened release is asked for and OpenDP is not installed.

    >>> def loss_fn(params, record):
    ...     return (record["x"] @ params["w"] - record["y"]) ** 2 / 2
    >>> x = jax.random.normal(jax.random.key(1), (600, 3))
    >>> data = {"x": x, "y": x @ jnp.array([1.0, 2.0, 3.0])}
    >>> public, private = jax.tree.map(lambda a: a[:200], data), jax.tree.map(lambda a: a[200:], data)
    >>> release = fine_tune(
    ...     jax.random.key(0), loss_fn, {"w": jnp.ones(3)}, public=public, private=private, epsilon=1.0, delta=1e-5
    ... )
    >>> release.params["w"].shape, round(release.certificate["mu"], 4), release.certificate["num_units"]
    ((3,), 0.2681, 400)

    References:
      Tran et al., arXiv:2605.20521 (the mechanism); Dong, Roth and Su, arXiv:1905.02383 (mu-GDP).
    """
    job = _accepted(
        key, loss_fn, params, public, private, epsilon, delta, neighboring_relation, hardened, checkpoint, plan, run
    )
    ledger = ledgers.open(ledger) if isinstance(ledger, str | os.PathLike) else ledger
    job = _grouped(job)
    tilt = _prepared_tilt(job)
    provenance = _provenance(job, tilt)  # digests, beside the rounds
    announce(job.run.progress, "public curvature")
    made = _plan_at(job, tilt, job.anchor)
    # From here on private values are read: refused before anything is paid, paid before anything is read.
    roundings_of(made, needs_exact(made, job.relation))
    options = _entered(job, tilt, made, ledger)
    anchor, made, tilt_terms, noise_key = _tilted(job, tilt, made, options)
    noise_multiplier, discrete_noise = _noise_of_rounds(_mu_of_rounds(job, tilt), made, job.relation, job.hardened)
    exact = needs_exact(made, job.relation)
    state, infos = rounds.run(
        noise_key, rounds.start(job.layout, anchor, made.estimate, made.rounds), made, job.units,
        options._replace(exact=exact),
        num_units=job.data.num_units, noise_multiplier=noise_multiplier, release_key=job.data.key,
    )  # fmt: skip
    certificate = make_certificate(
        epsilon=job.epsilon, delta=job.delta, relation=job.relation, num_units=job.data.num_units,
        num_units_from=job.data.num_units_from, unit=job.data.unit, noise_multiplier=noise_multiplier,
        plan=terms(made, roundings_of(made, exact)), provenance=provenance.result(),
        prng_impl=str(jax.random.key_impl(job.data.key)), discrete_noise=discrete_noise, tilt=tilt_terms,
    )  # fmt: skip
    validation.check_finite("released parameters, of which nothing is returned", state.params)
    release = Release(_cast(job.layout, state.params), certificate)
    return (release, infos) if job.run.diagnostics else release


class _Job(NamedTuple):
    """What was asked for, checked; **not private**: it holds the data.

    Attributes:
      loss_fn: of one record.
      params: pretrained, as given.
      anchor: the same in working precision.
      layout: what is tuned.
      data: of `inputs.accept`.
      unit_fn, units: loss of one private unit, and the units; the loss of one record and the records until grouped.
      public_fn, public_units: the same of the public ones.
      epsilon, delta, mu: the budget; of a hardened release mu is its continuous twin's.
      relation: neighbouring relation.
      hardened: whether noise is discrete.
      checkpoint: as given.
      plan, run: options, checked.
    """

    loss_fn: LossFn
    params: Params
    anchor: Params
    layout: Layout
    data: inputs.Inputs
    unit_fn: LossFn
    units: Record
    public_fn: LossFn
    public_units: Record
    epsilon: float
    delta: float
    mu: float
    relation: NeighboringRelation
    hardened: bool
    checkpoint: Checkpoint | None
    plan: PlanOptions
    run: RunOptions


class _Tilt(NamedTuple):
    """A tilt before it is drawn; public.

    Attributes:
      prepared: features of the public records.
      share: of mu^2.
      steps: of training.
    """

    prepared: tilting.Preparation
    share: float
    steps: int


def _accepted(key, loss_fn, params, public, private, epsilon, delta, relation, hardened, checkpoint, plan, run):
    """Everything that can be refused is refused here, before a private value is read."""
    validation.check_key(key)
    if hardened:
        hardened_noise.check_available()
    arguments.neighboring_relation(relation)
    if checkpoint is not None:
        checkpoints.check(checkpoint)
    plan, run = checked_plan(plan), checked_run(run)
    run = with_progress(run, plan.rounds)
    public, private = as_dataset("public", public), as_dataset("private", private)
    passes.local_mesh(run.mesh)
    _check_cap(run, private)
    layout = _layout(params, plan.subspace)
    epsilon, delta = accounting.check_budget(epsilon, delta)
    mu = (discrete if hardened else accounting).mu_from_budget(epsilon, delta)
    check_loss = functools.partial(isolation.check_loss, loss_fn, layout, params)
    data = inputs.accept(key, check_loss, params, public, private, relation, plan.subspace, run.mesh)
    layout = _moving(loss_fn, layout, params, data.public, plan.subspace)
    anchor = subspaces.working(layout, params)
    return _Job(
        loss_fn, params, anchor, layout, data, loss_fn, data.private, loss_fn, data.public,
        epsilon, delta, mu, relation, bool(hardened), checkpoint, plan, run,
    )  # fmt: skip


def _check_cap(run, private):
    if run.memory_budget is not None and private.unit_ids is not None and private.max_records_per_unit is None:
        raise ValueError("memory_budget with unit_ids needs max_records_per_unit: the largest unit's size is private.")


def _grouped(job):
    """With records grouped to units; that takes the memory, so that what does not fit is refused first."""
    data, cap = job.data, job.data.max_records_per_unit
    if job.run.memory_budget is not None:
        preflight.check(_estimate(job), job.run.memory_budget)
    unit_fn, units = inputs.grouped(job.loss_fn, data.private, data.unit_ids, cap)
    public_fn, public_units = inputs.grouped(job.loss_fn, data.public, data.public_unit_ids, cap)
    return job._replace(unit_fn=unit_fn, units=units, public_fn=public_fn, public_units=public_units)


def _estimate(job):
    data, plan, run = job.data, job.plan, job.run
    private_n = _private_n(job)
    return preflight.estimate(
        job.loss_fn if data.unit_ids is None else unit_loss(job.loss_fn), job.params,
        inputs.one_unit(data.private, data.public, data.unit_ids, data.max_records_per_unit),
        num_units=data.num_units, num_public=num_records(data.public), subspace=plan.subspace,
        precision_rank=max(plan.precision_rank, plan.subspace_dim or 0), microbatch_size=run.microbatch_size,
        mode=run.mode, num_devices=passes.num_shares(passes.local_mesh(run.mesh)),
        batch_size=inputs.batch_size(data.private, private_n), exact=private_n, tilt=plan.tilt,
    )  # fmt: skip


def _private_n(job):
    """Whether the number of units is private."""
    return job.relation is NeighboringRelation.ADD_OR_REMOVE_ONE


def _prepared_tilt(job):
    """The tilt that shapes, N and mu allow; None where they allow none, or where it is not wanted."""
    data = job.data
    share = weighting.share(data.num_units, job.mu)
    if not (job.plan.tilt and share and inputs.have_one_shape(data.public, data.private)):
        return None
    steps = weighting.num_steps(job.loss_fn, job.params, take(data.public, 0), num_records(data.public))
    if not steps:
        return None
    announce(job.run.progress, "tilt, public features")
    prepared = tilting.prepare(jax.random.fold_in(_plan_key(), 1), job.anchor, data.public, job.plan.features)
    return None if prepared is None else _Tilt(prepared, share, steps)


def _mu_of_tilt(job, tilt):
    return job.mu * tilt.share**0.5


def _mu_of_rounds(job, tilt):
    return job.mu if tilt is None else job.mu * (1 - tilt.share) ** 0.5


def _plan_key():
    return jax.random.key(_PLAN_SEED)


def _provenance(job, tilt):
    """Of what the plan reads alone: hashing a hundred megabytes takes longer than a release."""
    reads_all = tilt is not None or job.data.public_unit_ids is not None or job.plan.subspace_dim is not None
    public = job.data.public if reads_all else looked_at(_plan_key(), job.data.public)
    arrays = None if job.plan.subspace is None else job.plan.subspace.arrays
    return ThreadPoolExecutor(1).submit(make_provenance, job.params, public, arrays)


def _plan_at(job, tilt, anchor, **weights):
    """The plan of the rounds around parameters `anchor`."""
    options, data = job.plan, job.data
    noise_multiplier = accounting.noise_multiplier(_mu_of_rounds(job, tilt), job.relation)
    return make_plan(
        _plan_key(), job.loss_fn, anchor, data.public, job.public_fn, job.public_units,
        num_units=data.num_units, noise_multiplier=noise_multiplier, rounds=options.rounds,
        precision_rank=options.precision_rank, layout=job.layout, subspace=options.subspace,
        subspace_dim=options.subspace_dim, damping=options.damping, l2_clip_norm=options.l2_clip_norm, **weights,
    )  # fmt: skip


def _entered(job, tilt, made, ledger):
    """How private passes run, with the release entered in its ledger and its checkpoint open."""
    run = job.run
    store = None
    if job.checkpoint is not None:
        store = checkpoints.in_step(
            run.mesh, lambda: checkpoints.open_store(job.checkpoint, _settings(job, tilt, made))
        )
    store = inputs.enter(
        ledger, job.data.key, store, job.units, run.mesh, mu=job.mu, hardened=job.hardened,
        neighboring_relation=job.relation, privacy_unit=job.data.unit,
    )  # fmt: skip
    return rounds.PassOptions(
        job.unit_fn, run.microbatch_size, run.mode, run.mesh, job.hardened, _private_n(job), run.diagnostics, store,
        run.progress,
    )  # fmt: skip


def _settings(job, tilt, made):
    """What a checkpoint belongs to."""
    noise_multiplier, _ = _noise_of_rounds(_mu_of_rounds(job, tilt), made, job.relation, job.hardened)
    of_tilt = tilt and (tilt.prepared.features[1:], tilt.prepared.rows, _mu_of_tilt(job, tilt), tilt.steps)
    return {
        "plan": made,
        "pretrained parameters": job.anchor,
        "noise_multiplier": noise_multiplier,
        "neighboring_relation": job.relation.name,
        "num_units": job.data.num_units,
        "microbatch_size": job.run.microbatch_size,
        "mode": job.run.mode,
        "hardened": job.hardened,
        "devices": passes.num_shares(passes.local_mesh(job.run.mesh)),
        "processes": jax.process_count() if passes.spans_processes(job.run.mesh) else 1,
        "tilt": of_tilt,
    }


def _tilted(job, tilt, made, options):
    """The anchor and the plan after the tilt, what a certificate says of it, and the key left for the rounds."""
    key = job.data.key
    if tilt is None:
        return job.anchor, made, None, key
    tilt_key, noise_key = jax.random.split(key)
    noise_multiplier = accounting.noise_multiplier(_mu_of_tilt(job, tilt), job.relation)
    if job.hardened:
        noise_multiplier = discrete.discrete_noise(noise_multiplier, 1).multiplier
    feature_loss = tilting.loss(tilt.prepared.features)
    if job.data.unit_ids is not None:
        feature_loss = unit_loss(feature_loss)
    options = options._replace(loss_fn=feature_loss, mode="reverse")
    noisy, noise_std = tilting.draw(key, tilt_key, tilt.prepared, job.units, options, noise_multiplier=noise_multiplier)
    tilted, anchor = tilting.move(
        jax.random.fold_in(_plan_key(), 2), tilt.prepared, noisy, noise_std, job.loss_fn, job.anchor, made.subspace,
        job.data.public, num_units=job.data.num_units, steps=tilt.steps, progress=job.run.progress,
    )  # fmt: skip
    of_tilt = tilting.terms(tilt.prepared, tilted, noise_multiplier, tilt.steps)
    if tilted.accepted:
        announce(job.run.progress, "public curvature")
        unit_weights = _of_units(tilted.weights, job.data.public_unit_ids)
        made = _plan_at(job, tilt, anchor, weights=tilted.weights, unit_weights=unit_weights)
    return anchor, made, of_tilt, noise_key


def _noise_of_rounds(mu, plan, neighboring_relation, hardened):
    """z of each of the plan's rounds, and the integers of a hardened one."""
    noise_multiplier = accounting.noise_multiplier(mu / plan.rounds**0.5, neighboring_relation)
    if not hardened:
        return noise_multiplier, None
    noise = discrete.discrete_noise(noise_multiplier, plan.subspace.dim)
    return noise.multiplier, noise


def _of_units(weights, unit_ids):
    """The weight of each unit, the mean of its records'."""
    if unit_ids is None:
        return weights
    grouped, mask = group_by_unit(weights, unit_ids)
    return np.asarray(jnp.sum(grouped * mask, axis=1) / jnp.sum(mask, axis=1))


def _layout(params, subspace):
    params = held(params, "params", hide_length=False)
    if subspace is None:
        return subspaces.layout_of(params)
    shapes = tuple(jnp.shape(x) for x in jax.tree.leaves(params))
    if jax.tree.structure(params) != subspace.layout.treedef or shapes != subspace.layout.shapes:
        raise ValueError(f"The subspace belongs to parameters of shapes {subspace.layout.shapes}, found {shapes}.")
    return subspace.layout


def _moving(loss_fn, layout, params, public, subspace):
    """The layout without leaves on which the loss does not depend: noise would be all that reached them."""
    moves = moving_leaves(loss_fn, params, layout, public)
    if all(moves):
        return layout
    if subspace is None:
        return subspaces.without_still_leaves(layout, moves)
    tuned = [name for name, is_tuned in zip(subspaces.leaf_names(layout), layout.tuned, strict=True) if is_tuned]
    still = [name for name, moving in zip(tuned, moves, strict=True) if not moving]
    raise ValueError(f"The subspace tunes leaves on which the loss does not depend, {still}: leave them out by where=.")


def _cast(layout, params):
    """Back to the pretrained dtypes, saturated: float16 ends at 65504, and a release holds no infinity."""

    def saturated(x, dtype):
        return jnp.asarray(jnp.clip(x, jnp.finfo(dtype).min, jnp.finfo(dtype).max), dtype)

    leaves = jax.tree.leaves(params)
    return jax.tree.unflatten(
        layout.treedef,
        [saturated(x, t) if f else x for x, t, f in zip(leaves, layout.dtypes, layout.tuned, strict=True)],
    )
