"""Directions that are outer products, against arrays of the same rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from problems import fine_tune, wide_layer_loss, wide_layer_network

from qexp_jax import clipping, gradients, hardened, precision, records, subspace
from qexp_jax.model import factored_gradients
from qexp_jax.model.factored_gradients import Outer
from qexp_jax.private_pass import exact_clipping
from qexp_jax.quadratic import components, directions, public_curvature
from qexp_jax.quadratic.eigenspace import leading_basis

KEY = jax.random.key(32)
R = 9


def rows_of(sizes, n=100):
    """Gradients of an (a, b) matrix and of others, in factors that vary in few directions."""
    a, b, others = sizes
    keys = jax.random.split(KEY, 3)
    steep = lambda key, size: jax.random.normal(key, (n, size)) * jnp.geomspace(1, 1e-3, size)
    return [steep(keys[0], others), Outer(steep(keys[1], a), steep(keys[2], b))]


SIZES = {"one long axis": (200, 4, 7), "the other": (4, 200, 7), "two": (70, 66, 3)}


@pytest.fixture(scope="module", params=SIZES)
def example(request):
    rows = rows_of(SIZES[request.param])
    found = jax.jit(directions.leading, static_argnums=1)(rows, R)
    return rows, found, np.asarray(jax.vmap(lambda c: directions.combine(found, c))(jnp.eye(R)), np.float64)


def test_they_are_orthonormal(example):
    _, found, array = example
    assert found.shape == array.shape and len(found) == R and found.dtype == jnp.float32
    np.testing.assert_allclose(array @ array.T, np.eye(R), atol=5e-6)


def test_products_are_those_of_the_array_for_gradients_whole_and_in_factors(example):
    rows, found, array = example
    whole = np.asarray(factored_gradients.whole(rows), np.float64)
    parts = [rows[0], factored_gradients.whole(rows[1:])]
    for gradients_ in (rows, parts, [factored_gradients.whole(rows)]):
        np.testing.assert_allclose(directions.along_each(found, gradients_), whole @ array.T, atol=1e-4)
        np.testing.assert_allclose(
            directions.along_each(jnp.asarray(array, jnp.float32), gradients_), whole @ array.T, atol=1e-4
        )
    np.testing.assert_allclose(
        directions.along(found, factored_gradients.whole(rows)[3]), whole[3] @ array.T, atol=1e-4
    )


def principal(x):
    return np.linalg.eigh(x.T @ x)


def test_they_are_the_products_and_principal_directions_of_most_energy(example):
    rows, _, array = example
    others, left, right = (np.asarray(x, np.float64) for x in (rows[0], *rows[1]))
    axes = [principal(x * np.linalg.norm(y, axis=1)[:, None])[1] for x, y in ((left, right), (right, left))]
    energies = np.append((((left @ axes[0]) ** 2).T @ (right @ axes[1]) ** 2).ravel(), principal(others)[0])
    held = np.sum((np.asarray(factored_gradients.whole(rows), np.float64) @ array.T) ** 2)
    np.testing.assert_allclose(held, np.sum(np.sort(energies)[-R:]), rtol=2e-3)
    random = np.linalg.qr(np.random.default_rng(0).normal(size=array.T.shape))[0]
    assert np.sum((np.asarray(factored_gradients.whole(rows), np.float64) @ random) ** 2) < 0.3 * held


@pytest.mark.parametrize(
    ("sizes", "n", "rank"), [((200, 2, 1), 150, 140), ((300, 3, 2), 250, 205), ((90, 80, 1), 5, 5)]
)
def test_there_are_as_many_as_asked_for(sizes, n, rank):
    found = directions.leading(rows_of(sizes, n), rank)
    array = jax.vmap(lambda c: directions.combine(found, c))(jnp.eye(rank))
    np.testing.assert_allclose(array @ array.T, np.eye(rank), atol=5e-6)


def test_whole_gradients_have_an_array_of_directions():
    rows = rows_of((200, 4, 7))
    np.testing.assert_array_equal(directions.leading([rows[0]], 3), leading_basis(rows[0], 3).T)


def test_a_precision_of_directions_is_that_of_the_array(example):
    rows, found, array = example
    values, rest = jnp.geomspace(1, 1e-2, R), 0.1
    operator = precision.spectral(rest, found, values)
    root = np.sqrt(rest) * (np.eye(array.shape[1]) - array.T @ array) + array.T * np.sqrt(values) @ array
    whole = np.asarray(factored_gradients.whole(rows), np.float64)
    factors = scipy.linalg.lu_factor(root)
    whitened = scipy.linalg.lu_solve(factors, whole.T).T
    x, expected = factored_gradients.whole(rows)[0], whitened[0]
    scale = np.linalg.norm(expected)
    for transform in (precision.whiten, precision.color):
        np.testing.assert_allclose(transform(operator, x) / scale, expected / scale, atol=1e-5)
    np.testing.assert_allclose(precision.uncolor(operator, x), root @ whole[0], atol=1e-4)
    norms = np.linalg.norm(whitened, axis=1)
    found_norms = precision.whitened_norms(operator, rows)
    np.testing.assert_allclose(found_norms, norms, rtol=0.02)
    assert np.all(found_norms >= norms * (1 - 1e-6))
    np.testing.assert_allclose(operator.log_det, 2 * np.sum(np.log(np.abs(np.diag(factors[0])))), rtol=1e-5)


def test_components_are_scaled_and_multiplied_without_the_directions(example):
    """As vectors are in the array of the directions."""
    rows, found, array = example
    x, y = factored_gradients.whole(rows)[:2]
    factors = jnp.append(jnp.geomspace(1, 1e-2, R), 3.0)
    parts, others = components.decompose(found, x), components.decompose(found, y)
    np.testing.assert_allclose(components.recompose(found, parts), x, atol=1e-6)
    np.testing.assert_allclose(array @ parts.others, 0, atol=1e-5)
    whole = np.asarray(x, np.float64)
    leading = array @ whole
    expected = (leading * factors[:-1]) @ array + factors[-1] * (whole - leading @ array)
    for scaled in (components.recompose(found, components.scaled(factors, parts)), components.scale(found, factors, x)):
        np.testing.assert_allclose(scaled, expected, atol=1e-5)
    products = components.products(parts, others)
    np.testing.assert_allclose(products[:-1], leading * (array @ y), atol=1e-4)
    np.testing.assert_allclose(np.sum(products), whole @ y, rtol=1e-4, atol=1e-4)


def test_a_round_in_factors_has_the_sum_of_whole_gradients(monkeypatch):
    params, data = wide_layer_network(KEY, 400)
    public, private = (jax.tree.map(lambda x, s=s: x[s], data) for s in (slice(0, 150), slice(150, 400)))

    def round_of(release_loss):
        settings = {"epsilon": 2.0, "delta": 1e-5, "precision_rank": 8, "rounds": 1, "diagnostics": True}
        return fine_tune(KEY, release_loss, params, public=public, private=private, **settings)[1][0]

    found = round_of(wide_layer_loss)
    assert found.plan.estimate.directions.shape == (8, 367) and found.clip_info.num_clipped > 10
    whole = lambda *a, **k: [gradients.projected_gradients(*a, **k)]
    monkeypatch.setattr("qexp_jax.private_pass.clipping.gradient_rows", whole)
    expected = round_of(lambda params, record: wide_layer_loss(params, record))  # compiled anew
    whole, sums = expected.quadratic.whitened_sum, found.quadratic.whitened_sum
    np.testing.assert_allclose(sums, whole, atol=1e-6 * jnp.linalg.norm(whole))
    assert found.clip_info == expected.clip_info


def test_a_pass_over_units_of_several_records_is_that_in_the_array_of_the_directions():
    params, data = wide_layer_network(KEY, 60)
    space = subspace.full(params)
    found, _ = public_curvature.leading_directions(wide_layer_loss, params, data, 6, space)
    units = records.group_by_unit(data, np.arange(60) // 3)
    sums = []
    for rows in (found, jax.vmap(lambda c: directions.combine(found, c))(jnp.eye(6))):
        preconditioner = precision.spectral(0.1, rows, jnp.linspace(2.0, 0.5, 6))
        loss = records.unit_loss(wide_layer_loss)
        sums.append(clipping.clipped_sum(loss, params, space, preconditioner, units, l2_clip_norm=0.5))
    (total, info), (expected, same) = sums
    np.testing.assert_allclose(total, expected, atol=5e-3)  # but for what they keep for rounding
    assert info == same and info.num_units == 20 and info.num_clipped > 5


def test_a_hardened_unit_is_clipped_in_the_same_norm():
    params, data = wide_layer_network(KEY, 20)
    space = subspace.full(params)
    found, _ = public_curvature.leading_directions(wide_layer_loss, params, data, 6, space)
    preconditioner = precision.spectral(0.1, found, jnp.linspace(2.0, 0.5, 6))
    exact, info = exact_clipping.integer_sum(wide_layer_loss, params, space, preconditioner, data, l2_clip_norm=0.5)
    total, same = clipping.clipped_sum(wide_layer_loss, params, space, preconditioner, data, l2_clip_norm=0.5)
    np.testing.assert_allclose(exact * 0.5 / hardened.INTEGER_CLIP_NORM, total, atol=5e-3)
    assert info.num_clipped == same.num_clipped > 3
