"""Eight devices give the single-device result, with a clip that is active and an adversarial record."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    damped_precision,
    fine_tune,
    linear_loss,
    network,
    network_loss,
    wide_layer_loss,
    wide_layer_network,
)

from qexp_jax import clipping, curvature, precision, records, subspace
from qexp_jax.model import panels
from qexp_jax.private_pass import passes
from qexp_jax.private_pass.devices import place
from qexp_jax.quadratic import directions, public_curvature

SPEC = jax.sharding.PartitionSpec
KEY = jax.random.key(11)


def mesh(axis_type="Auto"):
    return jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))


def on_devices(how, function, data):
    """Runs `function(records, mask)` on records split over 8 devices, padded and masked."""
    data, mask = records.pad(data, 8)
    if how == "pmap":
        split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), (data, mask))
        return jax.tree.map(lambda x: x[0], jax.pmap(function, axis_name="data")(*split))
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=(SPEC("data"), SPEC("data")), out_specs=SPEC())
    return jax.jit(mapped)(data, mask)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_private_pass_equals_one_device_with_an_active_clip(how, mode):
    params, data = network(KEY)  # 37 records: uneven
    data["y"] = data["y"].at[5].set(1e4)  # an adversarial record
    space = subspace.full(params)
    factored = damped_precision(network_loss, params, space, data)

    def private_pass(units, mask, axis_name="data"):
        return clipping.clipped_sum(
            network_loss,
            params,
            space,
            factored,
            units,
            mask=mask,
            l2_clip_norm=0.5,
            mode=mode,
            axis_name=axis_name,
        )

    (total, info), (expected, one) = on_devices(how, private_pass, data), private_pass(data, None, None)
    np.testing.assert_allclose(total, expected, atol=2e-5)
    assert info == one and info.num_clipped > 5


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
@pytest.mark.parametrize("dim", [None, 50])
def test_a_pass_in_outer_products_equals_one_device_with_an_active_clip(how, dim):
    params, data = wide_layer_network(KEY)
    data["y"] = data["y"].at[5].set(1e4)
    space = subspace.count_sketch(KEY, params, dim) if dim else subspace.full(params)
    found, _ = public_curvature.leading_directions(wide_layer_loss, params, data, 6, space)
    preconditioner = precision.spectral(0.1, found, jnp.linspace(2.0, 0.5, 6))

    def private_pass(units, mask, axis_name="data"):
        settings = {"mask": mask, "l2_clip_norm": 0.5, "axis_name": axis_name}
        return clipping.clipped_sum(wide_layer_loss, params, space, preconditioner, units, **settings)

    (total, info), (expected, one) = on_devices(how, private_pass, data), private_pass(data, None, None)
    np.testing.assert_allclose(total, expected, atol=2e-5)
    assert isinstance(found, directions.Directions) == (dim is None) and info == one and info.num_clipped > 5


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(how):
    params = {"w": jnp.zeros(3)}
    data = {"g": jnp.zeros((16, 3)).at[9].set(1e6)}

    def private_pass(units, mask):
        return clipping.clipped_sum(
            linear_loss, params, subspace.full(params), precision.dense(jnp.eye(3)), units,
            mask=mask, l2_clip_norm=1.0, axis_name="data",
        )[0]  # fmt: skip

    np.testing.assert_allclose(jnp.linalg.norm(on_devices(how, private_pass, data)), 1, rtol=1e-5)


def test_the_danger_is_real_gradients_of_replicated_params_are_summed_before_clipping():
    params = jnp.zeros(3)
    data = {"g": jnp.zeros((8, 3)).at[5].set(1e6)}

    def naive(units, mask):
        gradients = jax.vmap(jax.grad(lambda w, r: w @ r["g"]), in_axes=(None, 0))(params, units)
        clipped = jax.vmap(lambda v: clipping.clip(v, jnp.linalg.norm(v), 1.0)[0])(gradients)
        return jax.lax.psum(jax.lax.pcast(jnp.sum(clipped, axis=0), "data", to="varying"), "data")

    assert jnp.linalg.norm(on_devices("shard_map", naive, data)) > 7.9  # one record moved the sum by 8 C


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_public_curvature_equals_one_device(how):
    params, data = network(KEY)
    space = subspace.count_sketch(KEY, params, 6)
    for function in (curvature.projected_hessian, curvature.projected_fisher):

        def sharded(batch, mask, function=function):
            return function(network_loss, params, space, batch, mask=mask, axis_name="data")

        expected = function(network_loss, params, space, data)
        np.testing.assert_allclose(on_devices(how, sharded, data), expected, rtol=1e-4, atol=1e-5)


def test_records_on_an_explicit_mesh_give_the_same_sum():
    params, data = network(KEY, num_records=40)
    space = subspace.full(params)
    factored = damped_precision(network_loss, params, space, data)

    def private_pass(units):
        return clipping.clipped_sum(network_loss, params, space, factored, units, l2_clip_norm=0.5, axis_name="data")[0]

    explicit = mesh("Explicit")
    placed = jax.device_put(data, jax.sharding.NamedSharding(explicit, SPEC("data")))
    total = jax.jit(jax.shard_map(private_pass, mesh=explicit, in_specs=SPEC("data"), out_specs=SPEC()))(placed)
    expected, _ = clipping.clipped_sum(network_loss, params, space, factored, data, l2_clip_norm=0.5)
    np.testing.assert_allclose(total, expected, atol=2e-5)


def collective_bytes(compiled):
    """Bytes of every collective's result in the text of a compiled program."""
    total = 0
    for shapes in re.findall(
        r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)[-(]", compiled
    ):
        for kind, dims in re.findall(r"(f32|s32|u32|pred)\[([\d,]*)\]", shapes):
            total += (1 if kind == "pred" else 4) * int(np.prod([int(n) for n in dims.split(",") if n]))
    return total


