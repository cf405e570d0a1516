import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import damped_precision, linear_loss, network, network_loss, subspaces

from qexp_jax import clipping, gradients, precision, records, subspace

KEY = jax.random.key(5)
PARAMS, RECORDS = network(KEY)


@pytest.mark.parametrize("name", ["full", "sketched_layer", "composed"])
def test_both_modes_and_any_microbatch_give_the_oracles_sum(name):
    space = subspaces(KEY, PARAMS)[name]
    factored = damped_precision(network_loss, PARAMS, space, RECORDS)

    def one(record):
        v = precision.whiten(factored, subspace.project(space, jax.grad(network_loss)(PARAMS, record)))
        return v * jnp.minimum(1, 0.8 / jnp.linalg.norm(v))

    expected = jnp.sum(jax.jit(jax.vmap(one))(RECORDS), axis=0)
    for options in ({}, {"microbatch_size": 5}, {"mode": "forward", "microbatch_size": 8}):
        total, info = clipping.clipped_sum(network_loss, PARAMS, space, factored, RECORDS, l2_clip_norm=0.8, **options)
        np.testing.assert_allclose(total, expected, atol=1e-4)
        assert 0 < info.num_clipped < info.num_units == 37


def linear_sum(gradients, clip_norm=1.0, **options):
    gradients = jnp.asarray(gradients, jnp.float32)
    params = {"w": jnp.zeros(gradients.shape[1])}
    factored = precision.dense(jnp.eye(gradients.shape[1]))
    return clipping.clipped_sum(
        linear_loss,
        params,
        subspace.full(params),
        factored,
        {"g": gradients},
        l2_clip_norm=clip_norm,
        **options,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_record_with_a_non_finite_gradient_or_norm_contributes_zero(bad, mode):
    total, info = linear_sum([[0.3, 0.0], [bad, bad], [0.0, 0.4]], mode=mode)
    np.testing.assert_allclose(total, [0.3, 0.4], rtol=1e-6)
    assert info.num_nonfinite == 1


def test_each_units_part_is_bounded_by_the_clip_norm_at_any_scale():
    for scale in (1e-30, 1e-3, 1.0, 1e3, 1e15, 1e30, 5e37):
        total, _ = linear_sum([[3.0 * scale, 4.0 * scale]])
        assert jnp.linalg.norm(total) <= 1 + 1e-6


def test_one_unit_moves_a_low_rank_whitened_sum_by_the_clip_norm_and_an_l2_clip_by_more():
    directions = jnp.linalg.qr(jax.random.normal(KEY, (60, 4)))[0].T
    factored, params = precision.low_rank(0.1, directions, jnp.full(4, 0.9)), {"w": jnp.zeros(60)}
    soft = jax.random.normal(KEY, (60,))
    soft -= directions.T @ (directions @ soft)  # the direction that whitening stretches most
    for gradient in (1e3 * soft, 1e3 * directions[0], 1e3 * soft + directions[1]):
        total, _ = clipping.clipped_sum(
            linear_loss, params, subspace.full(params), factored, {"g": gradient[None]}, l2_clip_norm=1.5
        )
        assert 1.5 * 0.999 < jnp.linalg.norm(total) < 1.5 * (1 + 1e-6)
    twin, *_ = clipping.clip(soft, jnp.linalg.norm(soft), 1.5)
    assert jnp.linalg.norm(precision.whiten(factored, twin)) > 1.5 * 3


def test_masked_and_absent_units_contribute_zero():
    total, info = linear_sum([[5.0, 0.0], [0.0, 0.5]], mask=jnp.array([False, True]))
    np.testing.assert_allclose(total, [0.0, 0.5])
    assert info.num_units == 1
    np.testing.assert_array_equal(linear_sum(np.zeros((0, 2)))[0], 0)


def test_records_of_one_unit_are_clipped_together():
    gradients = {"g": jnp.array([[10.0, 0.0], [0.0, 10.0], [10.0, 0.0], [0.1, 0.0]])}
    params = {"w": jnp.zeros(2)}
    units = records.group_by_unit(gradients, ["a", "a", "a", "b"])
    total, info = clipping.clipped_sum(
        records.unit_loss(linear_loss),
        params,
        subspace.full(params),
        precision.dense(jnp.eye(2)),
        units,
        l2_clip_norm=1.0,
        microbatch_size=1,
    )
    direction = np.array([20.0, 10.0]) / np.hypot(20, 10)
    np.testing.assert_allclose(total, direction + [0.1, 0], rtol=1e-5)
    assert info.num_units == 2


def test_the_pass_runs_under_jit_and_vmap_over_clip_norms():
    space = subspace.full(PARAMS)
    factored = damped_precision(network_loss, PARAMS, space, RECORDS)

    def norm(clip_norm):
        total, _ = clipping.clipped_sum(network_loss, PARAMS, space, factored, RECORDS, l2_clip_norm=clip_norm)
        return jnp.linalg.norm(total)

    norms = jax.jit(jax.vmap(norm))(jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(norms, [norm(0.1), norm(1.0)], rtol=1e-4)


def test_the_automatic_mode_is_forward_for_few_directions_of_a_loss_that_uses_each_parameter_once():
    params, rows = {"w": jnp.ones((40, 20))}, {"x": jnp.ones((5, 40)), "tokens": jnp.ones((5, 50, 40))}
    once, often = (lambda p, r: jnp.sum(r["x"] @ p["w"])), (lambda p, r: jnp.sum(jnp.tanh(r["tokens"] @ p["w"])))
    space = {k: subspace.gaussian(KEY, params, k) for k in (1, 8, 64)}
    assert [gradients.faster_mode(once, params, space[k], rows) for k in (1, 8, 64)] == [
        "forward",
        "forward",
        "reverse",
    ]
    assert [gradients.faster_mode(often, params, space[k], rows) for k in (1, 8, 64)] == ["forward"] + ["reverse"] * 2
    scanned = lambda p, r: jnp.sum(jax.lax.map(lambda x: jnp.tanh(x @ p["w"]), r["tokens"]))
    assert gradients.faster_mode(scanned, params, space[8], rows) == "reverse"
    for mode in ("forward", "reverse"):
        np.testing.assert_allclose(
            gradients.projected_gradients(often, params, space[1], rows, mode="auto"),
            gradients.projected_gradients(often, params, space[1], rows, mode=mode),
            rtol=1e-4,
        )


def test_records_at_a_time_suit_the_device_and_the_memory(monkeypatch):
    params, data = network(KEY)
    whole = subspace.full(params)
    wide = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    one = {"x": jax.ShapeDtypeStruct((9, 4096), jnp.float32)}
    deep = lambda p, r: jax.lax.scan(lambda x, _: (jnp.tanh(x), None), r["x"], None, length=100)[0].sum()
    held = 16 * 2**24 + 2 * 4 * (100 * 4096 + 1)
    assert gradients.at_a_time(network_loss, params, whole, data) == 32
    assert gradients.at_a_time(deep, wide, subspace.full(wide), one) == 2 < 2**30 // held
    layer, rows = {"w": jnp.zeros((700, 9))}, {"x": jax.ShapeDtypeStruct((5, 700), jnp.float32)}
    in_factors = [(lambda p, r: jnp.sum(r["x"] @ p["w"]), 128), (lambda p, r: jnp.sum(jnp.outer(r["x"], r["x"])), 32)]
    for loss, most in in_factors:  # the second forms megabytes
        assert gradients.at_a_time(loss, layer, subspace.full(layer), rows) == most
    assert gradients.at_a_time(in_factors[0][0], layer, subspace.count_sketch(KEY, layer, 3), rows) == 128
    assert gradients.at_a_time(in_factors[0][0], layer, subspace.gaussian(KEY, layer, 3), rows) == 32
    # 2^27 bytes hold 13 of these, which is no power of two.
    some = {"w": jnp.zeros(600_000)}
    assert gradients.at_a_time(lambda p, r: jnp.sum(r["x"]), some, subspace.full(some), one) == 8
    huge = {"w": jax.ShapeDtypeStruct((2**26,), jnp.float32)}
    assert gradients.at_a_time(lambda p, r: jnp.sum(r["x"]), huge, subspace.full(huge), one) == 1
    monkeypatch.setattr(gradients.jax, "default_backend", lambda: "gpu")
    assert gradients.at_a_time(network_loss, params, whole, data) == 8192
    assert gradients.at_a_time(deep, wide, subspace.full(wide), one) == 2**30 // held
    small = {"w": jnp.zeros(3)}
    many = gradients.at_a_time(deep, small, subspace.full(small), one)
    assert many == pytest.approx(2**30 / (2 * 4 * 100 * 4096), abs=1)
