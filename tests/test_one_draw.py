"""The mechanism of arXiv:2605.20521 as one setting of the call: A = M = H + lambda I, one round, the whole draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qexp_jax
from qexp_jax.model import subspace
from qexp_jax.quadratic import precision
from qexp_jax.quadratic.preconditioner import precision_of

KEY = jax.random.key(0)
D = 6
SCALES = jnp.geomspace(1.0, 0.2, D)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, D)}


def regression(seed, n, target):
    x = jax.random.normal(jax.random.key(seed), (n, D)) * SCALES
    return {"x": x, "y": x @ target + 0.3 * jax.random.normal(jax.random.key(seed + 1), (n,))}


PUBLIC = regression(1, 4000, PARAMS["w"])
PRIVATE = regression(3, 3000, PARAMS["w"] + 0.5)


def loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def drawn(epsilon=1.0, key=KEY, **options):
    """The displacement in the subspace, and what the round knew."""
    plan = qexp_jax.PlanOptions(one_draw=True, **options)
    release, infos = qexp_jax.fine_tune(
        key, loss, PARAMS, public=PUBLIC, private=PRIVATE, epsilon=epsilon, delta=1e-5,
        plan=plan, run=qexp_jax.RunOptions(diagnostics=True),
    )  # fmt: skip
    (info,) = infos
    moved = jax.tree.map(lambda a, b: a - b, release.params, PARAMS)
    return subspace.project(info.plan.subspace, moved), info, release


def curvature_of(info):
    """A (k, k), dense: the round's M times its scale."""
    metric = precision_of(info.plan.estimate.directions, info.preconditioner)
    rows = jax.vmap(lambda v: precision.uncolor(metric, v))(jnp.eye(info.plan.subspace.dim))  # R^T e_j
    return info.preconditioner.scale * rows @ rows.T


@pytest.mark.parametrize("options", [{}, {"damping": 0.01}, {"subspace_dim": 3}])
def test_the_draw_is_the_closed_form(options):
    """Bit for bit what (3) says, up to rounding: minus A^{-1} times the noisy gradient, whole."""
    moved, info, release = drawn(**options)
    np.testing.assert_allclose(moved, info.w / info.preconditioner.scale, rtol=1e-4, atol=1e-6)
    assert release.certificate["rounds"] == 1 and release.certificate["tilt"] is None
    qexp_jax.verify(release.certificate)


@pytest.mark.parametrize("damping", [None, 0.05])
def test_without_noise_it_is_a_damped_newton_step(damping):
    """-(H + lambda I)^{-1} g with the Hessian of the public loss, where the mean of the gradients is not clipped."""
    moved, info, _ = drawn(epsilon=1e4, l2_clip_norm=100.0, damping=damping)
    hessian = jax.hessian(lambda w: jnp.mean(jax.vmap(lambda r: loss({"w": w}, r))(PUBLIC)))(PARAMS["w"])
    gradient = jax.grad(lambda w: jnp.mean(jax.vmap(lambda r: loss({"w": w}, r))(PRIVATE)))(PARAMS["w"])
    lam = info.plan.damping
    expected = -jnp.linalg.solve(hessian + lam * jnp.eye(D), gradient)
    assert jnp.linalg.norm(moved - expected) < 0.15 * jnp.linalg.norm(expected)
    assert lam == pytest.approx(damping or float(jnp.linalg.norm(hessian, 2)), rel=0.2)


def test_noise_has_the_covariance_of_the_draw():
    """(C z / N)^2 A^{-1} M A^{-1} of (3), over keys; twice that would be rejected."""
    draws, infos = zip(*[drawn(epsilon=0.5, key=jax.random.key(i))[:2] for i in range(60)], strict=True)
    info = infos[0]
    covariance = (info.noise_std / len(PRIVATE["y"])) ** 2 * np.linalg.inv(curvature_of(info))
    covariance = covariance / float(info.preconditioner.scale)  # M is A over it
    centred = np.stack(draws) - np.mean(draws, axis=0)
    energy = np.sum(centred @ np.linalg.inv(covariance) * centred) / (D * (len(draws) - 1))
    assert 0.8 < energy < 1.25


@pytest.mark.parametrize("space", ["count_sketch", "gaussian", "leaf"])
def test_any_projection_will_do(space):
    made = {
        "count_sketch": lambda: subspace.count_sketch(KEY, PARAMS, 4),
        "gaussian": lambda: subspace.gaussian(KEY, PARAMS, 4),
        "leaf": lambda: subspace.full(PARAMS, where="w"),
    }[space]()
    moved, info, release = drawn(subspace=made)
    assert moved.shape == (made.dim,) and info.preconditioner.scale > 0
    assert np.all(np.isfinite(release.params["w"]))


def test_one_draw_has_one_round():
    with pytest.raises(ValueError, match="rounds=1 with one_draw, found 3"):
        drawn(rounds=3)
