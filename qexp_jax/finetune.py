"""The one call: checks, a public plan, its rounds, and a certificate."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation

from qexp_jax import checkpoint as checkpoints
from qexp_jax import hardened as hardening
from qexp_jax import ledger as ledgers
from qexp_jax import passes, preflight, privacy, stream, validation
from qexp_jax import rounds as walks
from qexp_jax import subspace as subspaces
from qexp_jax.certificate import make_certificate, make_provenance
from qexp_jax.checkpoint import Checkpoint
from qexp_jax.gradients import Mode
from qexp_jax.ledger import Ledger
from qexp_jax.plan import looked_at, make_plan
from qexp_jax.records import LossFn, Params, Record, group_by_unit, num_records, unit_loss
from qexp_jax.subspace import Subspace

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


def fine_tune(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    *,
    public: Record,
    private: Record,
    epsilon: float,
    delta: float,
    neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL,
    public_count: int | None = None,
    unit_ids: Any = None,
    public_unit_ids: Any = None,
    max_records_per_unit: int | None = None,
    rounds: int | None = None,
    precision_rank: int = 128,
    subspace: Subspace | None = None,
    subspace_dim: int | None = None,
    damping: float | None = None,
    l2_clip_norm: float | None = None,
    microbatch_size: int | None = None,
    mode: Mode = "auto",
    mesh: jax.sharding.Mesh | None = None,
    checkpoint: Checkpoint | None = None,
    memory_budget: int | None = None,
    hardened: bool = False,
    ledger: Ledger | str | os.PathLike[str] | None = None,
    diagnostics: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Fine-tunes a pretrained model on private records under (epsilon, delta)-differential privacy.

    Args:
      key: secret typed key; the noise of one release.
      loss_fn: `(params, record) -> scalar`, the loss of one record, pure.
      params: pretrained pytree, public. Half-precision leaves are worked on in float32 and cast back at the end.
      public: public records, pytree with a leading axis: curvature, clip norm and dimension come from them; or a
        stream of batches, of which a sample is held.
      private: private records, the same pytree; or a stream of batches of units (`stream`), read once a round.
      epsilon: > 0.
      delta: in (0, 1).
      neighboring_relation: REPLACE_SPECIAL (zero-out one unit; default), ADD_OR_REMOVE_ONE or REPLACE_ONE.
      public_count: N, where it is not the number of private units; required for ADD_OR_REMOVE_ONE, under which the true
        number is private.
      unit_ids: (n,) ids of the private records' units (writers, patients), clipped together; by default each record is
        a unit.
      public_unit_ids: the same for the public records; only the clip norm uses them.
      max_records_per_unit: public cap on the records that a unit contributes.
      rounds: releases, each with mu/sqrt(rounds), in place of the number that the plan chooses and that a heavy shift
        may raise.
      precision_rank: at most how many leading directions of the public gradients have their curvature measured.
      subspace: public subspace to tune in, in place of all parameters.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda > 0 in units of curvature, public.
      l2_clip_norm: C > 0 in the norm |M^{-1/2} g|, where M has largest eigenvalue 1, public.
      microbatch_size: at most so many private units held at a time; by default as many as suit the device, on a CPU 32
        or fewer.
      mode: `"auto"`, `"reverse"` or `"forward"`, see `gradients.projected_gradients`.
      mesh: devices that share the private units along the mesh's axis `"data"`, each clipping its own. Parameters may
        be sharded over other axes, of type Auto. With devices of several processes, `private` holds the units of this
        process alone, no unit is in two processes, `public_count` is their number in all, and every process calls
        with the same public arguments and ends with the same release.
      checkpoint: where a release in progress is saved; called again with the same arguments, it goes on there, or ends
        with the same release. Holds sums that are **not private**.
      memory_budget: bytes of one device; a release that `preflight` expects to need more is refused.
      hardened: integers, and exact discrete Gaussian noise, instead of floating point; see the room `hardened`, also
        for what it costs. Needs OpenDP. Of a mesh it uses one device a process.
      ledger: of the dataset, or its path; the release is entered there before a private value is read, and stays
        entered if it is then interrupted; one that goes on from its checkpoint is not entered again.
      diagnostics: return `(release, [RoundInfo])`, where the second part is **not private**.
      progress: called with the name of each stage as it begins, with each batch of a stream, and with `"done"`.

    Returns:
      A `Release`, or `(Release, list[RoundInfo])` with `diagnostics`.

    Formal guarantee: `release` is mu-GDP with `certificate["mu"]`, hence (epsilon, delta)-DP, with respect to
    `neighboring_relation` on units of `private`, under the certificate's assumptions; a hardened one is rho-zCDP with
    `certificate["zcdp_rho"]`, hence (epsilon, delta)-DP. No exception and no branch depends on a private value.

    Raises:
      ValueError: for bad static or public input, before any private value is read; if a stream changes its length
        between rounds, or is not the one that the checkpoint was made of; nothing is released then.
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
    validation.check_key(key)
    if hardened:
        hardening.check_available()
    local = passes.local_mesh(mesh)
    key = passes.one_key(key, mesh)
    layout = _layout(params, subspace, subspace_dim)
    _check_settings(rounds, precision_rank, damping, l2_clip_norm, microbatch_size)
    mu = (hardening if hardened else privacy).mu_from_budget(epsilon, delta)
    private_n = neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    public = _public_records(public)
    _check_data(loss_fn, layout, params, public, private, private_n)
    unit_fn, units = _units(loss_fn, private, unit_ids, max_records_per_unit)
    public_fn, public_units = _units(loss_fn, public, public_unit_ids, max_records_per_unit)
    num_units = _public_num_units(units, public_count, private_n, mesh)
    unit = "one record" if unit_ids is None else "all records with one unit id"
    ledger = ledgers.open(ledger) if isinstance(ledger, str | os.PathLike) else ledger
    if memory_budget is not None:
        record, batch_size = _one_unit(units, public_units)
        found = preflight.estimate(
            unit_fn, params, record, num_units=num_units, num_public=num_records(public), subspace=subspace,
            precision_rank=max(precision_rank, subspace_dim or 0), microbatch_size=microbatch_size, mode=mode,
            num_devices=passes.num_shares(local), batch_size=batch_size,
        )  # fmt: skip
        preflight.check(found, memory_budget)
    plan_key, reads_all = jax.random.key(_PLAN_SEED), not (public_unit_ids is None and subspace_dim is None)
    # Beside the rounds, and of what the plan reads alone: hashing a hundred megabytes takes longer than a release.
    provenance = ThreadPoolExecutor(1).submit(
        lambda: make_provenance(params, public if reads_all else looked_at(plan_key, public), subspace)
    )
    walks.announce(progress, "public curvature")
    plan = make_plan(
        plan_key, loss_fn, subspaces.working(layout, params), public, public_fn, public_units,
        num_units=num_units, noise_multiplier=privacy.noise_multiplier(mu, neighboring_relation), rounds=rounds,
        precision_rank=precision_rank, subspace=subspace, subspace_dim=subspace_dim, damping=damping,
        l2_clip_norm=l2_clip_norm,
    )  # fmt: skip
    noise_multiplier = privacy.noise_multiplier(mu / plan.rounds**0.5, neighboring_relation)
    discrete_noise = None
    if hardened:
        discrete_noise = hardening.discrete_noise(noise_multiplier, plan.subspace.dim)
        noise_multiplier = discrete_noise.multiplier
    walk = walks.start(layout, params, plan.spectrum, plan.rounds)
    store = None
    if checkpoint is not None:
        settings = {
            "plan": plan,
            "pretrained parameters": walk.params,
            "noise_multiplier": noise_multiplier,
            "neighboring_relation": neighboring_relation.name,
            "num_units": num_units,
            "microbatch_size": microbatch_size,
            "mode": mode,
            "hardened": hardened,
            "devices": passes.num_shares(local),
            "processes": jax.process_count() if passes.spans_processes(mesh) else 1,
        }
        store = checkpoints.open_store(checkpoint, settings)
    if ledger is not None and not (passes.spans_processes(mesh) and jax.process_index()):
        _enter(
            ledger, key, store, mu=mu, hardened=hardened, neighboring_relation=neighboring_relation, privacy_unit=unit
        )
    engine = walks.Engine(unit_fn, microbatch_size, mode, mesh, hardened, store, progress)
    walk, infos = walks.run(
        key, walk, plan, units, engine, num_units=num_units, noise_multiplier=noise_multiplier
    )  # fmt: skip
    certificate = make_certificate(
        epsilon=epsilon, delta=delta, relation=neighboring_relation, num_units=num_units,
        num_units_from="slots" if public_count is None else "public_count", unit=unit,
        noise_multiplier=noise_multiplier, plan=plan, provenance=provenance.result(),
        prng_impl=str(jax.random.key_impl(key)), discrete_noise=discrete_noise,
    )  # fmt: skip
    release = Release(_cast(layout, walk.params), certificate)
    return (release, infos) if diagnostics else release


def _enter(ledger, key, store, **terms):
    """Debits the release, unless its checkpoint shows that it was debited before it was interrupted."""
    tag = ledgers.key_tag(ledger, key)
    if store is not None and checkpoints.is_paid(store, tag):
        return
    ledgers.debit(ledger, key, **terms)
    if store is not None:
        checkpoints.mark_paid(store, tag)


def _one_unit(units, public_units):
    """The shapes of one unit, and the length of a stream's batches.

    Not the number of units in memory, which may be private: what is refused depends on the public N.
    """
    batch = stream.first(units) if stream.is_stream(units) else None
    some = batch if batch is not None else public_units if stream.is_stream(units) else units
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jnp.result_type(x)), some)
    return shapes, None if batch is None else num_records(batch)


_PUBLIC_SAMPLE = 4096


def _public_records(public):
    """Public records in memory, of a stream a sample."""
    if not stream.is_stream(public):
        return public
    # The sample is the same in every process and at every start: a checkpoint goes on with the same plan.
    return stream.sample(np.random.default_rng(0), public, _PUBLIC_SAMPLE)


def _check_data(loss_fn, layout, params, public, private, private_n):
    first = stream.first(private) if stream.is_stream(private) else private
    validation.check_records("public", public)
    validation.check_finite("public records", public)
    validation.check_finite("anchor parameters", params)
    validation.check_loss(loss_fn, layout, params, public)
    if first is not None or not private_n:
        validation.check_records("private", {} if first is None else first, allow_empty=private_n)
        validation.check_same_structure(public, first)
        validation.check_loss(loss_fn, layout, params, first)


def _layout(params, subspace, subspace_dim):
    if subspace is None:
        return subspaces.layout_of(params)
    if subspace_dim is not None:
        raise ValueError(f"Give a subspace or a subspace_dim, not both: found {subspace.name!r} and {subspace_dim}.")
    shapes = tuple(jnp.shape(x) for x in jax.tree.leaves(params))
    if jax.tree.structure(params) != subspace.layout.treedef or shapes != subspace.layout.shapes:
        raise ValueError(f"The subspace belongs to parameters of shapes {subspace.layout.shapes}, found {shapes}.")
    return subspace.layout


def _check_settings(rounds, precision_rank, damping, l2_clip_norm, microbatch_size):
    integers = {"rounds": rounds, "precision_rank": precision_rank, "microbatch_size": microbatch_size}
    for name, value in integers.items():
        if value is not None and not (type(value) is int and value >= 1):  # True is no number
            raise ValueError(f"Expected an integer {name} >= 1, found {value}.")
    for name, value in (("damping", damping), ("l2_clip_norm", l2_clip_norm)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"Expected a finite {name} > 0, found {value}.")


def _units(loss_fn, records, unit_ids, max_records_per_unit):
    if unit_ids is None:
        return loss_fn, records
    if stream.is_stream(records):
        raise ValueError("A stream yields whole units, (records, mask) of group_by_unit, for unit_loss; not unit_ids.")
    return unit_loss(loss_fn), group_by_unit(records, unit_ids, max_records_per_unit=max_records_per_unit)


def _public_num_units(units, public_count, private_n, mesh):
    """N, which enters step and noise and must be public."""
    if public_count is None and private_n:
        raise ValueError("ADD_OR_REMOVE_ONE keeps the number of private units private: give a public_count.")
    if public_count is None and passes.spans_processes(mesh):
        raise ValueError("Several processes hold the private units: give a public_count of all of them.")
    if public_count is None:
        public_count = stream.count(units) if stream.is_stream(units) else num_records(units)
    if not (type(public_count) is int and 1 <= public_count < 2**31):
        raise ValueError(f"Expected an integer public_count in [1, 2^31), found {public_count}.")
    return public_count


def _cast(layout, params):
    """Back to the pretrained dtypes, saturated: float16 ends at 65504, and a release holds no infinity."""

    def saturated(x, dtype):
        return jnp.asarray(jnp.clip(x, jnp.finfo(dtype).min, jnp.finfo(dtype).max), dtype)

    leaves = jax.tree.leaves(params)
    return jax.tree.unflatten(
        layout.treedef,
        [saturated(x, t) if f else x for x, t, f in zip(leaves, layout.dtypes, layout.tuned, strict=True)],
    )
