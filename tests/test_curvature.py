import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import network, network_loss, subspaces

from qexp_jax import curvature, subspace
from qexp_jax.quadratic import eigenspace

KEY = jax.random.key(4)
PARAMS, RECORDS = network(KEY)


@jax.jit
def dense_columns(space):
    full = subspace.full(PARAMS)
    return jax.vmap(lambda e: subspace.project(full, subspace.lift(space, e)))(jnp.eye(space.dim)).T


@jax.jit
def dense_hessian():
    full = subspace.full(PARAMS)

    def loss(theta):
        params = subspace.lift(full, theta)
        return jnp.mean(jax.vmap(network_loss, in_axes=(None, 0))(params, RECORDS))

    return jax.hessian(loss)(subspace.project(full, PARAMS))


@pytest.mark.parametrize("name", list(subspaces(KEY, PARAMS)))
def test_projected_hessian_is_that_of_the_dense_oracle(name):
    space = subspaces(KEY, PARAMS)[name]
    columns = dense_columns(space)
    expected = columns.T @ dense_hessian() @ columns
    for options in ({"columns_per_batch": 1}, {"columns_per_batch": 4, "microbatch_size": 8}):
        found = jax.jit(functools.partial(curvature.projected_hessian, network_loss, **options))
        np.testing.assert_allclose(found(PARAMS, space, RECORDS), expected, atol=3e-5)
    whole = jax.jit(functools.partial(curvature.hessian, network_loss))
    np.testing.assert_allclose(whole(PARAMS, space, RECORDS), expected, atol=3e-5)


def test_an_accelerator_follows_as_many_records_and_directions_as_its_memory_holds(monkeypatch):
    full = subspace.full(PARAMS)
    expected = dense_hessian()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for held in (2**30, 16 * 40 * full.dim, 1):
        monkeypatch.setattr(curvature, "HELD_BYTES", held)
        columns = curvature._columns_at_a_time(network_loss, PARAMS, full.layout, RECORDS, full.dim)
        records = curvature._records_at_a_time(network_loss, PARAMS, RECORDS, columns, 256)
        pairs = held // (2 * curvature.bytes_of_one(network_loss, PARAMS, RECORDS))
        assert columns <= full.dim and records <= 37 and records * columns <= max(1, pairs, columns)
        found = jax.jit(functools.partial(curvature.projected_hessian, network_loss))(PARAMS, full, RECORDS)
        np.testing.assert_allclose(found, expected, atol=3e-5)
    assert (columns, records) == (1, 1)


def model(params, record):
    return jnp.tanh(record["x"] @ params["layer"]["w"] + params["layer"]["b"]) @ params["head"]


def softmax_loss(outputs, record):
    return jax.nn.logsumexp(outputs) - outputs[record["label"]]


def test_ggn_is_the_jacobian_sandwich_and_the_fisher_of_drawn_labels():
    space = subspaces(KEY, PARAMS)["orthonormal"]
    columns, full = dense_columns(space), subspace.full(PARAMS)
    records = {"x": RECORDS["x"], "label": jnp.zeros(37, int)}

    def sandwich(record):
        jacobian = jax.jacobian(lambda t: model(subspace.lift(full, t), record))(subspace.project(full, PARAMS))
        p = jax.nn.softmax(model(PARAMS, record))
        return jacobian.T @ (jnp.diag(p) - jnp.outer(p, p)) @ jacobian

    expected = columns.T @ jnp.mean(jax.jit(jax.vmap(sandwich))(records), axis=0) @ columns
    ggn = jax.jit(functools.partial(curvature.projected_ggn, model, softmax_loss, microbatch_size=8))(
        PARAMS, space, records
    )
    np.testing.assert_allclose(ggn, expected, atol=2e-6)

    # Labels drawn from the model, many a record: the Fisher information.
    many = jax.tree.map(lambda x: jnp.repeat(x, 400, axis=0), records)
    logits = jax.vmap(model, in_axes=(None, 0))(PARAMS, many)
    drawn = many | {"label": jax.random.categorical(KEY, logits)}
    fisher = curvature.projected_fisher(lambda p, r: softmax_loss(model(p, r), r), PARAMS, space, drawn)
    np.testing.assert_allclose(fisher, ggn, atol=0.02 * float(jnp.trace(ggn)))


def test_top_eigenspace_is_that_of_the_dense_second_moment():
    full = subspace.full(PARAMS)
    moment = curvature.projected_fisher(network_loss, PARAMS, full, RECORDS)
    expected, vectors = jnp.linalg.eigh(moment)
    space, values = eigenspace.top_eigenspace(network_loss, PARAMS, RECORDS, 5, microbatch_size=8)
    np.testing.assert_allclose(values, expected[:-6:-1], rtol=1e-3)
    overlap = vectors[:, :-6:-1].T @ dense_columns(space)
    np.testing.assert_allclose(jnp.linalg.svd(overlap, compute_uv=False), 1, atol=1e-3)
    assert space.orthonormal
    np.testing.assert_allclose(dense_columns(space).T @ dense_columns(space), np.eye(5), atol=1e-5)


