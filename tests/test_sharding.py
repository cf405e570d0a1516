"""Eight devices give the single-device result, with a clip that is active and an adversarial record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import damped_precision, linear_loss, network, network_loss

from qexp_jax import clipping, curvature, precision, records, subspace

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
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(how):
    params = {"w": jnp.zeros(3)}
    data = {"g": jnp.zeros((16, 3)).at[9].set(1e6)}

    def private_pass(units, mask):
        return clipping.clipped_sum(
            linear_loss, params, subspace.full(params), precision.dense(jnp.eye(3)), units,
            mask=mask, l2_clip_norm=1.0, axis_name="data",
        )[0]  # fmt: skip

    np.testing.assert_allclose(jnp.linalg.norm(on_devices(how, private_pass, data)), 1, rtol=1e-6)


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
