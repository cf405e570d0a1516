"""TF32 and bfloat16, which accelerators put into products by default, stay out of all linear algebra of the library."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core.primitives import dot_general_p
from problems import fine_tune, subspaces

from qexp_jax import accuracy, clipping, curvature, mechanism, precision, subspace, truncated

KEY = jax.random.key(3)
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def loss_fn(params, record):
    """Without a product of matrices: whatever is multiplied is ours."""
    return jnp.sum((params["layer"]["w"] - record["x"]) ** 2) + jnp.sum(jnp.sin(params["b"] * record["x"][0, 0]) ** 2)


PARAMS = {"layer": {"w": jnp.ones((4, 5))}, "b": jnp.ones(4)}
DATA = {"x": jax.random.normal(KEY, (300, 4, 5)) + 2}


@pytest.fixture
def products(monkeypatch):
    """Precisions of all matrix products that are traced from here on."""
    jax.clear_caches()
    found, bind = [], dot_general_p.bind

    def recording(*args, **params):
        found.append(params["precision"])
        return bind(*args, **params)

    monkeypatch.setattr(dot_general_p, "bind", recording)
    yield found
    jax.clear_caches()


def test_a_product_in_default_precision_is_found(products):
    jax.jit(lambda x: x @ x)(jnp.eye(3))
    assert products == [None]


def wide_loss(params, record):
    return jnp.sum((jnp.matmul(record["x"].ravel(), params["w"], precision=HIGHEST[0]) - 1) ** 2)


RELEASES = (
    (loss_fn, PARAMS, DATA),
    (wide_loss, {"w": jnp.ones((80, 3))}, {"x": jax.random.normal(KEY, (300, 80)) + 2}),
)


def test_all_products_of_a_release_are_in_float32(products):
    """Of one in whole gradients, and one in outer products."""
    for loss, params, data in RELEASES:
        public, private = ({"x": data["x"][s]} for s in (slice(0, 100), slice(100, 300)))
        fine_tune(KEY, loss, params, public=public, private=private, epsilon=1.0, delta=1e-5, rounds=2)
    assert len(products) > 10 and set(products) == {HIGHEST}


@pytest.mark.parametrize("name", subspaces(KEY, PARAMS))
@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_all_products_of_a_pass_and_of_public_curvature_are_in_float32(products, name, form):
    outputs = lambda params, record: params["layer"]["w"][0] * record["x"][0]
    output_loss = lambda y, record: jnp.sum(y**2)

    def everything(params, data):
        space = subspaces(KEY, params)[name]
        matrix = subspace.gram(space) + jnp.eye(space.dim)
        preconditioner = (
            precision.dense(matrix) if form == "dense" else precision.low_rank(0.1, matrix[:2], jnp.ones(2))
        )
        passes = [
            clipping.clipped_sum(loss_fn, params, space, preconditioner, data, l2_clip_norm=1.0, mode=mode)
            for mode in ("reverse", "forward")
        ]
        moved = precision.color(preconditioner, precision.uncolor(preconditioner, jnp.ones(space.dim)))
        return (
            passes,
            subspace.displace(space, params, moved + precision.draws(KEY, preconditioner, 3)[0]),
            curvature.projected_hessian(loss_fn, params, space, data),
            curvature.psd_part(curvature.projected_fisher(loss_fn, params, space, data)),
            curvature.projected_ggn(outputs, output_loss, params, space, data),
        )

    products.clear()
    jax.eval_shape(everything, PARAMS, DATA)
    assert len(products) >= 4 and set(products) == {HIGHEST}


@pytest.mark.parametrize(("num_records", "num_products"), [(300, 2), (20, 5)])  # more than dimensions, and fewer
def test_all_products_of_an_eigenspace_are_in_float32(products, num_records, num_products):
    data = {"x": DATA["x"][:num_records]}
    jax.eval_shape(lambda params: curvature.top_eigenspace(loss_fn, params, data, 4)[1], PARAMS)
    assert products == [HIGHEST] * num_products


@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_all_products_of_draws_and_their_accuracy_are_in_float32(products, form):
    space, eye, ones = subspace.full(PARAMS), jnp.eye(24), jnp.ones(24)

    def everything(params):
        preconditioner = precision.dense(eye) if form == "dense" else precision.low_rank(0.1, eye[:2], ones[:2])
        quadratic = mechanism.Quadratic(preconditioner, ones, 10)
        w = mechanism.draw(KEY, quadratic, 1.0)
        return (
            mechanism.utility(quadratic, w),
            mechanism.excess_utility(quadratic, w),
            mechanism.log_density(quadratic, w, 1.0),
            truncated.draw(KEY, ones / 10, 3.0, 64),
            accuracy.subspace_bias(ones, eye, eye[:, :3]),
            accuracy.taylor_ratio(loss_fn, params, space, w[None], w, ones[:1], DATA),
        )

    jax.eval_shape(everything, PARAMS)
    assert len(products) >= 10 and set(products) == {HIGHEST}
