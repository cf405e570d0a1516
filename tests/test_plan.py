import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qexp_jax
from qexp_jax import finetune, gradients, plan, subspace, survey

KEY = jax.random.key(23)
D = 60


def loss_fn(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def public(n=400):
    """Records whose variance is a tenth in directions 8 and beyond."""
    x = jax.random.normal(jax.random.key(1), (n, D)) * jnp.where(jnp.arange(D) < 8, 1.0, 0.3)
    return {"x": x, "y": x @ jnp.linspace(-1, 1, D) + jax.random.normal(jax.random.key(2), (n,))}


PARAMS = {"w": jnp.linspace(-1, 1, D)}


def surveyed(rank=8):
    records = public()
    keys = jax.random.split(KEY, 3)
    return survey.survey(keys, loss_fn, PARAMS, records, loss_fn, records, precision_rank=rank)


def planned(noise_multiplier, **changes):
    records = public()
    settings = {"num_units": 1000, "noise_multiplier": noise_multiplier, "precision_rank": 8} | changes
    return plan.make_plan(KEY, loss_fn, PARAMS, records, loss_fn, records, **settings)


def test_the_leading_directions_alone_are_surveyed_as_what_gradients_have_in_them():
    whole = surveyed()
    leading = survey.leading_alone(whole)
    few = jax.tree.map(lambda a: a[:100], whole.tried)
    projected = gradients.projected_gradients(loss_fn, PARAMS, leading.subspace, few)
    np.testing.assert_allclose(leading.squares[:100, :-1], projected**2, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(leading.squares @ leading.dims, np.sum(whole.squares[:, :-1], axis=1), rtol=1e-6)
    np.testing.assert_allclose(leading.curvature[:-1], whole.curvature[:-1])
    np.testing.assert_allclose(subspace.gram(leading.subspace), np.eye(8), atol=1e-5)


def test_the_leading_directions_are_the_steep_ones_and_the_others_are_as_curved_as_they_are():
    """The Hessian is the mean of x x^T: 1 in eight directions, .09 in the others."""
    whole = surveyed()
    np.testing.assert_allclose(whole.curvature[:-1], 1, rtol=0.5)
    assert whole.curvature[-1] == pytest.approx(0.09, rel=0.3) and whole.dims[-1] == D - 8
    inside = np.linalg.norm(np.asarray(whole.directions)[:, :8], axis=1)
    assert np.all(inside > 0.8)


def test_all_parameters_are_tuned_where_the_budget_allows_it_and_the_leading_directions_elsewhere():
    plans = [planned(z) for z in (1000.0, 100.0, 10.0, 1.0, 0.1)]
    dims = [p.subspace.dim for p in plans]
    assert dims[0] == 8 and dims[-1] == D and dims == sorted(dims)
    for p in plans:
        everything, leading = p.evidence["expected_gain_all"], p.evidence["expected_gain_leading"]
        assert (p.subspace.dim == D) == (everything > leading) and everything >= 0
    assert plans[0].l2_clip_norm < plans[-1].l2_clip_norm
    assert plans[0].precision.dim == 8 and plans[0].spectrum.directions.shape == (8, 8)


def test_a_given_space_is_not_chosen_again():
    given = planned(1000.0, subspace=subspace.full(PARAMS))
    assert given.subspace.dim == D and "expected_gain_all" not in given.evidence
    assert planned(1000.0, subspace_dim=5).subspace.dim == 5


def test_a_release_in_the_leading_directions_moves_nothing_else(monkeypatch):
    monkeypatch.setattr(finetune, "_PLAN_SEED", 1)  # a sample by which little noise calls for the leading ones
    records = public()
    release, infos = qexp_jax.fine_tune(
        KEY, loss_fn, PARAMS, public=records, private=records, epsilon=0.1, delta=1e-5, precision_rank=8,
        diagnostics=True,
    )  # fmt: skip
    space = infos[0].plan.subspace
    assert release.certificate["subspace_dim"] == 8 and "top eigenspace" in release.certificate["subspace"]
    moved = jax.tree.map(jnp.subtract, release.params, PARAMS)
    inside = subspace.lift(space, subspace.project(space, moved))["w"]
    assert np.linalg.norm(moved["w"]) > 0
    np.testing.assert_allclose(inside, moved["w"], atol=1e-5 * float(jnp.linalg.norm(moved["w"])) + 1e-6)
    qexp_jax.verify(release.certificate)


def test_the_rounds_grow_with_the_length_up_to_their_bounds():
    assert [plan._rounds(length) for length in (0.0, 3.0, 9.5, 20.0, 24.0, 30.0, 47.5, 1e9)] == [
        8, 8, 10, 12, 12, 15, 24, 24
    ]  # fmt: skip
