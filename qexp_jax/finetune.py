"""The one call: a public plan, then rounds of private pass and exact draw, and a certificate.

**Rounds (T6).** Round t expands at the parameters that the rounds before released, with the plan's precision and clip
norm, so that the rounds compose adaptively to `mu^2 = sum mu_t^2`. Their number and the even split are fixed by public
data before the first. What a round does with its draw is post-processing (T5): it follows it for a T-th of the length
that the sums released so far deserve (`flow`), next to nothing where they look like noise.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dp_accounting import NeighboringRelation

from qexp_jax import flow, mechanism, privacy, validation
from qexp_jax import hardened as hardening
from qexp_jax import ledger as ledgers
from qexp_jax import subspace as subspaces
from qexp_jax.certificate import make_certificate, make_provenance
from qexp_jax.clipping import ClipInfo, clipped_sum
from qexp_jax.gradients import Mode
from qexp_jax.ledger import Ledger
from qexp_jax.mechanism import Quadratic
from qexp_jax.plan import Plan, make_plan
from qexp_jax.records import LossFn, Params, Record, group_by_unit, num_records, unit_loss
from qexp_jax.subspace import Subspace


class Release(NamedTuple):
    """What may leave the curator.

    Attributes:
      params: the private model; structure and dtypes of the pretrained parameters.
      certificate: JSON-able; depends on public values only.
    """

    params: Params
    certificate: dict[str, Any]


class RoundInfo(NamedTuple):
    """**Not private**: never release, log or store it unless the private records are open data.

    Attributes:
      plan: the public plan.
      quadratic: the utility with the exact clipped sum.
      noise_std: C z.
      w: the draw.
      step: the multiple of it that was taken.
      excess_loss: how much of the best loss per record of the quadratic with precision M / step the noise cost; reveals
        |xi|.
      clip_info: counts of clipped and non-finite units.
    """

    plan: Plan
    quadratic: Quadratic
    noise_std: float
    w: jax.Array
    step: jax.Array
    excess_loss: jax.Array
    clip_info: ClipInfo


_clipped_sum = jax.jit(clipped_sum, static_argnames=("loss_fn", "microbatch_size", "mode"))


class _Walk(NamedTuple):
    """Carried from round to round; made of releases and public numbers alone.

    Attributes:
      params: where the next round expands.
      moved: (k,) whitened displacement from the pretrained parameters.
      gradients: (k,) sum over rounds of the released mean gradients, each traced back to the pretrained parameters.
      done: rounds.
    """

    params: Params
    moved: jax.Array
    gradients: jax.Array
    done: jax.Array


_noisy_sum = jax.jit(mechanism.noisy_sum)


@jax.jit
def _follow(noisy, walk, subspace, quadratic, noise_std, spectrum, rounds, longest, largest_step):
    """The draw of a noisy sum, followed for a step of the flow whose length all releases so far deserve."""
    num_units = quadratic.num_units
    w = mechanism.release_step(quadratic, noisy)
    noise_var = (noise_std / num_units) ** 2
    gradients = walk.gradients + noisy / num_units - flow.predicted_gradient(spectrum, walk.moved)
    done = walk.done + 1
    energy = flow.energies(spectrum.directions, gradients / done)
    signal = flow.signal(energy, spectrum, noise_var / done, num_units)
    length = flow.best_length(signal, spectrum, noise_var / rounds, num_units, longest)
    step = jnp.minimum(length / rounds, largest_step)
    params = subspaces.displace(subspace, walk.params, step * w)
    # The step of this length is the draw with precision M / step, whose utility is in units of the loss.
    excess = step * mechanism.excess_utility(quadratic, w) / num_units
    return w, step, excess, _Walk(params, walk.moved - step * noisy / num_units, gradients, done)


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
    microbatch_size: int = 32,
    mode: Mode = "reverse",
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
      public: public records, pytree with a leading axis: curvature, clip norm and dimension come from them.
      private: private records, the same pytree.
      epsilon: > 0.
      delta: in (0, 1).
      neighboring_relation: REPLACE_SPECIAL (zero-out one unit; default), ADD_OR_REMOVE_ONE or REPLACE_ONE.
      public_count: N, where it is not the number of private units; required for ADD_OR_REMOVE_ONE, under which the true
        number is private.
      unit_ids: (n,) ids of the private records' units (writers, patients), clipped together; by default each record is
        a unit.
      public_unit_ids: the same for the public records; only the clip norm uses them.
      max_records_per_unit: public cap on the records that a unit contributes.
      rounds: releases, each with mu/sqrt(rounds), in place of the number that the plan chooses.
      precision_rank: at most how many leading directions of the public gradients have their curvature measured.
      subspace: public subspace to tune in, in place of all parameters.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda > 0 in units of curvature, public.
      l2_clip_norm: C > 0 in the norm |M^{-1/2} g|, where M has largest eigenvalue 1, public.
      microbatch_size: private units held at a time.
      mode: `"reverse"` or `"forward"`, see `gradients.projected_gradients`.
      hardened: integers, and exact discrete Gaussian noise, instead of floating point; see the room `hardened`, also
        for what it costs. Needs OpenDP.
      ledger: of the dataset, or its path; the release is entered there before a private value is read, and stays
        entered if it is then interrupted.
      diagnostics: return `(release, [RoundInfo])`, where the second part is **not private**.
      progress: called with the name of each stage as it begins, and with `"done"`.

    Returns:
      A `Release`, or `(Release, list[RoundInfo])` with `diagnostics`.

    Formal guarantee: `release` is mu-GDP with `certificate["mu"]`, hence (epsilon, delta)-DP, with respect to
    `neighboring_relation` on units of `private`, under the certificate's assumptions; a hardened one is rho-zCDP with
    `certificate["zcdp_rho"]`, hence (epsilon, delta)-DP. No exception and no branch depends on a private value.

    Raises:
      ValueError: for bad static or public input, before any private value is read.
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
    layout = _layout(params, subspace, subspace_dim)
    _check_settings(rounds, precision_rank, damping, l2_clip_norm, microbatch_size)
    mu = (hardening if hardened else privacy).mu_from_budget(epsilon, delta)
    private_n = neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    _check_data(loss_fn, layout, params, public, private, private_n)
    unit_fn, units = _units(loss_fn, private, unit_ids, max_records_per_unit)
    public_fn, public_units = _units(loss_fn, public, public_unit_ids, max_records_per_unit)
    num_units = _public_num_units(units, public_count, private_n)
    unit = "one record" if unit_ids is None else "all records with one unit id"
    ledger = ledgers.open(ledger) if isinstance(ledger, str | os.PathLike) else ledger
    plan_key, noise_key = jax.random.split(key)
    _announce(progress, "public curvature")
    plan = make_plan(
        plan_key,
        loss_fn,
        subspaces.working(layout, params),
        public,
        public_fn,
        public_units,
        num_units=num_units,
        noise_multiplier=privacy.noise_multiplier(mu, neighboring_relation),
        rounds=rounds,
        precision_rank=precision_rank,
        subspace=subspace,
        subspace_dim=subspace_dim,
        damping=damping,
        l2_clip_norm=l2_clip_norm,
    )
    noise_multiplier = privacy.noise_multiplier(mu / plan.rounds**0.5, neighboring_relation)
    discrete_noise = None
    if hardened:
        discrete_noise = hardening.discrete_noise(noise_multiplier, plan.l2_clip_norm, plan.subspace.dim)
        noise_multiplier = discrete_noise.multiplier
    private_pass = functools.partial(
        hardening.integer_sum if hardened else _clipped_sum,
        loss_fn=unit_fn,
        units=units,
        microbatch_size=microbatch_size,
        mode=mode,
    )
    zeros = jnp.zeros(plan.subspace.dim, layout.dtype)
    if ledger is not None:
        terms = {"neighboring_relation": neighboring_relation, "privacy_unit": unit}
        ledgers.debit(ledger, key, mu=mu, hardened=hardened, **terms)
    walk, infos = _Walk(subspaces.working(layout, params), zeros, zeros, jnp.zeros((), layout.dtype)), []
    for round_key in jax.random.split(noise_key, plan.rounds):
        walk, info = _round(round_key, walk, plan, private_pass, discrete_noise, num_units, noise_multiplier, progress)
        infos.append(info)
    _announce(progress, "done", walk)
    certificate = make_certificate(
        epsilon=epsilon,
        delta=delta,
        relation=neighboring_relation,
        num_units=num_units,
        num_units_from="slots" if public_count is None else "public_count",
        unit=unit,
        noise_multiplier=noise_multiplier,
        plan=plan,
        provenance=make_provenance(params, public, subspace),
        prng_impl=str(jax.random.key_impl(key)),
        discrete_noise=discrete_noise,
    )
    release = Release(_cast(layout, walk.params), certificate)
    return (release, infos) if diagnostics else release


def _round(key, walk, plan, private_pass, discrete_noise, num_units, noise_multiplier, progress):
    """Passes once over the private units, draws, and moves."""
    _announce(progress, "private pass", walk)
    total, clip_info = private_pass(
        params=walk.params, subspace=plan.subspace, precision=plan.precision, l2_clip_norm=plan.l2_clip_norm
    )
    _announce(progress, "draw", total)
    noise_std = plan.l2_clip_norm * noise_multiplier
    if discrete_noise is None:
        noisy = _noisy_sum(key, total, noise_std)
    else:
        total, noisy = hardening.noisy_sum(total, discrete_noise, plan.subspace.layout.dtype)
    quadratic = Quadratic(plan.precision, total, num_units)
    w, step, excess, walk = _follow(
        noisy, walk, plan.subspace, quadratic, noise_std, plan.spectrum, plan.rounds, plan.longest, plan.largest_step
    )
    return walk, RoundInfo(plan, quadratic, noise_std, w, step, excess, clip_info)


def _check_data(loss_fn, layout, params, public, private, private_n):
    validation.check_records("public", public)
    validation.check_records("private", private, allow_empty=private_n)
    validation.check_same_structure(public, private)
    validation.check_finite("public records", public)
    validation.check_finite("anchor parameters", params)
    validation.check_loss(loss_fn, layout, params, public)
    validation.check_loss(loss_fn, layout, params, private)


def _announce(progress, stage, finished=None):
    """Waits for the stage before, so that a caller may time stages; nothing waits where nobody listens."""
    if progress is not None:
        jax.block_until_ready([x for x in jax.tree.leaves(finished) if isinstance(x, jax.Array)])
        progress(stage)


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
    return unit_loss(loss_fn), group_by_unit(records, unit_ids, max_records_per_unit=max_records_per_unit)


def _public_num_units(units, public_count, private_n):
    """N, which enters step and noise and must be public."""
    if public_count is None and private_n:
        raise ValueError("ADD_OR_REMOVE_ONE keeps the number of private units private: give a public_count.")
    count = num_records(units) if public_count is None else public_count
    if not (type(count) is int and 1 <= count < 2**31):
        raise ValueError(f"Expected an integer public_count in [1, 2^31), found {public_count}.")
    return count


def _cast(layout, params):
    """Back to the pretrained dtypes, saturated: float16 ends at 65504, and a release holds no infinity."""

    def saturated(x, dtype):
        return jnp.asarray(jnp.clip(x, jnp.finfo(dtype).min, jnp.finfo(dtype).max), dtype)

    leaves = jax.tree.leaves(params)
    return jax.tree.unflatten(
        layout.treedef,
        [saturated(x, t) if f else x for x, t, f in zip(leaves, layout.dtypes, layout.tuned, strict=True)],
    )
