"""The one call: checks, a public plan, its rounds, and a certificate."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation

from qexp_jax.data import arguments, validation
from qexp_jax.data.records import LossFn, Params, Record, group_by_unit, held, num_records, take, unit_loss
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning import inputs, preflight, tilting
from qexp_jax.fine_tuning import rounds as walks
from qexp_jax.fine_tuning.checkpoint import Checkpoint
from qexp_jax.mechanism import hardened as hardening
from qexp_jax.model import isolation
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import Mode, moving_leaves
from qexp_jax.model.subspace import Subspace
from qexp_jax.privacy import accounting
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.privacy.certificate import ONE_ID, ONE_RECORD, make_certificate, make_provenance
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
    tilt: bool = True,
    features: Callable[..., Any] | None = None,
    ledger: Ledger | str | os.PathLike[str] | None = None,
    diagnostics: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Fine-tunes a pretrained model on private records under (epsilon, delta)-differential privacy.

    Args:
      key: secret typed key; the noise of one release.
      loss_fn: `(params, record) -> scalar`, the loss of one record: pure, of operations that keep records apart
        (`isolation`), and with loops that end whatever a record holds.
      params: pretrained pytree, public. Half-precision leaves are worked on in float32 and cast back at the end.
      public: public records, pytree with a leading axis: curvature, clip norm and dimension come from them; or a
        stream of batches, of which a sample is held.
      private: private records, the same pytree, of other arrays; or a stream of batches of units (`stream`), of any
        lengths, read once a round.
      epsilon: in [1e-4, 1e4].
      delta: in [1e-30, 0.999].
      neighboring_relation: REPLACE_SPECIAL (zero-out one unit; default), ADD_OR_REMOVE_ONE or REPLACE_ONE.
      public_count: N, where it is not the number of private units; required for ADD_OR_REMOVE_ONE, under which the true
        number is private.
      unit_ids: (n,) ids of the private records' units (writers, patients), clipped together: integers or strings, none
        missing (`records.as_unit_ids`). By default each record is a unit.
      public_unit_ids: the same for the public records; only the clip norm uses them.
      max_records_per_unit: public cap on the records that a unit contributes, and the length that units are padded to.
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
        with the same release. Other private data, or the same in another order, are refused. Holds sums that are **not
        private**.
      memory_budget: bytes of one device; a release that `preflight` expects to need more is refused. With `unit_ids` it
        needs `max_records_per_unit`; where the number of units is private, a stream counts with its `batch_size`, or
        whole.
      hardened: integers, and exact discrete Gaussian noise, instead of floating point; see the room `hardened`, also
        for what it costs. Needs OpenDP. Of a mesh it uses one device a process.
      tilt: before the rounds, spend a tenth of mu^2 on one draw of the private mean of public features, and train the
        anchor on public records that are weighted to have this mean (`tilt`, T9); left out where N mu is below 200 or
        training would take minutes, and without effect where the draw shows no shift or weights cannot express it.
      features: `(record) -> arrays` or `(params, record) -> arrays`, whose mean is released in place of that of the
        default features (`features`).
      ledger: of the dataset, or its path; the release is entered there before a private value is read, and stays
        entered if it is then interrupted; one that goes on from its checkpoint is not entered again, and draws no round
        a second time. A hardened one that is killed between the draw of a round and its saving is lost.
      diagnostics: return `(release, [RoundInfo])`, where the second part is **not private**.
      progress: called with the name of each stage as it begins, with each batch of a stream, and with `"done"`.

    Returns:
      A `Release`, or `(Release, list[RoundInfo])` with `diagnostics`.

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
    validation.check_key(key)
    if hardened:
        hardening.check_available()
    _check_options(neighboring_relation, checkpoint, mesh, subspace, mode, progress=progress, features=features)
    local = passes.local_mesh(mesh)
    key = inputs.secret_key(key, mesh)
    precision_rank = arguments.count("precision_rank", precision_rank)
    rounds, microbatch_size, memory_budget = _counts(
        rounds=rounds, microbatch_size=microbatch_size, memory_budget=memory_budget
    )
    max_records_per_unit, subspace_dim = _counts(max_records_per_unit=max_records_per_unit, subspace_dim=subspace_dim)
    damping, l2_clip_norm = _check_settings(damping, l2_clip_norm, memory_budget, unit_ids, max_records_per_unit)
    layout = _layout(params, subspace, subspace_dim)
    epsilon, delta = accounting.check_budget(epsilon, delta)
    mu = (hardening if hardened else accounting).mu_from_budget(epsilon, delta)
    private_n = neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    validation.check_apart(public, private)
    public = inputs.public_records(public, public_unit_ids)
    private = inputs.check_data(
        functools.partial(isolation.check_loss, loss_fn, layout, params), params, public, private, private_n
    )
    inputs.check_devices(mesh, params, subspace, public, private)
    layout = _moving(loss_fn, layout, params, public, subspace)
    unit_ids = inputs.check_ids("unit_ids", private, unit_ids)
    public_unit_ids = inputs.check_ids("public_unit_ids", public, public_unit_ids)
    num_units = inputs.public_num_units(private, unit_ids, public_count, private_n, mesh)
    unit = ONE_RECORD if unit_ids is None else ONE_ID
    ledger = ledgers.open(ledger) if isinstance(ledger, str | os.PathLike) else ledger
    if memory_budget is not None:
        # Before the records are grouped: that takes the memory.
        found = preflight.estimate(
            loss_fn if unit_ids is None else unit_loss(loss_fn), params,
            inputs.one_unit(private, public, unit_ids, max_records_per_unit), num_units=num_units,
            num_public=num_records(public), subspace=subspace, precision_rank=max(precision_rank, subspace_dim or 0),
            microbatch_size=microbatch_size, mode=mode, num_devices=passes.num_shares(local),
            batch_size=inputs.batch_size(private, private_n), exact=private_n, tilt=tilt,
        )  # fmt: skip
        preflight.check(found, memory_budget)
    unit_fn, units = inputs.grouped(loss_fn, private, unit_ids, max_records_per_unit)
    public_fn, public_units = inputs.grouped(loss_fn, public, public_unit_ids, max_records_per_unit)
    plan_key = jax.random.key(_PLAN_SEED)
    anchor = subspaces.working(layout, params)
    prepared = None
    tilt_share = weighting.share(num_units, mu) if tilt and inputs.have_one_shape(public, private) else 0.0
    steps = weighting.num_steps(loss_fn, params, take(public, 0), num_records(public)) if tilt_share else 0
    if steps:
        walks.announce(progress, "tilt, public features")
        prepared = tilting.prepare(jax.random.fold_in(plan_key, 1), anchor, public, features)
    reads_all = prepared is not None or not (public_unit_ids is None and subspace_dim is None)
    # Beside the rounds, and of what the plan reads alone: hashing a hundred megabytes takes longer than a release.
    provenance = ThreadPoolExecutor(1).submit(
        lambda: make_provenance(
            params, public if reads_all else looked_at(plan_key, public), None if subspace is None else subspace.arrays
        )
    )
    mu_of_tilt, mu_of_rounds = (mu * tilt_share**0.5, mu * (1 - tilt_share) ** 0.5) if prepared else (0.0, mu)
    plan_at = functools.partial(
        make_plan, plan_key, loss_fn,
        public=public, clip_loss_fn=public_fn, public_units=public_units,
        num_units=num_units, noise_multiplier=accounting.noise_multiplier(mu_of_rounds, neighboring_relation),
        rounds=rounds, precision_rank=precision_rank, layout=layout, subspace=subspace, subspace_dim=subspace_dim,
        damping=damping, l2_clip_norm=l2_clip_norm,
    )  # fmt: skip
    walks.announce(progress, "public curvature")
    plan = plan_at(params=anchor)
    noise_multiplier, discrete_noise = _noise_of_rounds(mu_of_rounds, plan, neighboring_relation, hardened)
    walks.roundings(plan, walks.needs_exact(plan, neighboring_relation))  # refused before anything is paid
    store = None
    if checkpoint is not None:
        settings = {
            "plan": plan,
            "pretrained parameters": anchor,
            "noise_multiplier": noise_multiplier,
            "neighboring_relation": neighboring_relation.name,
            "num_units": num_units,
            "microbatch_size": microbatch_size,
            "mode": mode,
            "hardened": hardened,
            "devices": passes.num_shares(local),
            "processes": jax.process_count() if passes.spans_processes(mesh) else 1,
            "tilt": None if prepared is None else (prepared.features[1:], prepared.rows, mu_of_tilt, steps),
        }
        store = checkpoints.in_step(mesh, lambda: checkpoints.open_store(checkpoint, settings))
    store = inputs.enter(
        ledger, key, store, units, mesh,
        mu=mu, hardened=hardened, neighboring_relation=neighboring_relation, privacy_unit=unit,
    )  # fmt: skip
    engine = walks.Engine(unit_fn, microbatch_size, mode, mesh, hardened, private_n, diagnostics, store, progress)
    terms_of_tilt, noise_key = None, key
    if prepared is not None:
        tilt_key, noise_key = jax.random.split(key)
        tilt_multiplier = accounting.noise_multiplier(mu_of_tilt, neighboring_relation)
        if hardened:
            tilt_multiplier = hardening.discrete_noise(tilt_multiplier, 1).multiplier
        feature_loss = tilting.loss(prepared.features)
        feature_engine = engine._replace(
            loss_fn=feature_loss if unit_ids is None else unit_loss(feature_loss), mode="reverse"
        )
        noisy, noise_std = tilting.draw(
            key, tilt_key, prepared, units, feature_engine, noise_multiplier=tilt_multiplier
        )  # fmt: skip
        tilted, anchor = tilting.move(
            jax.random.fold_in(plan_key, 2), prepared, noisy, noise_std, loss_fn, anchor, plan.subspace, public,
            num_units=num_units, steps=steps, progress=progress,
        )  # fmt: skip
        terms_of_tilt = tilting.terms(prepared, tilted, tilt_multiplier, steps)
        if tilted.accepted:
            walks.announce(progress, "public curvature")
            plan = plan_at(
                params=anchor, weights=tilted.weights, unit_weights=_of_units(tilted.weights, public_unit_ids)
            )  # fmt: skip
            noise_multiplier, discrete_noise = _noise_of_rounds(mu_of_rounds, plan, neighboring_relation, hardened)
    exact = walks.needs_exact(plan, neighboring_relation)
    roundings = walks.roundings(plan, exact)
    walk = walks.start(layout, anchor, plan.spectrum, plan.rounds)
    walk, infos = walks.run(
        noise_key, walk, plan, units, engine._replace(exact=exact),
        num_units=num_units, noise_multiplier=noise_multiplier, release_key=key,
    )  # fmt: skip
    certificate = make_certificate(
        epsilon=epsilon, delta=delta, relation=neighboring_relation, num_units=num_units,
        num_units_from="slots" if public_count is None else "public_count", unit=unit,
        noise_multiplier=noise_multiplier, plan=terms(plan, roundings), provenance=provenance.result(),
        prng_impl=str(jax.random.key_impl(key)), discrete_noise=discrete_noise,
        tilt=terms_of_tilt,
    )  # fmt: skip
    validation.check_finite("released parameters, of which nothing is returned", walk.params)
    release = Release(_cast(layout, walk.params), certificate)
    return (release, infos) if diagnostics else release


def _noise_of_rounds(mu, plan, neighboring_relation, hardened):
    """z of each of the plan's rounds, and the integers of a hardened one."""
    noise_multiplier = accounting.noise_multiplier(mu / plan.rounds**0.5, neighboring_relation)
    if not hardened:
        return noise_multiplier, None
    noise = hardening.discrete_noise(noise_multiplier, plan.subspace.dim)
    return noise.multiplier, noise


