"""Exact privacy of a pair of neighbours, and the search for the pair that shows most.

A release of S + C z xi on neighbours with sums S and S' is exactly as private as N(0, 1) against N(mu, 1) with
mu = |S - S'| / (C z): no sampling is needed, only the pair that makes |S - S'| largest (`worst_neighbour`).
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments
from qexp_jax.data.records import Record, num_records
from qexp_jax.data.relation import NeighboringRelation, checked_relation
from qexp_jax.privacy import accounting


def attained_mu(whitened_sum: jax.Array, other_sum: jax.Array, noise_std: float) -> float:
    """|S - S'| / (C z), the exact mu of a pair of neighbours; infinite where a sum is not finite and so shows itself.

    >>> attained_mu(jnp.array([3.0, 4.0]), jnp.zeros(2), noise_std=10.0)
    0.5
    """
    noise_std = arguments.positive("noise_std", noise_std)
    # In float64: the sums of many records may differ by less than float32 tells.
    difference = np.asarray(whitened_sum, np.float64) - np.asarray(other_sum, np.float64)
    distance = float(np.linalg.norm(difference))
    return distance / noise_std if math.isfinite(distance) else math.inf


def attained_delta(mu: float, epsilon: float) -> float:
    """The exact delta(epsilon) of a pair at `attained_mu`, where that may be 0 or infinite.

    >>> attained_delta(0.0, 1.0), round(attained_delta(1.0, 1.0), 6), attained_delta(math.inf, 1.0)
    (0.0, 0.126937, 1.0)
    """
    mu = arguments.real("mu", mu)
    epsilon = arguments.not_negative("epsilon", epsilon)
    if mu in (0, math.inf):
        return float(mu > 0)
    return accounting.delta_from_mu(mu, epsilon)


class WorstNeighbour(NamedTuple):
    """The worst neighbours found.

    Attributes:
      mu: exact, attained by them; compare it with the claim.
      record: the record that is added, or replaced.
      replacement: what it is replaced by, for REPLACE_ONE; None otherwise.
    """

    mu: float
    record: Record
    replacement: Record | None


def worst_neighbour(
    sum_fn: Callable[[Record], jax.Array],
    dataset: Record,
    candidates: Record,
    noise_std: float,
    *,
    relation: NeighboringRelation,
    ascent_steps: int = 0,
) -> WorstNeighbour:
    """The candidate, or pair of candidates, that moves the sum most, after gradient ascent if asked for.

    Args:
      sum_fn: records -> S (k,), traceable; for instance `clipping.clipped_sum`.
      dataset: the other records, pytree with leading axis n.
      candidates: records to try, pytree with leading axis m.
      noise_std: C z.
      relation: REPLACE_ONE tries all pairs of candidates; otherwise each is added to `dataset`.
      ascent_steps: random moves that each candidate first tries, a tenth of its norm each; kept where |S - S'| grows.

    Raises:
      ValueError: for numbers that make no search.
    """
    noise_std = arguments.positive("noise_std", noise_std)
    ascent_steps = arguments.count("ascent_steps", ascent_steps, least=0)
    relation = checked_relation(relation)
    if num_records(candidates) == 0:
        raise ValueError("Expected at least one of the candidates, found leading axis 0.")
    base = sum_fn(dataset)

    def sum_with(record: Record) -> jax.Array:
        return sum_fn(jax.tree.map(lambda x, r: jnp.concatenate([x, r[None]]), dataset, record))

    def moved(record: Record) -> jax.Array:
        return jnp.linalg.norm(sum_with(record) - base)

    ascend = functools.partial(_ascend, moved, steps=ascent_steps)
    climbed = jax.jit(lambda c: jax.lax.map(ascend, c))(candidates)
    # Differences are taken in float64, as in `attained_mu`.
    sums = np.asarray(jax.jit(lambda c: jax.lax.map(sum_with, c))(climbed), np.float64)
    is_replaced = relation is NeighboringRelation.REPLACE_ONE
    others = sums if is_replaced else np.asarray(base, np.float64)[None]
    distances = np.linalg.norm(sums[:, None] - others[None], axis=2)
    # A sum that is not finite shows its record to everybody.
    distances = np.where(np.isfinite(distances), distances, np.inf)
    i, j = np.unravel_index(np.argmax(distances), distances.shape)
    record = jax.tree.map(lambda x: x[i], climbed)
    replacement = jax.tree.map(lambda x: x[j], climbed) if is_replaced else None
    return WorstNeighbour(float(distances[i, j]) / noise_std, record, replacement)


def _ascend(objective: Callable[[Record], jax.Array], record: Record, steps: int) -> Record:
    """Random moves of the floating-point leaves of a record, each kept if the objective grows.

    A sum of integers has no slope to follow.
    """

    def step(state: tuple[Record, jax.Array], key: jax.Array) -> tuple[tuple[Record, jax.Array], None]:
        held, value = state
        tried = _moved(key, held)
        found = objective(tried)
        is_better = found > value
        held = jax.tree.map(lambda old, new: jnp.where(is_better, new, old), held, tried)
        return (held, jnp.where(is_better, found, value)), None

    # One key for all candidates: the search need not be random, only different in each step.
    keys = jax.random.split(jax.random.key(0), steps)
    (climbed, _), _ = jax.lax.scan(step, (record, objective(record)), keys)
    return climbed


def _moved(key: jax.Array, record: Record) -> Record:
    """By a tenth of the record's norm, in a random direction."""
    leaves, treedef = jax.tree.flatten(record)
    real = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    noise = {i: jax.random.normal(jax.random.fold_in(key, i), leaves[i].shape, leaves[i].dtype) for i in real}
    size = 0.1 * _norm([leaves[i] for i in real]) / _norm(noise.values())
    moved = [x + size * noise[i] if i in noise else x for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, moved)


def _norm(leaves: Iterable[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(x, x, precision=jax.lax.Precision.HIGHEST) for x in leaves))
