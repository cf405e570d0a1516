"""Regenerated random projections: against the columns written out, over blocks, panels and leaves of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import subspace
from qexp_jax.model import count_sketch, gaussian_sketch, panels
from qexp_jax.model.factored_gradients import Outer, whole

KEY = jax.random.key(4)
MODULES = {"count_sketch": count_sketch, "gaussian": gaussian_sketch}
SHAPES = ((3, 5), (0, 3), (), (50, 3), (2,))  # leaves that begin and end inside a block, span several, or are empty


def flat(arrays):
    return jnp.concatenate([x.ravel() for x in arrays])


def columns(shapes, kind, dim):
    lift = MODULES[kind].lift
    return jax.jit(jax.vmap(lambda e: flat(lift(shapes, KEY, e))))(jnp.eye(dim))


@pytest.mark.parametrize("kind", ["count_sketch", "gaussian"])
@pytest.mark.parametrize(("dim", "panel"), [(1, 8), (6, 12), (33, 2**18)])
def test_project_is_the_adjoint_of_lift_whatever_the_panels(kind, dim, panel, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", panel)
    leaves = [jax.random.normal(jax.random.fold_in(KEY, i), shape) for i, shape in enumerate(SHAPES)]
    projected = jax.jit(lambda x: MODULES[kind].project(SHAPES, KEY, dim, x))(leaves)
    np.testing.assert_allclose(projected, columns(SHAPES, kind, dim) @ flat(leaves), rtol=2e-5, atol=2e-5)


def test_the_count_sketch_does_not_depend_on_the_panels(monkeypatch):
    whole = columns(SHAPES, "count_sketch", 6)
    monkeypatch.setattr(panels, "PANEL", 12)
    np.testing.assert_array_equal(columns(SHAPES, "count_sketch", 6), whole)
    np.testing.assert_allclose(whole @ whole.T, np.eye(6), atol=1e-6)


@pytest.mark.parametrize(("dim", "panel"), [(1, 8), (6, 12), (33, 66), (33, 2**18), (300, 8), (407, 8)])
def test_the_count_sketch_of_outer_products_is_that_of_the_gradients_that_they_are(dim, panel, monkeypatch):
    """Matrices that begin and end inside a block, span several, or lie within one; panels of one block or several."""
    monkeypatch.setattr(panels, "PANEL", panel)
    shapes = ((3, 5), (70, 3), (2,), (2, 90))
    rows = [jax.random.normal(jax.random.fold_in(KEY, i), (4, np.prod(shape))) for i, shape in enumerate(shapes)]
    for i, (a, b) in ((1, shapes[1]), (3, shapes[3])):
        rows[i] = Outer(jax.random.normal(KEY, (4, a)).at[2, 0].set(jnp.nan), jax.random.normal(KEY, (4, b)))
    found = jax.jit(lambda x: count_sketch.project_rows(shapes, KEY, dim, x))(rows)
    expected = whole(rows)[jnp.array([0, 1, 3])] @ columns(shapes, "count_sketch", dim).T
    np.testing.assert_allclose(found[jnp.array([0, 1, 3])], expected, rtol=2e-5, atol=2e-5)
    assert jnp.any(jnp.isnan(found[2]))


def test_on_a_gpu_each_record_has_the_same_count_sketch_and_keeps_its_nan(monkeypatch):
    rows = jax.random.normal(KEY, (5, 40)).at[2].set(jnp.nan)
    run = lambda: np.asarray(jax.vmap(lambda x: count_sketch.project(((40,),), KEY, 6, [x]))(rows))
    expected = run()
    monkeypatch.setattr(count_sketch.jax, "default_backend", lambda: "gpu")
    found = run()
    np.testing.assert_array_equal(found, expected)
    assert np.all(np.isnan(found[2])) and np.all(np.isfinite(np.delete(found, 2, axis=0)))


def test_the_stored_gaussian_is_the_regenerated_one(monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 40)
    stored = jax.jit(jax.vmap(lambda *c: flat(c)))(*gaussian_sketch.columns(SHAPES, KEY, 6, jnp.float32))
    np.testing.assert_allclose(columns(SHAPES, "gaussian", 6), stored, rtol=1e-6)
    np.testing.assert_allclose(
        gaussian_sketch.gram(SHAPES, KEY, 6, jnp.float32), stored @ stored.T, rtol=1e-5, atol=1e-6
    )


def test_gaussian_entries_have_variance_one_over_d_and_no_repeats():
    entries = columns(((60, 50), (1000,)), "gaussian", 20)
    np.testing.assert_allclose(jnp.var(entries), 1 / 4000, rtol=0.02)
    assert len(np.unique(np.asarray(entries))) > 0.99 * entries.size


def test_a_large_gaussian_subspace_stores_its_key_alone():
    params = {"w": jax.ShapeDtypeStruct((10_000, 1000), jnp.float32)}
    space = subspace.gaussian(KEY, params, 256)
    assert space.arrays is KEY and not space.orthonormal
    assert subspace.gaussian(KEY, params, 256).operator is space.operator  # compiles once


@pytest.mark.parametrize("kind", ["count_sketch", "gaussian"])
def test_beside_argument_and_result_only_a_panel_is_held(kind):
    shapes, dim = ((1024, 4096),), 64
    project = jax.jit(lambda x: MODULES[kind].project(shapes, KEY, dim, [x]))
    lift = jax.jit(lambda w: MODULES[kind].lift(shapes, KEY, w))
    stats = [
        f.lower(jax.ShapeDtypeStruct(s, jnp.float32)).compile().memory_analysis()
        for f, s in ((project, shapes[0]), (lift, (dim,)))
    ]
    largest = 4 * 1024 * 4096
    assert all(s.temp_size_in_bytes < 1.3 * largest for s in stats)
