"""What may be chosen of a release, all of it public: how it moves the model, and how it is run."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax

from qexp_jax.data import arguments
from qexp_jax.model.gradients import Mode
from qexp_jax.model.subspace import Subspace


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """In place of what the public records and (N, mu) choose. None of it may have been chosen on private data.

    Attributes:
      subspace: public subspace to tune in, in place of all parameters.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      rounds: releases, each with mu/sqrt(rounds), in place of the rule's number, which a heavy shift may raise.
      precision_rank: at most how many leading directions of the public gradients have their curvature measured.
      damping: lambda > 0 in units of curvature.
      l2_clip_norm: C > 0 in the norm |M^{-1/2} g|, where M has largest eigenvalue 1.
      one_draw: the mechanism of arXiv:2605.20521 as its abstract has it: A = M = H + lambda I, one round, no tilt, and
        the whole draw is taken; in any subspace, and in their leading directions. By default lambda is the largest
        curvature.
      tilt: before the rounds, spend a tenth of mu^2 on one draw of the private mean of public features, and train the
        pretrained model on public records that are weighted to have this mean (`tilt`, T9); left out where N mu is
        below 200 or training would take minutes, and without effect where the draw shows no shift or weights cannot
        express it.
      features: `(record) -> arrays` or `(params, record) -> arrays`, whose mean is released in place of that of the
        default features (`features`).
    """

    subspace: Subspace | None = None
    subspace_dim: int | None = None
    rounds: int | None = None
    precision_rank: int = 128
    damping: float | None = None
    l2_clip_norm: float | None = None
    one_draw: bool = False
    tilt: bool = True
    features: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a release is computed: memory, devices, what is shown of it. No promise depends on these.

    Attributes:
      microbatch_size: at most so many private units held at a time; by default as many as suit the device, on a CPU 32
        or fewer.
      mode: `"auto"`, `"reverse"` or `"forward"`, see `gradients.projected_gradients`.
      mesh: devices that share the private units along the mesh's axis `"data"`, each clipping its own. Parameters may
        be sharded over other axes, of type Auto. With devices of several processes, `private` holds the units of this
        process alone, no unit is in two processes, `public_count` is their number in all, and every process calls
        with the same public arguments and ends with the same release.
      memory_budget: bytes of one device; a release that `preflight` expects to need more is refused. With unit ids it
        needs `max_records_per_unit`; where the number of units is private, a stream counts with its `batch_size`, or
        whole.
      diagnostics: return `(release, [RoundInfo])`, where the second part is **not private**.
      progress: True for a bar; or a function, called with the name of each stage as it begins, with each batch of a
        stream, and with `"done"`.
    """

    microbatch_size: int | None = None
    mode: Mode = "auto"
    mesh: jax.sharding.Mesh | None = None
    memory_budget: int | None = None
    diagnostics: bool = False
    progress: Callable[[str], None] | bool | None = None


def checked_plan(options: PlanOptions) -> PlanOptions:
    """The same with plain Python numbers.

    Raises:
      ValueError: for what no plan can be made with; a name in place of what it names would be found out in the middle
        of a release, or never.
    """
    _is_a("plan", options, PlanOptions)
    _is_a("subspace", options.subspace, Subspace | None)
    arguments.function("features", options.features)
    if options.subspace is not None and options.subspace_dim is not None:
        raise ValueError(
            "Give a subspace or a subspace_dim, not both: "
            f"found {options.subspace.name!r} and {options.subspace_dim}."
        )  # fmt: skip
    if options.one_draw and options.rounds not in (None, 1):
        raise ValueError(f"Expected rounds=1 with one_draw, found {options.rounds}.")
    return dataclasses.replace(
        options,
        rounds=_count("rounds", options.rounds),
        precision_rank=arguments.count("precision_rank", options.precision_rank),
        # Public curvature knows the largest dimension, and says so.
        subspace_dim=_count("subspace_dim", options.subspace_dim, least=0),
        damping=_positive("damping", options.damping),
        l2_clip_norm=_positive("l2_clip_norm", options.l2_clip_norm),
    )


def checked_run(options: RunOptions) -> RunOptions:
    """The same with plain Python numbers; raises ValueError for what nothing can be run with."""
    _is_a("run", options, RunOptions)
    _is_a("mesh", options.mesh, jax.sharding.Mesh | None)
    if not isinstance(options.progress, bool):
        arguments.function("progress", options.progress)
    if options.mode not in get_args(Mode):
        raise ValueError(f"Expected a mode of {get_args(Mode)}, found {options.mode!r}.")
    return dataclasses.replace(
        options,
        microbatch_size=_count("microbatch_size", options.microbatch_size),
        memory_budget=_count("memory_budget", options.memory_budget),
    )


def _is_a(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        kinds = [getattr(k, "__name__", str(k)) for k in getattr(kind, "__args__", [kind]) if k is not type(None)]
        raise ValueError(f"Expected {name} to be a {kinds[0]}, found {arguments.described(value)}.")


def _count(name: str, value: Any, least: int = 1) -> int | None:
    return None if value is None else arguments.count(name, value, least=least)


def _positive(name: str, value: Any) -> float | None:
    return None if value is None else arguments.positive(name, value)
