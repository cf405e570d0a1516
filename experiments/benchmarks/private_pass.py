"""The private pass against L2 clipping by others, against its own parts, and against plain per-record gradients.

jax_privacy and Opacus clip the tuned leaves' gradients in their L2 norm; ours projects and whitens besides.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import peers
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Calls, Row, race, row
from qexp_jax import clipping, precision, subspace
from qexp_jax.data.records import microbatches, num_records
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.subspace import Subspace, tuned_leaves, with_tuned_leaves
from qexp_jax.quadratic import directions, public_curvature
from qexp_jax.quadratic.precision import Precision

PATH = "private pass"
CLIP_NORM = 1.0
# Of ours, of its parts and of the peers, who are also given all records at once; the fastest counts.
ON_CPU = (16, 32, 128)
ON_ACCELERATOR = (8192,)
# No goal: Opacus runs in another framework, and jax_privacy's users do not have our convolutions.
PEERS = {
    "jax_privacy": ("jax_privacy clipped_grad", 1.0),
    "products": ("jax_privacy clipped_grad, convolutions as our products", ""),
    "hooks": ("Opacus, hooks", ""),
    "ghost": ("Opacus, ghost clipping", ""),
}


class Setup(NamedTuple):
    """Directions and preconditioner of a pass.

    Attributes:
      name: in the table.
      subspace: P.
      precision: H.
      project: what projecting the (n, d) gradients costs alone, of `(basis, gradients)`; None where P selects leaves.
      basis: its first argument.
      whiten: what whitening the (n, k) projections costs alone, of `(factor, projections)`.
      factor: its first argument.
      cheap: whether projecting should cost next to nothing.
    """

    name: str
    subspace: Subspace
    precision: Precision
    project: Callable[[Any, jax.Array], jax.Array] | None
    basis: Any
    whiten: Callable[[jax.Array, jax.Array], jax.Array]
    factor: jax.Array
    cheap: bool


def setups(case: Case, dim: int, rank: int) -> Iterator[Setup]:
    """The passes that a model is timed with."""
    key = jax.random.key(2)
    if case.where is None:
        whole = subspace.full(case.params)
        yield _low_rank(case, whole, rank)
        dense = subspace.orthonormal(key, case.params, dim)
        rows = jnp.concatenate([b.reshape(dim, -1) for b in dense.arrays], axis=1)
        yield _dense(f"orthonormal {dim} of {whole.dim}", dense, project=_product, basis=rows.T)
        sketch = subspace.count_sketch(key, case.params, dim)
        yield _dense(f"count-sketch {dim} of {whole.dim}", sketch, project=_sketch, basis=sketch)
    if case.where is not None or case.name == "cnn":
        leaves = subspace.full(case.params, where=case.where or "head")
        yield _dense(f"selected leaves, {leaves.dim}", leaves)


def _dense(
    name: str,
    space: Subspace,
    project: Callable[[Any, jax.Array], jax.Array] | None = None,
    basis: Any = None,
) -> Setup:
    """A setup with a dense H, well conditioned."""
    rows = jax.random.normal(jax.random.key(3), (space.dim, space.dim)) / np.sqrt(space.dim)
    matrix = jnp.matmul(rows, rows.T) + jnp.eye(space.dim)
    upper = jnp.linalg.cholesky(matrix).T
    cheap = project is not _product
    return Setup(f"{name}, dense H", space, precision.dense(matrix), project, basis, _solve, upper, cheap)


def _low_rank(case: Case, space: Subspace, rank: int) -> Setup:
    """As in a release."""
    found, _ = public_curvature.leading_directions(case.loss_fn, case.params, case.records, rank, space)
    preconditioner = precision.low_rank(0.1, found, jnp.linspace(1.0, 0.1, rank))
    vectors = jax.vmap(functools.partial(directions.combine, found))(jnp.eye(rank))
    return Setup(
        f"all {space.dim}, H of rank {rank} + identity", space, preconditioner, None, None, _product, vectors.T, False
    )


def _product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)


def _solve(upper: jax.Array, rows: jax.Array) -> jax.Array:
    # Transposes of row-major arrays are what LAPACK and cuBLAS want: neither is copied.
    return jax.lax.linalg.triangular_solve(upper.T, rows.T, left_side=True, lower=True).T


def _sketch(sketch: Subspace, rows: jax.Array) -> jax.Array:
    layout = sketch.layout
    sizes = [int(np.prod(shape)) for shape in layout.tuned_shapes]

    def project(row: jax.Array) -> jax.Array:
        parts = jnp.split(row, np.cumsum(sizes)[:-1])
        leaves = [x.reshape(shape) for x, shape in zip(parts, layout.tuned_shapes, strict=True)]
        return sketch.operator.project(layout, sketch.arrays, leaves)

    return jax.vmap(project)(rows)


def microbatch_sizes() -> tuple[int, ...]:
    """Those worth trying on this device."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR


