import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import network, random_like, subspaces

from qexp_jax import subspace

KEY = jax.random.key(3)
PARAMS, _ = network(KEY)
NAMES = list(subspaces(KEY, PARAMS))


@pytest.mark.parametrize("name", NAMES)
def test_project_is_the_exact_adjoint_of_lift(name):
    space = subspaces(KEY, PARAMS)[name]
    w, g = jax.random.normal(KEY, (space.dim,)), random_like(jax.random.key(8), PARAMS)
    projected = jax.jit(subspace.project)(space, g)
    lifted = jax.tree.leaves(jax.jit(subspace.lift)(space, w))
    inner = sum(jnp.vdot(a, b) for a, b in zip(lifted, jax.tree.leaves(g), strict=True))
    np.testing.assert_allclose(inner, jnp.vdot(w, projected), rtol=2e-5)
    transposed = jax.jit(jax.linear_transpose(lambda w: subspace.lift(space, w), w))(g)[0]
    np.testing.assert_allclose(transposed, projected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gram_is_that_of_the_columns(name):
    space = subspaces(KEY, PARAMS)[name]

    @jax.jit
    @jax.vmap
    def column(e):
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(subspace.lift(space, e))])

    columns = column(jnp.eye(space.dim))
    np.testing.assert_allclose(columns @ columns.T, jax.jit(subspace.gram)(space), atol=2e-6)


@pytest.mark.parametrize("dim", [1, 2, 5, 7, 22, 24])
def test_count_sketch_columns_are_orthonormal_at_any_dimension(dim):
    space = subspace.count_sketch(KEY, PARAMS, dim)
    columns = jax.jit(jax.vmap(lambda e: subspace.project(space, subspace.lift(space, e))))(jnp.eye(dim))
    np.testing.assert_allclose(columns, np.eye(dim), atol=1e-6)
    assert jax.tree.leaves(space.arrays)[0].shape == ()  # a key: nothing of size d is stored


def test_count_sketch_keeps_norms_on_average():
    g = random_like(jax.random.key(5), PARAMS)
    norm = sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(g))
    project = jax.jit(jax.vmap(lambda key: subspace.project(subspace.count_sketch(key, PARAMS, 6), g)))
    squared = jnp.sum(project(jax.random.split(KEY, 2000)) ** 2, axis=1)
    np.testing.assert_allclose(jnp.mean(squared), norm * 6 / 24, rtol=0.05)


def test_selection_leaves_other_parameters_untouched_and_without_gradient():
    space = subspace.full(PARAMS, where="^head$")
    moved = subspace.displace(space, PARAMS, jnp.ones(8))
    assert moved["layer"]["w"] is PARAMS["layer"]["w"]
    np.testing.assert_allclose(moved["head"], PARAMS["head"] + 1)
    np.testing.assert_array_equal(subspace.lift(space, jnp.ones(8))["layer"]["b"], 0)


def test_lora_leaves_are_selected_by_path_beside_integer_and_half_precision_leaves():
    params = {
        "kernel": jnp.ones((3, 3), jnp.int8),
        "lora_a": jnp.ones((3, 1), jnp.bfloat16),
        "lora_b": jnp.zeros((1, 3), jnp.bfloat16),
    }
    space = subspace.full(params, where="lora_")
    assert space.dim == 6 and space.layout.dtype == jnp.float32
    with pytest.raises(ValueError, match="kernel of dtype=dtype\\('int8'\\)"):
        subspace.full(params)


def test_equal_shapes_share_one_compiled_program():
    traces = []

    @jax.jit
    def project(space, params):
        traces.append(0)
        return subspace.project(space, params)

    for seed in range(3):
        project(subspace.count_sketch(jax.random.key(seed), PARAMS, 4), PARAMS)
    assert len(traces) == 1


@pytest.mark.parametrize("make", [subspace.count_sketch, subspace.gaussian, subspace.orthonormal])
@pytest.mark.parametrize("dim", [0, -1, 25])
def test_impossible_dimensions_are_refused(make, dim):
    with pytest.raises(ValueError, match=rf"\[1, 24\], found dim={dim}"):
        make(KEY, PARAMS, dim)


def test_a_path_that_matches_nothing_is_refused_with_the_paths():
    with pytest.raises(ValueError, match="layer/b"):
        subspace.full(PARAMS, where="decoder")
