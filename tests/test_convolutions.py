import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import clipping, precision, subspace
from qexp_jax.model import convolutions

KEY = jax.random.key(11)
NHWC = ("NHWC", "HWIO", "NHWC")
SAME = {"window_strides": (1, 1), "padding": "SAME"}
# Shapes of input and kernel, options, layout.
CASES = {
    "strided": ((1, 9, 8, 3), (3, 2, 3, 4), {"window_strides": (2, 1), "padding": "SAME"}, NHWC),
    "dilated": (
        (1, 3, 9, 9), (4, 3, 3, 3),
        {"window_strides": (1, 2), "padding": [(1, 0), (2, 3)], "rhs_dilation": (2, 1)}, None,
    ),
    "one_dimension": ((2, 7, 3), (4, 3, 5), {"window_strides": (1,), "padding": "VALID"}, ("NWC", "WIO", "NWC")),
    "cropped": ((1, 8, 8, 2), (3, 3, 2, 2), {"window_strides": (1, 1), "padding": [(-1, 0), (0, -2)]}, NHWC),
    "grouped": ((1, 6, 6, 4), (3, 3, 2, 4), SAME | {"feature_group_count": 2}, NHWC),
    "transposed": ((1, 5, 5, 2), (3, 3, 2, 3), SAME | {"padding": [(1, 1), (1, 1)], "lhs_dilation": (2, 2)}, NHWC),
    "large_kernel": ((1, 12, 12, 1), (9, 9, 1, 2), SAME, NHWC),
}  # fmt: skip
REWRITTEN = ["strided", "dilated", "one_dimension", "cropped"]


def problem(name):
    shape, kernel_shape, options, spec = CASES[name]
    keys = jax.random.split(KEY)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel_shape)

    def loss(kernel, x):
        @jax.jit
        def layer(kernel, x):
            return jax.lax.conv_general_dilated(x, kernel, **options, dimension_numbers=spec)

        return jnp.sum(jax.nn.relu(layer(kernel, x)) ** 2)

    return loss, kernel, x


def primitives(fn, *args):
    return str(jax.make_jaxpr(fn)(*args))


@pytest.mark.parametrize("name", list(CASES))
def test_loss_gradient_and_curvature_are_those_of_the_convolution(name):
    loss, kernel, x = problem(name)
    other = convolutions.as_products(loss)
    assert ("conv_general_dilated" not in primitives(other, kernel, x)) == (name in REWRITTEN)
    tangent = jax.random.normal(KEY, kernel.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, kernel, x):
        gradient = jax.grad(f, argnums=(0, 1))
        return f(kernel, x), gradient(kernel, x), jax.jvp(lambda k: gradient(k, x), (kernel,), (tangent,))[1]

    found, expected = derivatives(other, kernel, x), derivatives(loss, kernel, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(b))))


ROW = jnp.arange(3.0)


def test_a_function_without_convolutions_is_called_itself():
    loss = lambda params, x: jnp.vdot(params, jnp.tanh(x))
    assert primitives(convolutions.as_products(loss), ROW, ROW) == primitives(loss, ROW, ROW)


def test_the_private_pass_has_no_convolution_on_a_cpu_or_gpu_and_the_same_sum(monkeypatch):
    loss, kernel, x = problem("strided")
    records = jnp.stack([x, 2 * x, -x])
    space, preconditioner = subspace.full(kernel), precision.dense(jnp.eye(kernel.size))

    def run():  # a new function at each call, so that nothing traced before is used again
        total = lambda r: clipping.clipped_sum(
            loss, kernel, space, preconditioner, r, l2_clip_norm=1e3, microbatch_size=2
        )[0]
        return primitives(total, records), total(records)

    traced, found = run()
    assert "conv_general_dilated" not in traced
    monkeypatch.setattr(convolutions.jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" not in run()[0]
    monkeypatch.setattr(convolutions.jax, "default_backend", lambda: "tpu")
    traced, expected = run()
    assert "conv_general_dilated" in traced
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-2)


def test_before_a_head_that_is_tuned_alone_a_gpu_keeps_its_convolution(monkeypatch):
    loss, kernel, x = problem("strided")
    params = {"body": kernel, "head": jnp.ones(4)}
    both = lambda params, x: loss(params["body"], x) * jnp.sum(params["head"])
    records = jnp.stack([x, 2 * x, -x])

    def run(where):
        space = subspace.full(params, where=where)
        preconditioner = precision.dense(jnp.eye(space.dim))
        total = lambda r: clipping.clipped_sum(
            both, params, space, preconditioner, r, l2_clip_norm=1e5, mode="reverse"
        )[0]
        return primitives(total, records), total(records)

    _, expected = run("head")
    monkeypatch.setattr(convolutions.jax, "default_backend", lambda: "gpu")
    traced, found = run("head")
    assert "conv_general_dilated" in traced
    assert "conv_general_dilated" not in run("body")[0]
    assert "conv_general_dilated" not in run(None)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_convolutions_are_rewritten_under_shard_map_too():
    loss, kernel, x = problem("strided")
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    records = jnp.stack([x * scale for scale in range(1, 9)])
    space, preconditioner = subspace.full(kernel), precision.dense(jnp.eye(kernel.size))
    pass_ = lambda records, axis_name=None: clipping.clipped_sum(
        loss, kernel, space, preconditioner, records, l2_clip_norm=1e3, axis_name=axis_name
    )[0]
    sharded = jax.shard_map(lambda r: pass_(r, "devices"), mesh=mesh, in_specs=spec("devices"), out_specs=spec())
    np.testing.assert_allclose(sharded(records), pass_(records), rtol=1e-4, atol=1e-2)
