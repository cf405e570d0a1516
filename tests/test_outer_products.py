"""Outer products against whole gradients, where a loss allows them and where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import wide_layer_loss, wide_layer_network

from qexp_jax import clipping, gradients, precision, subspace
from qexp_jax.model import factored_gradients
from qexp_jax.model.factored_gradients import Outer

KEY = jax.random.key(31)
LEAVES = [jax.random.normal(KEY, (70, 5)) / 8, jax.random.normal(KEY, (5, 70)) / 2]
RECORDS = {"x": jax.random.normal(KEY, (6, 70)), "y": jax.random.normal(KEY, (6, 70))}


def squared(outputs, record):
    return jnp.sum((outputs - record["y"]) ** 2)


layer = jax.jit(lambda w, x: jax.nn.relu(x @ w))


def with_scan(leaves, record):
    turned, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c), c), record["x"] @ leaves[0], None, length=3)
    values, _ = jax.lax.top_k(turned, 4)  # of both, results that nobody uses
    return squared(values @ leaves[1][:4], record)


LOSSES = {  # and which leaves are used in one product with one vector
    "layers": (lambda w, r: squared(jnp.tanh(r["x"] @ w[0]) @ w[1], r), (True, True)),
    "matrix from the left": (lambda w, r: squared(w[0] @ (w[1] @ r["x"]), r), (True, True)),
    "a batch of one": (lambda w, r: squared((jnp.tanh(r["x"][None] @ w[0]) @ w[1])[0], r), (True, True)),
    "compiled layers": (lambda w, r: squared(layer(w[1], layer(w[0], r["x"])), r), (True, True)),
    "one layer called twice": (lambda w, r: squared(layer(w[1], layer(w[0], layer(w[1], layer(w[0], r["x"])))), r), ()),
    "tied": (lambda w, r: squared(jnp.tanh(r["x"] @ w[0]) @ w[0].T, r), (False, False)),
    "a penalty": (lambda w, r: squared(r["x"] @ w[0] @ w[1], r) + jnp.sum(w[0] ** 2), (False, True)),
    "a sequence": (lambda w, r: squared(r["x"].reshape(2, 35) @ w[0].reshape(35, 10) @ w[1].reshape(10, 35), r), ()),
    "many vectors": (lambda w, r: jnp.sum(jnp.outer(r["y"][:3], r["x"]) @ w[0]) ** 2 + jnp.sum(w[1]), ()),
    "elementwise": (lambda w, r: squared(r["x"] * w[0].T[2] + w[1][0], r), ()),
    "half precision": (lambda w, r: squared(r["x"].astype(jnp.bfloat16) @ w[0].astype(jnp.bfloat16) @ w[1], r), ()),
    "a loop": (with_scan, (True, False)),
    "of constants": (lambda w, r: squared(jnp.ones(70) @ w[0] @ w[1], r), (True, True)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_autodiff_and_outer_products_where_a_matrix_meets_one_vector(name):
    loss, expected = LOSSES[name]
    reshaped = lambda w, r: loss(w, r | {"y": r["y"].reshape(2, 35)} if name == "a sequence" else r)
    rows = jax.jit(jax.vmap(lambda r: factored_gradients.gradient(reshaped, LEAVES, r)))(RECORDS)
    flat = lambda r: jnp.concatenate([g.ravel() for g in jax.grad(reshaped)(LEAVES, r)])
    whole = jax.jit(jax.vmap(flat))(RECORDS)
    assert tuple(isinstance(x, Outer) for x in rows) == (expected or (False, False))
    scale = jnp.max(jnp.abs(whole))
    np.testing.assert_allclose(factored_gradients.whole(rows) / scale, whole / scale, atol=2e-6)
    np.testing.assert_allclose(factored_gradients.norms(rows), jnp.linalg.norm(whole, axis=1), rtol=1e-4)
    weights, keep = jnp.arange(6.0), jnp.arange(6) != 4
    for part, gradients_of in zip(rows, jnp.split(whole, [350], axis=1), strict=True):
        if isinstance(part, Outer):
            sums = factored_gradients.grouped_sums(part, weights, keep, 4)
            expected = [(weights * keep)[s] @ gradients_of[s] for s in (slice(0, 4), slice(4, 6))]
            np.testing.assert_allclose(sums / scale, np.stack(expected) / scale, atol=2e-5)


def test_only_wide_matrices_are_worth_it():
    shapes = [(70, 5), (5, 65), (64, 64), (70, 1), (70,), (70, 5, 2)]
    assert [factored_gradients.is_wide(s) for s in shapes] == [True, True, False, False, False, False]


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e12])
def test_norms_of_small_and_large_factors_stay_within_float32(scale):
    left, right = jnp.full((2, 70), 1e3 / scale, jnp.float32), jnp.full((2, 5), scale, jnp.float32)
    expected = 70 * 5 * 1e6
    np.testing.assert_allclose(factored_gradients.norms([Outer(left, right)]) ** 2, expected, rtol=1e-5)
    if scale != 1e12:
        twin = jnp.sum(left**2, axis=1) * jnp.sum(right**2, axis=1)
        assert not np.allclose(twin, expected, rtol=1e-2)


def test_rows_that_are_not_kept_are_not_looked_at():
    part, weights = Outer(jnp.ones((3, 70)).at[1, 5].set(jnp.nan), jnp.ones((3, 5)).at[1].set(jnp.inf)), jnp.arange(3.0)
    total = factored_gradients.grouped_sums(part, weights, jnp.array([True, False, True]), 32)
    np.testing.assert_allclose(total, 2, rtol=1e-5)
    twin = factored_gradients.grouped_sums(part, weights, jnp.array([True, True, True]), 32)
    assert not np.all(np.isfinite(twin))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e36])
def test_factors_of_any_size_are_added_as_they_are(size):
    """The other factor is as large or small as floats allow; no part is larger than it is."""
    part = Outer(jnp.full((1, 70), size, jnp.float32), jnp.full((1, 5), 1 / max(size, 1e-36), jnp.float32))
    total = factored_gradients.grouped_sums(part, jnp.ones(1), jnp.ones(1, bool), 32)
    assert np.all(np.isfinite(total)) and np.all(total <= min(1, size * 1e36) * (1 + 1e-5))
    if size in (1e-30, 1.0):
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def clipped(params, space, preconditioner, data, clip_norm=0.5, **options):
    return clipping.clipped_sum(wide_layer_loss, params, space, preconditioner, data, l2_clip_norm=clip_norm, **options)


@pytest.mark.parametrize("dim", [None, 50])
def test_a_pass_in_factors_is_that_of_whole_gradients(dim, monkeypatch):
    params, data = wide_layer_network(KEY)
    data["y"] = data["y"].at[5].set(1e4).at[7].set(jnp.nan)
    space = subspace.count_sketch(KEY, params, dim) if dim else subspace.full(params)
    directions = jnp.linalg.qr(jax.random.normal(KEY, (space.dim, 6)))[0].T
    preconditioner = precision.low_rank(0.1, directions, jnp.linspace(2.0, 0.5, 6))
    mask = jnp.arange(len(data["x"])) % 4 > 0
    found = clipped(params, space, preconditioner, data, mask=mask, microbatch_size=7)
    rows = gradients.gradient_rows(wide_layer_loss, params, space, data)
    assert [isinstance(x, Outer) for x in rows] == ([False] if dim else [False, False, True])
    monkeypatch.setattr(gradients, "is_in_factors", lambda space: False)
    expected = clipped(params, space, preconditioner, data, mask=mask, microbatch_size=7)
    np.testing.assert_allclose(found[0], expected[0], atol=5e-3)  # but for what they keep for rounding
    assert found[1] == expected[1] and found[1].num_clipped > 3 and found[1].num_nonfinite == 1


@pytest.mark.parametrize("make", [subspace.count_sketch, subspace.gaussian])
def test_a_count_sketch_forms_no_gradient_of_a_wide_matrix(make):
    params, data = wide_layer_network(KEY)
    space = make(KEY, params, 50)
    rows = lambda data: gradients.gradient_rows(wide_layer_loss, params, space, data, mode="reverse")
    assert ("37,71,5]" in str(jax.make_jaxpr(rows)(data))) == (make is subspace.gaussian)


@pytest.mark.parametrize("dim", [None, 40])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e15])
def test_each_units_part_is_bounded_by_the_clip_norm_at_any_scale(scale, dim):
    """Of a loss whose gradient is the outer product of two vectors of the record, so that it can be any."""
    params = {"w": jnp.zeros((70, 5))}
    space = subspace.count_sketch(KEY, params, dim) if dim else subspace.full(params)
    directions = jnp.linalg.qr(jax.random.normal(KEY, (space.dim, 4)))[0].T
    preconditioner = precision.low_rank(0.1, directions, jnp.full(4, 0.9))
    bilinear = lambda params, record: record["x"] @ params["w"] @ record["y"]
    record = {"x": jax.random.normal(KEY, (1, 70)) / scale, "y": scale * 1e3 * jax.random.normal(KEY, (1, 5))}
    total, _ = clipping.clipped_sum(bilinear, params, space, preconditioner, record, l2_clip_norm=0.5)
    assert 0.5 * 0.99 < jnp.linalg.norm(total) < 0.5 * (1 + 1e-6)
