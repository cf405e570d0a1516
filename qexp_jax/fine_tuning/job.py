"""What `fine_tune` was asked for: checked, with its records grouped to units, before any private value is read."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qexp_jax.data import validation
from qexp_jax.data.dataset import Dataset, as_dataset
from qexp_jax.data.records import LossFn, Params, Record, group_by_unit, held, num_records, unit_loss
from qexp_jax.data.relation import NeighboringRelation, checked_relation
from qexp_jax.data.source import Source
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import inputs, preflight
from qexp_jax.fine_tuning.checkpoint import Checkpoint
from qexp_jax.fine_tuning.options import PlanOptions, RunOptions, checked_plan, checked_run
from qexp_jax.fine_tuning.progress import Announce, announcer
from qexp_jax.model import isolation
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import moving_leaves
from qexp_jax.model.subspace import Layout, Subspace
from qexp_jax.privacy import accounting
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.privacy.ledger import Ledger
from qexp_jax.private_pass import devices
from qexp_jax.private_pass.noise import DISCRETE, GAUSSIAN, Noise


class Budget(NamedTuple):
    """What may be spent; public.

    Attributes:
      epsilon: as asked for.
      delta: as asked for.
      mu: the same as Gaussian differential privacy; of a hardened release sqrt(2 rho).
    """

    epsilon: float
    delta: float
    mu: float


class Job(NamedTuple):
    """What was asked for, checked; **not private**: it holds the data.

    Attributes:
      loss_fn: of one record.
      params: pretrained, as given.
      pretrained: the same in working precision.
      layout: what is tuned.
      data: of `inputs.accept`.
      unit_fn: loss of one private unit; until grouped the loss of one record.
      units: the private units; until grouped the records.
      public_fn: loss of one public unit.
      public_units: the public units.
      budget: of the whole release.
      relation: neighbouring relation.
      noise: its kind.
      ledger: open, if any.
      checkpoint: as given.
      plan: options, checked.
      run: options, checked.
      announce: who is told of stages.
    """

    loss_fn: LossFn
    params: Params
    pretrained: Params
    layout: Layout
    data: inputs.Inputs
    unit_fn: LossFn
    units: Source
    public_fn: LossFn
    public_units: Record
    budget: Budget
    relation: NeighboringRelation
    noise: Noise
    ledger: Ledger | None
    checkpoint: Checkpoint | None
    plan: PlanOptions
    run: RunOptions
    announce: Announce

    @property
    def has_private_n(self) -> bool:
        """Whether the number of units is private."""
        return self.relation is NeighboringRelation.ADD_OR_REMOVE_ONE


def accepted(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    *,
    public: Record | Dataset,
    private: Record | Dataset,
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    hardened: bool,
    ledger: Ledger | str | os.PathLike[str] | None,
    checkpoint: Checkpoint | None,
    plan: PlanOptions,
    run: RunOptions,
) -> Job:
    """Everything that can be refused is refused here, before a private value is read.

    Args: those of `fine_tune`.

    Raises:
      ValueError: for bad static or public input.
      ImportError: if a hardened release is asked for and OpenDP is not installed.
    """
    validation.check_key(key)
    noise = DISCRETE if hardened else GAUSSIAN
    noise.check_available()
    relation = checked_relation(relation)
    if checkpoint is not None:
        checkpoints.check(checkpoint)
    plan = checked_plan(plan)
    run = checked_run(run)
    devices.local_mesh(run.mesh)
    private = as_dataset("private", private)
    _check_cap(run, private)
    layout = _layout(params, plan.subspace)
    budget = _budget(noise, epsilon, delta)
    check_loss = functools.partial(isolation.check_loss, loss_fn, layout, params)
    data = inputs.accept(
        key, check_loss, params, as_dataset("public", public), private, relation, plan.subspace, run.mesh
    )  # fmt: skip
    layout = _moving(loss_fn, layout, params, data.public, plan.subspace)
    return Job(
        loss_fn=loss_fn, params=params, pretrained=subspaces.working(layout, params), layout=layout, data=data,
        unit_fn=loss_fn, units=data.private, public_fn=loss_fn, public_units=data.public, budget=budget,
        relation=relation, noise=noise, ledger=ledgers.opened(ledger), checkpoint=checkpoint, plan=plan, run=run,
        announce=announcer(run.progress, plan.rounds),
    )  # fmt: skip


def _budget(noise: Noise, epsilon: float, delta: float) -> Budget:
    epsilon, delta = accounting.check_budget(epsilon, delta)
    return Budget(epsilon, delta, noise.mu_from_budget(epsilon, delta))


def _check_cap(run: RunOptions, private: Dataset) -> None:
    is_capped = private.unit_ids is None or private.max_records_per_unit is not None
    if run.memory_budget is not None and not is_capped:
        raise ValueError("memory_budget with unit_ids needs max_records_per_unit: the largest unit's size is private.")


def grouped(job: Job) -> Job:
    """With records grouped to units; that takes the memory, so that what does not fit is refused first."""
    data = job.data
    cap = data.max_records_per_unit
    if job.run.memory_budget is not None:
        preflight.check(_estimate(job), job.run.memory_budget)
    unit_fn, units = inputs.grouped(job.loss_fn, data.private, data.unit_ids, cap)
    public_fn = job.loss_fn
    public_units = data.public
    if data.public_unit_ids is not None:
        # The same cap as the private units have: the clip norm is a quantile of what public units look like under it.
        public_fn = unit_loss(job.loss_fn)
        public_units = group_by_unit(data.public, data.public_unit_ids, max_records_per_unit=cap)
    return job._replace(unit_fn=unit_fn, units=units, public_fn=public_fn, public_units=public_units)


def _estimate(job: Job) -> preflight.Estimate:
    """Of shapes and public numbers alone, so that a refusal tells of nothing else."""
    data = job.data
    plan = job.plan
    run = job.run
    return preflight.estimate(
        job.loss_fn if data.unit_ids is None else unit_loss(job.loss_fn),
        job.params,
        inputs.one_unit(data),
        num_units=data.num_units,
        num_public=num_records(data.public),
        subspace=plan.subspace,
        precision_rank=max(plan.precision_rank, plan.subspace_dim or 0),
        microbatch_size=run.microbatch_size,
        mode=run.mode,
        num_devices=devices.num_shares(devices.local_mesh(run.mesh)),
        batch_size=data.private.batch_size(private_n=job.has_private_n),
        exact=job.has_private_n,
        tilt=plan.tilt,
    )


def _layout(params: Params, subspace: Subspace | None) -> Layout:
    """What is tuned: all parameters, or what the subspace says, whose parameters must be these."""
    params = held(params, "params", hide_length=False)
    if subspace is None:
        return subspaces.layout_of(params)
    shapes = tuple(jnp.shape(x) for x in jax.tree.leaves(params))
    if jax.tree.structure(params) != subspace.layout.treedef or shapes != subspace.layout.shapes:
        raise ValueError(f"The subspace belongs to parameters of shapes {subspace.layout.shapes}, found {shapes}.")
    return subspace.layout


def _moving(loss_fn: LossFn, layout: Layout, params: Params, public: Record, subspace: Subspace | None) -> Layout:
    """The layout without leaves on which the loss does not depend: noise would be all that reached them.

    Args:
      loss_fn: loss of one record.
      layout: of the parameters.
      params: pretrained.
      public: public records.
      subspace: as given; it has a layout that cannot be changed.
    """
    moves = moving_leaves(loss_fn, params, layout, public)
    if all(moves):
        return layout
    if subspace is None:
        return subspaces.without_still_leaves(layout, moves)
    tuned = [name for name, is_tuned in zip(subspaces.leaf_names(layout), layout.tuned, strict=True) if is_tuned]
    still = [name for name, moving in zip(tuned, moves, strict=True) if not moving]
    raise ValueError(f"The subspace tunes leaves on which the loss does not depend, {still}: leave them out by where=.")
