"""Small problems that the tests share, and the oracle's law of a draw.

Compiled as wholes: op by op, each operation is a program of its own, and compilation is most of the tests' time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import qexp_jax
from qexp_jax import curvature, precision, subspace
from qexp_jax.mechanism.gaussian import Quadratic

PLAN = frozenset(field.name for field in dataclasses.fields(qexp_jax.PlanOptions))
RUN = frozenset(field.name for field in dataclasses.fields(qexp_jax.RunOptions))
OF_DATA = frozenset({"unit_ids", "max_records_per_unit", "public_count"})


def fine_tune(key, loss_fn, params, *, public, private, public_unit_ids=None, **settings):
    """`qexp_jax.fine_tune` with all that can be chosen side by side, as tests vary one choice at a time."""
    plan, run, of_data = (
        {name: settings.pop(name) for name in names & settings.keys()} for names in (PLAN, RUN, OF_DATA)
    )
    if of_data:
        private = qexp_jax.Dataset(records=private, **of_data)
    if public_unit_ids is not None:
        public = qexp_jax.Dataset(records=public, unit_ids=public_unit_ids)
    return qexp_jax.fine_tune(
        key, loss_fn, params, public=public, private=private, **settings,
        plan=qexp_jax.PlanOptions(**plan), run=qexp_jax.RunOptions(**run),
    )  # fmt: skip


def tilt_weights(key, public, private, **settings):
    """The same for `qexp_jax.tilt.weights`."""
    run, of_data = ({name: settings.pop(name) for name in names & settings.keys()} for names in (RUN, OF_DATA))
    if of_data:
        private = qexp_jax.Dataset(records=private, **of_data)
    return qexp_jax.tilt.weights(key, public, private, **settings, run=qexp_jax.RunOptions(**run))


def network_loss(params, record):
    hidden = jnp.tanh(record["x"] @ params["layer"]["w"] + params["layer"]["b"])
    return jnp.sum((hidden @ params["head"] - record["y"]) ** 2) / 2


def network(key, num_records=37):
    """A two-layer network with d = 24, and records."""
    keys = jax.random.split(key, 5)
    params = {
        "layer": {"w": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4,))},
        "head": jax.random.normal(keys[2], (4, 2)) / 2,
    }
    records = {
        "x": jax.random.normal(keys[3], (num_records, 3)),
        "y": jax.random.normal(keys[4], (num_records, 2)),
    }
    return params, records


def linear_loss(params, record):
    """Its gradient is the record itself, so that records can be made adversarial."""
    return jnp.vdot(params["w"], record["g"])


@jax.jit
def subspaces(key, params):
    return {
        "full": subspace.full(params),
        "selected": subspace.full(params, where="head|b$"),
        "gaussian": subspace.gaussian(key, params, 6),
        "orthonormal": subspace.orthonormal(key, params, 6),
        "count_sketch": subspace.count_sketch(key, params, 6),
        "sketched_layer": subspace.count_sketch(key, params, 5, where="layer"),
        "span": subspace.span(params, jax.vmap(lambda k: random_like(k, params))(jax.random.split(key, 4))),
        "composed": subspace.compose(subspace.count_sketch(key, params, 9), jax.random.normal(key, (9, 3))),
    }


def random_like(key, params):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def damped_precision(loss_fn, params, space, records, damping=0.1):
    matrix = curvature.psd_part(curvature.hessian(loss_fn, params, space, records))
    return precision.dense(matrix + damping * subspace.gram(space))


def spd(key, k, condition=30.0):
    """A non-diagonal SPD matrix."""
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (k, k)))
    return (basis * jnp.geomspace(1.0, condition, k)) @ basis.T


def law(matrix, gradient_sum, num_units, noise_std):
    """Oracle: mean and covariance N(-H^{-1} g / N, H^{-1} / (beta N)) in float64."""
    inverse = np.linalg.inv(np.asarray(matrix, np.float64))
    beta = num_units / noise_std**2
    return -inverse @ np.asarray(gradient_sum, np.float64) / num_units, inverse / (beta * num_units)


def quadratic_from(matrix, gradient_sum, num_units):
    """The library's quadratic for a gradient sum in R^k."""
    factored = precision.dense(matrix)
    return Quadratic(factored, precision.whiten(factored, gradient_sum), num_units)


def wide_layer_loss(params, record):
    return jnp.sum((jnp.tanh(record["x"] @ params["wide"]) @ params["head"] + params["b"] - record["y"]) ** 2) / 2


def wide_layer_network(key, num_records=37):
    """A network whose first layer has a long axis, d = 367, and records that vary in few directions of it."""
    keys = jax.random.split(key, 5)
    params = {
        "b": jnp.ones(2),
        "head": jax.random.normal(keys[0], (5, 2)) / 2,
        "wide": jax.random.normal(keys[1], (71, 5)) / 8,
    }
    scales = jnp.geomspace(1, 1e-2, 71)
    x = jax.random.normal(keys[2], (num_records, 71)) * scales @ jnp.linalg.qr(jax.random.normal(keys[3], (71, 71)))[0]
    return params, {"x": x, "y": jax.random.normal(keys[4], (num_records, 2))}