def wide_loss(params, record):
    return jnp.sum((record["x"] @ params["a"] @ params["b"] - record["y"]) ** 2)


@pytest.mark.parametrize(("width", "num_records"), [(8, 64), (64, 512)])
def test_only_k_numbers_cross_devices_in_a_pass_and_k_squared_in_a_curvature(width, num_records):
    """Whatever d and n are: 2 x width parameters and the records do not appear."""
    dim = 16
    params = {"a": jnp.ones((4, width)), "b": jnp.ones((width, 2))}
    data = {"x": jnp.ones((num_records, 4)), "y": jnp.ones((num_records, 2))}
    space, factored = subspace.count_sketch(KEY, params, dim), precision.dense(jnp.eye(dim))
    linearisation = passes.Linearisation(params, space, factored, 1.0)
    units = place(mesh(), data, np.ones(num_records, bool))
    compiled = passes.device_sum.lower(
        wide_loss, linearisation, *units, microbatch_size=4, mode="reverse", mesh=mesh()
    ).compile()
    counts = 3 * 4
    words = 2 * 4 * dim
    assert words <= collective_bytes(compiled.as_text()) <= words + counts

    def columns(params, records, directions):
        return curvature.hessian_columns(wide_loss, params, space, records, directions, column_axis="data")

    sharded = jax.shard_map(columns, mesh=mesh(), in_specs=(SPEC(), SPEC(), SPEC("data")), out_specs=SPEC("data"))
    gathered = jax.jit(sharded, out_shardings=jax.sharding.NamedSharding(mesh(), SPEC()))
    text = gathered.lower(params, data, jnp.eye(dim)).compile().as_text()
    assert 4 * dim**2 / 8 <= collective_bytes(text) <= 4 * dim**2
    rows = gathered(params, data, jnp.eye(dim))
    np.testing.assert_allclose(rows, curvature.projected_hessian(wide_loss, params, space, data), rtol=1e-4, atol=1e-3)


def deep_loss(params, record):
    x = record["x"]
    for w in params.values():
        x = jnp.tanh(x @ w)
    return jnp.sum((x - record["y"]) ** 2) / 2


def deep_network(width, num_layers, num_records, mesh):
    """Parameters sharded over the axis "model", and records."""
    keys = jax.random.split(KEY, num_layers)
    params = {f"w{i}": jax.random.normal(key, (width, width)) / width**0.5 for i, key in enumerate(keys)}
    layer = jax.sharding.NamedSharding(mesh, SPEC(None, "model"))
    data = {name: jax.random.normal(jax.random.key(i), (num_records, width)) for i, name in enumerate("xy")}
    return params, jax.device_put(params, layer), data, layer


def two_axes():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("kind", ["selected", "count_sketch"])
def test_sharded_parameters_stay_sharded_through_a_release(kind):
    devices = two_axes()
    params, sharded, data, layer = deep_network(16, 3, 32, devices)
    space = subspace.full(params, where="w2") if kind == "selected" else subspace.count_sketch(KEY, params, 20)
    arguments = {
        "public": data,
        "private": jax.tree.map(jnp.copy, data),
        "epsilon": 4.0,
        "delta": 1e-5,
        "rounds": 2,
        "subspace": space,
    }
    release, (info, _) = fine_tune(KEY, deep_loss, sharded, mesh=devices, diagnostics=True, **arguments)
    factored, clip_norm = jax.device_get((info.quadratic.precision, info.preconditioner.l2_clip_norm))
    expected, _ = clipping.clipped_sum(deep_loss, params, space, factored, data, l2_clip_norm=clip_norm)
    np.testing.assert_allclose(info.quadratic.whitened_sum, expected, rtol=1e-3, atol=1e-3)
    assert all(w.sharding.is_equivalent_to(layer, 2) for w in release.params.values())


def test_sharded_parameters_are_never_gathered_as_a_whole_on_one_device(monkeypatch):
    """One layer's gradient at a time is."""
    monkeypatch.setattr(panels, "PANEL", 2**12)
    devices = two_axes()
    params, sharded, data, _ = deep_network(256, 8, 4, devices)
    linearisation = passes.Linearisation(
        sharded, subspace.count_sketch(KEY, params, 64), precision.dense(jnp.eye(64)), 1.0
    )
    units = place(devices, data, np.ones(4, bool))
    lowered = passes.device_sum.lower(deep_loss, linearisation, *units, microbatch_size=1, mode="reverse", mesh=devices)
    memory, whole = lowered.compile().memory_analysis(), 8 * 256 * 256 * 4
    assert memory.argument_size_in_bytes < 0.35 * whole and memory.temp_size_in_bytes < 0.75 * whole
