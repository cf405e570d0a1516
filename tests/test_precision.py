import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import spd

from qexp_jax import precision
from qexp_jax.quadratic import dense_root

KEY = jax.random.key(6)


def low_rank_example(d=12, r=3):
    vectors = jnp.linalg.qr(jax.random.normal(KEY, (d, r)))[0].T
    values, scale = jnp.array([5.0, 2.0, 0.5]), 0.3
    return precision.low_rank(scale, vectors, values), scale * jnp.eye(d) + vectors.T @ (values[:, None] * vectors)


EXAMPLES = {"dense": lambda: (precision.dense(spd(KEY, 7)), spd(KEY, 7)), "low_rank": low_rank_example}


@pytest.mark.parametrize("form", EXAMPLES)
def test_operators_are_roots_of_the_dense_matrix(form):
    operator, matrix = EXAMPLES[form]()
    eye = jnp.eye(operator.dim)
    whitening = jax.jit(jax.vmap(lambda e: precision.whiten(operator, e)))(eye).T
    coloring = jax.jit(jax.vmap(lambda e: precision.color(operator, e)))(eye).T
    uncoloring = jax.jit(jax.vmap(lambda e: precision.uncolor(operator, e)))(eye).T
    np.testing.assert_allclose(whitening @ matrix @ whitening.T, eye, atol=2e-5)
    np.testing.assert_allclose(coloring, whitening.T, atol=1e-6)
    np.testing.assert_allclose(uncoloring @ coloring, eye, atol=2e-5)
    np.testing.assert_allclose(uncoloring.T @ uncoloring, matrix, atol=2e-4)
    x = jax.random.normal(KEY, (5, operator.dim))
    norms = jax.jit(precision.whitened_norms)(operator, [x])
    np.testing.assert_allclose(norms, jnp.linalg.norm(x @ whitening.T, axis=1), rtol=1e-4)
    np.testing.assert_allclose(operator.log_det, np.linalg.slogdet(np.asarray(matrix, float))[1], rtol=1e-5)


@pytest.mark.parametrize("form", EXAMPLES)
def test_draws_have_covariance_the_inverse_precision(form):
    operator, matrix = EXAMPLES[form]()
    draws = jax.jit(jax.vmap(lambda k: precision.draw(k, operator)))(jax.random.split(KEY, 40_000))
    root = np.linalg.cholesky(np.asarray(matrix, float))
    whitened = np.asarray(draws, float) @ root
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(operator.dim), atol=0.035)


def test_a_matrix_that_is_not_spd_is_flagged_not_raised_under_jit():
    flag = jax.jit(lambda m: precision.is_spd(precision.dense(m)))
    assert flag(jnp.eye(3)) and not flag(jnp.diag(jnp.array([1.0, -1.0, 1.0])))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"square matrix, found matrix.shape=\(2, 3\)"):
        precision.dense(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"values.shape=\(2,\)"):
        precision.low_rank(1.0, jnp.ones((3, 5)), jnp.ones(2))


def test_a_whitened_norm_is_never_too_small_even_where_it_cancels():
    vectors = jnp.linalg.qr(jax.random.normal(KEY, (400, 5)))[0].T
    operator = precision.low_rank(1e-4, vectors, jnp.full(5, 1.0))
    inside = jax.random.normal(KEY, (50, 5)) @ vectors + 1e-4 * jax.random.normal(KEY, (50, 400))
    exact = np.asarray(vectors, np.float64)
    leading = np.asarray(inside, np.float64) @ exact.T
    rest = np.asarray(inside, np.float64) - leading @ np.linalg.inv(exact @ exact.T) @ exact
    true = np.sqrt((rest**2).sum(1) / 1e-4 + (leading**2).sum(1) / (1 + 1e-4))
    assert np.all(jax.jit(precision.whitened_norms)(operator, [inside]) >= true * (1 - 1e-6))


@pytest.mark.parametrize("form", EXAMPLES)
def test_many_draws_are_independent_and_have_the_law_of_one(form):
    operator, matrix = EXAMPLES[form]()
    found = np.asarray(precision.draws(KEY, operator, 40_000), float)
    whitened = found @ np.linalg.cholesky(np.asarray(matrix, float))
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(operator.dim), atol=0.035)
    assert np.max(np.abs(np.cov((0.9 * whitened).T) - np.eye(operator.dim))) > 0.1  # the wrong scale is seen
    assert abs(np.mean(np.sum(whitened[1:] * whitened[:-1], axis=1))) < 5 * np.sqrt(operator.dim / 40_000)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_matrix_of_several_blocks_has_the_root_of_the_oracle(backend, monkeypatch):
    matrix = spd(KEY, 2 * dense_root._ON_CPU + 37, condition=1e3)
    monkeypatch.setattr(precision.jax, "default_backend", lambda: backend)
    operator = precision.dense.__wrapped__(matrix)  # no trace of the other backend is used again
    assert len(operator.arrays.inverses) == {"cpu": 3, "gpu": 1}[backend]
    root = np.linalg.cholesky(np.asarray(matrix, np.float64))
    x = np.asarray(jax.random.normal(KEY, (operator.dim,)), np.float64)
    for function, expected in (
        (precision.whiten, np.linalg.solve(root, x)),
        (precision.color, np.linalg.solve(root.T, x)),
        (precision.uncolor, root.T @ x),
    ):
        np.testing.assert_allclose(
            function(operator, jnp.asarray(x, jnp.float32)), expected, atol=1e-4 * np.abs(expected).max()
        )
    np.testing.assert_allclose(operator.log_det, np.linalg.slogdet(np.asarray(matrix, float))[1], rtol=1e-5)
