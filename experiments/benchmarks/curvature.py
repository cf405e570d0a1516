"""P^T Curv P against a dense Hessian, against loops over single Hessian-vector products, and against k gradients."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks import cases
from experiments.benchmarks.cases import Case
from experiments.benchmarks.libraries import find, torch_device
from experiments.benchmarks.timing import Calls, Row, race, row, rows_against
from qexp_jax import curvature, subspace
from qexp_jax.data.records import Params, Record, num_records
from qexp_jax.model.subspace import Subspace

PATH = "curvature"
DENSE_UP_TO = 10_000


def rows(case: Case, dim: int, *, seconds: float) -> Iterator[Row]:
    """One model: all its parameters, `dim` random orthonormal directions."""
    space = subspace.orthonormal(jax.random.key(7), case.params, dim)
    d = space.layout.num_params
    n = num_records(case.records)
    label = f"{case.name}, d={d}, k={dim}, n={n}"
    times = race(ours(case, space) | loops(case, space), seconds=seconds, least=2)
    hessian = {"ours": times["projected_hessian"]} | times
    yield from rows_against(PATH, f"{label}, projected_hessian", hessian, dict.fromkeys(loop_names(), 1.0))
    gradients = dim * times["one gradient"]
    yield row(PATH, f"{label}, projected_hessian", "k gradients", times["projected_hessian"], gradients, 1 / 2.5)
    yield row(PATH, f"{label}, projected_ggn", "k gradients", times["projected_ggn"], gradients, 1 / 1.5)
    if d <= DENSE_UP_TO:
        dense = race(dense_route(case, space), seconds=seconds, least=2)
        yield from rows_against(PATH, f"{label}, projected_hessian", hessian | dense, {"jax.hessian, projected": 5.0})


def ours(case: Case, space: Subspace) -> Calls:
    """The library's two, with their defaults, and one gradient of the mean loss."""
    hessian = jax.jit(functools.partial(curvature.projected_hessian, case.loss_fn))
    ggn = jax.jit(functools.partial(curvature.projected_ggn, case.model_fn, cases.output_loss))
    gradient = jax.jit(jax.grad(functools.partial(_mean_loss, case)))
    return {
        "projected_hessian": lambda: hessian(case.params, space, case.records),
        "projected_ggn": lambda: ggn(case.params, space, case.records),
        "one gradient": lambda: gradient(case.params, case.records),
    }


def _mean_loss(case: Case, params: Params, records: Record) -> jax.Array:
    return jnp.mean(jax.vmap(case.loss_fn, in_axes=(None, 0))(params, records))


def loop_names() -> tuple[str, ...]:
    """Who takes one product at a time."""
    return "laplax, one product at a time", "curvlinops"


def loops(case: Case, space: Subspace) -> Calls:
    """P^T (H p_j), column by column."""
    laplax, curvlinops = loop_names()
    found = {}
    if find("laplax") is not None:
        found[laplax] = _laplax(case, space)
    if find("curvlinops") is not None and torch_device() is not None:
        # Only here, as it imports torch.
        from experiments.benchmarks import torch_models

        found[curvlinops] = torch_models.hessian_columns(case, space.dim)
    return found


def _laplax(case: Case, space: Subspace) -> Callable[[], jax.Array]:
    from laplax.curv.hessian import create_hessian_mv_without_data

    n = num_records(case.records)

    def column(params: Params, space: Subspace, records: Record, direction: jax.Array) -> jax.Array:
        model = lambda input, params: case.model_fn(params, {"x": input})
        loss = lambda logits, labels: jnp.sum(jax.vmap(cases.output_loss)(logits, {"label": labels}))
        product = create_hessian_mv_without_data(model, params, loss, 1 / n)
        data = {"input": records["x"], "target": records["label"]}
        return subspace.project(space, product(subspace.lift(space, direction), data))

    run = jax.jit(column)
    eye = jnp.eye(space.dim)
    return lambda: jnp.stack([run(case.params, space, case.records, e) for e in eye])


def dense_route(case: Case, space: Subspace) -> Calls:
    """The d x d Hessian of the mean loss, then P^T H P."""
    whole = subspace.full(case.params)
    basis = jnp.concatenate([b.reshape(space.dim, -1) for b in space.arrays], axis=1).T

    def run(params: Params, records: Record, basis: jax.Array) -> jax.Array:
        loss = lambda theta: _mean_loss(case, subspace.lift(whole, theta), records)
        hessian = jax.hessian(loss)(subspace.project(whole, params))
        return basis.T @ hessian @ basis

    compiled = jax.jit(run)
    return {"jax.hessian, projected": lambda: compiled(case.params, case.records, basis)}
