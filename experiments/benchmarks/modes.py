"""Forward against reverse mode over dimension, directions and records, and what `mode="auto"` makes of them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks import cases
from experiments.benchmarks.timing import Row, race, row
from qexp_jax import clipping, precision, subspace
from qexp_jax.data.records import num_records

PATH = "mode"
GOAL = 1 / 1.1


def rows(case: cases.Case, dim: int, *, seconds: float) -> Iterator[Row]:
    """The private pass in `dim` random directions."""
    space = subspace.gaussian(jax.random.key(8), case.params, dim, where=case.where)
    run = jax.jit(functools.partial(clipping.clipped_sum, case.loss_fn), static_argnames="mode")
    arguments = (case.params, space, precision.dense(jnp.eye(dim)), case.records)
    calls = {
        mode: functools.partial(run, *arguments, l2_clip_norm=1.0, mode=mode) for mode in ("auto", "reverse", "forward")
    }
    times = race(calls, seconds=seconds)
    label = f"{case.name}, d={space.layout.num_params}, k={dim}, n={num_records(case.records)}"
    for mode in ("reverse", "forward"):
        yield row(PATH, label, mode, times["auto"], times[mode], GOAL)