def _of_units(weights, unit_ids):
    """The weight of each unit, the mean of its records'."""
    if unit_ids is None:
        return weights
    grouped, mask = group_by_unit(weights, unit_ids)
    return np.asarray(jnp.sum(grouped * mask, axis=1) / jnp.sum(mask, axis=1))


def _layout(params, subspace, subspace_dim):
    params = held(params, "params", hide_length=False)
    if subspace is None:
        return subspaces.layout_of(params)
    if subspace_dim is not None:
        raise ValueError(f"Give a subspace or a subspace_dim, not both: found {subspace.name!r} and {subspace_dim}.")
    shapes = tuple(jnp.shape(x) for x in jax.tree.leaves(params))
    if jax.tree.structure(params) != subspace.layout.treedef or shapes != subspace.layout.shapes:
        raise ValueError(f"The subspace belongs to parameters of shapes {subspace.layout.shapes}, found {shapes}.")
    return subspace.layout


def _check_options(neighboring_relation, checkpoint, mesh, subspace, mode, **functions):
    """Of their types: a name in place of what it names would be found out in the middle of a release, or never."""
    arguments.neighboring_relation(neighboring_relation)
    if checkpoint is not None:
        checkpoints.check(checkpoint)
    if mode not in get_args(Mode):
        raise ValueError(f"Expected a mode of {get_args(Mode)}, found {mode!r}.")
    for name, value, kind in (("mesh", mesh, jax.sharding.Mesh), ("subspace", subspace, Subspace)):
        if not isinstance(value, kind | None):
            raise ValueError(f"Expected {name} to be a {kind.__name__}, found {arguments.described(value)}.")
    for name, value in functions.items():
        arguments.function(name, value)


def _counts(**values):
    """As Python integers, where they are given; of `subspace_dim` the survey knows the range."""
    return [
        None if value is None else arguments.count(name, value, least=0 if name == "subspace_dim" else 1)
        for name, value in values.items()
    ]


def _check_settings(damping, l2_clip_norm, memory_budget, unit_ids, max_records_per_unit):
    """Damping and clip norm as Python floats, where they are given."""
    if memory_budget is not None and unit_ids is not None and max_records_per_unit is None:
        raise ValueError("memory_budget with unit_ids needs max_records_per_unit: the largest unit's size is private.")
    damping = None if damping is None else arguments.positive("damping", damping)
    l2_clip_norm = None if l2_clip_norm is None else arguments.positive("l2_clip_norm", l2_clip_norm)
    return damping, l2_clip_norm


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