def ours(case: Case, setup: Setup) -> Calls:
    """`clipping.clipped_sum`."""
    arguments = (case.params, setup.subspace, setup.precision, case.records)
    clip_norm = jnp.asarray(CLIP_NORM)

    def call_of(size: int) -> Callable[[], Any]:
        run = jax.jit(functools.partial(clipping.clipped_sum, case.loss_fn, microbatch_size=size))
        return lambda: run(*arguments, l2_clip_norm=clip_norm)

    return {f"ours {size}": call_of(size) for size in microbatch_sizes()}


def record_gradients(case: Case, setup: Setup) -> Callable[[Any, Any], list[jax.Array]]:
    """`(params, records) -> ` gradients of the tuned leaves, a leading record axis on each."""
    layout = setup.subspace.layout

    def gradient(params: Any, record: Any) -> list[jax.Array]:
        loss = as_products(lambda leaves, record: case.loss_fn(with_tuned_leaves(layout, params, leaves), record))
        return jax.grad(loss)(tuned_leaves(layout, params), record)

    return jax.vmap(gradient, in_axes=(None, 0))


def gradients_alone(case: Case, setup: Setup) -> Calls:
    """Per-record gradients, formed and summed: of all records at once, and in microbatches."""
    gradients = record_gradients(case, setup)

    def total(params: Any, records: Any) -> list[jax.Array]:
        formed = jax.lax.optimization_barrier(gradients(params, records))
        return [jnp.sum(g, axis=0) for g in formed]

    def in_microbatches(params: Any, records: Any, size: int) -> list[jax.Array]:
        batches, _ = microbatches(records, size)
        zeros = [jnp.zeros(s) for s in setup.subspace.layout.tuned_shapes]
        step = lambda sums, batch: (jax.tree.map(jnp.add, sums, total(params, batch)), None)
        return jax.lax.scan(step, zeros, batches)[0]

    whole = jax.jit(total)
    scanned = jax.jit(in_microbatches, static_argnames="size")
    several = [size for size in microbatch_sizes() if size < num_records(case.records)]
    sizes = {size: functools.partial(scanned, case.params, case.records, size) for size in several}
    found = {f"vmap(grad) sum, {size} at a time": run for size, run in sizes.items()}
    return found | {"vmap(grad) sum, at once": lambda: whole(case.params, case.records)}


def linear_algebra_alone(case: Case, setup: Setup) -> Calls:
    """Projection and whitening of as many rows."""
    n = num_records(case.records)
    projection_key, gradient_key = jax.random.split(jax.random.key(5))
    projected = jax.random.normal(projection_key, (n, setup.subspace.dim))
    whiten = jax.jit(setup.whiten)
    found = {"whitening": lambda: whiten(setup.factor, projected)}
    if setup.project is not None:
        gradients = jax.random.normal(gradient_key, (n, setup.subspace.layout.num_params))
        project = jax.jit(setup.project)
        found["projection"] = lambda: project(setup.basis, gradients)
    return found


def rows(case: Case, *, dim: int, rank: int, seconds: float) -> Iterator[Row]:
    """All setups of one model; of a peer's variants the fastest counts.

    Args:
      case: model and records.
      dim: k of random directions.
      rank: of the low-rank H.
      seconds: about how long each race may take.
    """
    for setup in setups(case, dim, rank):
        calls = ours(case, setup) | gradients_alone(case, setup) | linear_algebra_alone(case, setup)
        calls |= peers.l2_clips(case, setup.subspace, CLIP_NORM, microbatch_sizes())
        times = race(calls, seconds=seconds)
        passed = fastest(times, "ours")
        plain = fastest(times, "vmap(grad) sum")
        label = f"{case.name}, n={num_records(case.records)}, {setup.name}"
        for name, (peer, goal) in PEERS.items():
            if any(key.startswith(name) for key in times):
                yield row(PATH, label, peer, passed, fastest(times, name), goal)
        whole = plain + times["whitening"] + times.get("projection", 0.0)
        yield row(PATH, label, "sum of its parts", passed, whole, 1 / 1.5)
        if setup.cheap:
            yield row(PATH, label, "vmap(grad) sum", passed, plain, 1 / 1.5)


def fastest(times: dict[str, float], prefix: str) -> float:
    """The least time of those whose name starts so."""
    return min(value for name, value in times.items() if name.startswith(prefix))