def test_top_eigenspace_is_the_same_from_more_records_than_dimensions():
    head = subspace.full(PARAMS, where="head")
    assert head.dim < len(RECORDS["x"])
    expected, vectors = jnp.linalg.eigh(curvature.projected_fisher(network_loss, PARAMS, head, RECORDS))
    space, values = eigenspace.top_eigenspace(network_loss, PARAMS, RECORDS, head.dim, within=head)
    np.testing.assert_allclose(values, expected[::-1], rtol=1e-4)
    found = jax.vmap(lambda e: subspace.project(head, subspace.lift(space, e)))(jnp.eye(head.dim))
    np.testing.assert_allclose(jnp.abs(found @ vectors[:, ::-1]), np.eye(head.dim), atol=1e-3)


def steep_gradients(n, d):
    """Losses linear in the parameters, whose gradients have second moments that fall as one over j squared."""
    scales = 1.0 / np.arange(1, d + 1)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    return jnp.asarray(np.random.default_rng(1).normal(size=(n, d)) * scales @ basis.T, jnp.float32)


@pytest.mark.parametrize(("dim", "is_sketched"), [(8, True), (50, True), (55, False)])
def test_a_sketched_eigenspace_has_the_energy_of_the_leading_one(monkeypatch, dim, is_sketched):
    gradients = steep_gradients(460, 500)
    sketched = []
    basis_of = eigenspace._leading_sketched
    monkeypatch.setattr(eigenspace, "_leading_sketched", lambda *x: sketched.append(dim) or basis_of(*x))
    space, values = eigenspace.top_eigenspace(lambda params, g: params @ g, jnp.zeros(500), gradients, dim)
    assert (sketched == [dim]) == is_sketched
    expected = jnp.linalg.eigvalsh(gradients.T @ gradients / 460)[: -dim - 1 : -1]
    assert 0.9995 < jnp.sum(values) / jnp.sum(expected) < 1.00001
    np.testing.assert_allclose(values, expected, rtol=0.02)
    rows = jax.vmap(lambda e: subspace.lift(space, e))(jnp.eye(dim))
    np.testing.assert_allclose(rows @ rows.T, np.eye(dim), atol=1e-5)


def test_a_sketch_without_a_power_has_less_of_the_energy():
    gradients, dim = steep_gradients(460, 500), 50
    sketch = jax.random.normal(KEY, (460, dim))
    basis = jnp.linalg.qr(gradients.T @ sketch)[0]
    expected = jnp.linalg.eigvalsh(gradients.T @ gradients)[: -dim - 1 : -1]
    assert jnp.sum((gradients @ basis) ** 2) < 0.999 * jnp.sum(expected)


def by_cholesky_alone(columns):
    lower = jnp.linalg.cholesky(columns.T @ columns)
    return jnp.linalg.solve(lower, columns.T).T


@pytest.mark.parametrize("kind", ["nearly orthonormal", "nearly dependent", "dependent", "with a zero"])
def test_columns_are_made_orthonormal_however_dependent(kind):
    start = jnp.linalg.qr(jax.random.normal(KEY, (200, 12)))[0]
    close = start.at[:, 11].set(start[:, 0] + 1e-4 * start[:, 11])
    columns = {
        "nearly orthonormal": (start + 1e-2 * jnp.roll(start, 1, axis=1)) * jnp.geomspace(1, 1e-6, 12),
        "nearly dependent": close,
        "dependent": start.at[:, 11].set(start[:, 0]),
        "with a zero": start.at[:, 11].set(0),
    }[kind]
    found = eigenspace._orthonormal(columns)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=3e-6)
    np.testing.assert_allclose(found @ (found.T @ columns), columns, atol=1e-6)
    if kind != "nearly orthonormal":  # what QR is kept for
        twin = by_cholesky_alone(columns)
        assert not np.max(np.abs(twin.T @ twin - np.eye(12))) < 1e-3


def test_fewer_gradients_than_directions_of_their_own_are_completed():
    gradients = jax.random.normal(KEY, (20, 3)) @ jax.random.normal(jax.random.key(5), (3, 40))
    space, values = eigenspace.top_eigenspace(lambda params, g: params @ g, jnp.zeros(40), gradients, 6)
    rows = jax.vmap(lambda e: subspace.lift(space, e))(jnp.eye(6))
    np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(values[3:], 0, atol=1e-4)


def test_psd_part_takes_absolute_eigenvalues():
    basis, _ = jnp.linalg.qr(jax.random.normal(KEY, (4, 4)))
    values = jnp.array([-3.0, -0.5, 0.0, 2.0])
    np.testing.assert_allclose(
        curvature.psd_part((basis * values) @ basis.T), (basis * jnp.abs(values)) @ basis.T, atol=1e-5
    )


def test_functions_are_usable_under_vmap_over_parameters():
    space = subspace.full(PARAMS, where="head")
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    both = jax.jit(jax.vmap(lambda p: curvature.projected_hessian(network_loss, p, space, RECORDS)))(stacked)
    np.testing.assert_allclose(both[0], curvature.projected_hessian(network_loss, PARAMS, space, RECORDS), atol=1e-5)
