"""The one call: checks, a public plan, its rounds, and a certificate."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import validation
from qexp_jax.data.dataset import Dataset
from qexp_jax.data.records import LossFn, Params, Record
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.fine_tuning import inputs, rounds, stages
from qexp_jax.fine_tuning.checkpoint import Checkpoint
from qexp_jax.fine_tuning.job import Job, accepted, grouped
from qexp_jax.fine_tuning.options import PlanOptions, RunOptions
from qexp_jax.model.subspace import Layout
from qexp_jax.privacy.certificate import make_certificate
from qexp_jax.privacy.ledger import Ledger
from qexp_jax.private_pass.noise import Calibration
from qexp_jax.quadratic.plan_terms import terms


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
    job = accepted(
        key, loss_fn, params, public=public, private=private, epsilon=epsilon, delta=delta,
        relation=neighboring_relation, hardened=hardened, ledger=ledger, checkpoint=checkpoint, plan=plan, run=run,
    )  # fmt: skip
    job = grouped(job)
    tilt = stages.prepared_tilt(job)
    provenance = stages.provenance(job, tilt)
    job.announce("public curvature")
    made = stages.plan_at(job, tilt, job.pretrained)
    # From here on private values are read: refused before anything is paid, paid before anything is read.
    stages.roundings(made, stages.needs_exact(made, job.relation))
    options = stages.entered(job, tilt, made)
    begin = stages.tilted(job, tilt, made, options)
    calibration = stages.calibration_of_rounds(job, tilt, begin.plan)
    exact = stages.needs_exact(begin.plan, job.relation)
    state = rounds.start(job.layout, begin.pretrained, begin.plan.estimate, begin.plan.rounds)
    state, infos = rounds.run(
        begin.noise_key, state, begin.plan, job.units, options._replace(exact=exact),
        num_units=job.data.num_units, noise_multiplier=calibration.multiplier, release_key=job.data.key,
    )  # fmt: skip
    certificate = _certificate(job, begin, calibration, exact, provenance.result())
    validation.check_finite("released parameters, of which nothing is returned", state.params)
    release = Release(_cast(job.layout, state.params), certificate)
    return (release, infos) if job.run.diagnostics else release


def _certificate(
    job: Job, begin: stages.Tilted, calibration: Calibration, exact: bool, provenance: dict[str, Any]
) -> dict[str, Any]:
    """What is promised of a release, of public values and releases alone.

    Args:
      job: what was asked for.
      begin: where the rounds began.
      calibration: of one of their draws.
      exact: whether each unit was rounded by itself.
      provenance: digests of what the plan saw.
    """
    return make_certificate(
        epsilon=job.budget.epsilon,
        delta=job.budget.delta,
        relation=job.relation,
        num_units=job.data.num_units,
        num_units_from=job.data.num_units_from,
        unit=job.data.unit,
        noise_multiplier=calibration.multiplier,
        plan=terms(begin.plan, stages.roundings(begin.plan, exact)),
        provenance=provenance,
        prng_impl=str(jax.random.key_impl(job.data.key)),
        discrete_noise=calibration.discrete,
        tilt=begin.terms,
    )


def _cast(layout: Layout, params: Params) -> Params:
    """Back to the pretrained dtypes, saturated: float16 ends at 65504, and a release holds no infinity."""

    def saturated(x: jax.Array, dtype: np.dtype) -> jax.Array:
        if x.dtype == dtype:  # and finite, as was checked
            return x
        return jnp.asarray(jnp.clip(x, jnp.finfo(dtype).min, jnp.finfo(dtype).max), dtype)

    leaves = jax.tree.leaves(params)
    cast = [
        saturated(x, dtype) if is_tuned else x
        for x, dtype, is_tuned in zip(leaves, layout.dtypes, layout.tuned, strict=True)
    ]
    return jax.tree.unflatten(layout.treedef, cast)
