import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import clipping, plan, subspace
from qexp_jax.quadratic import public_curvature, step_size
from qexp_jax.quadratic.components import decompose
from qexp_jax.quadratic.posterior import before_release

KEY = jax.random.key(23)
D = 60


def loss_fn(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def public(n=400):
    """Records whose variance is a tenth in directions 8 and beyond."""
    x = jax.random.normal(jax.random.key(1), (n, D)) * jnp.where(jnp.arange(D) < 8, 1.0, 0.3)
    return {"x": x, "y": x @ jnp.linspace(-1, 1, D) + jax.random.normal(jax.random.key(2), (n,))}


PARAMS = {"w": jnp.linspace(-1, 1, D)}


def measured(rank=8):
    records = public()
    keys = jax.random.split(KEY, 3)
    return public_curvature.measure(keys, loss_fn, PARAMS, records, loss_fn, records, precision_rank=rank)


def planned(noise_multiplier, records=None, **changes):
    records = public() if records is None else records
    settings = {"num_units": 1000, "noise_multiplier": noise_multiplier, "precision_rank": 8} | changes
    return plan.make_plan(KEY, loss_fn, PARAMS, records, loss_fn, records, **settings)


def test_the_leading_directions_are_the_steep_ones_and_the_others_are_as_curved_as_they_are():
    """The Hessian is the mean of x x^T: 1 in eight directions, .09 in the others."""
    whole = measured()
    np.testing.assert_allclose(whole.curvature[:-1], 1, rtol=0.5)
    assert whole.curvature[-1] == pytest.approx(0.09, rel=0.3) and whole.dims[-1] == D - 8
    inside = np.linalg.norm(np.asarray(whole.directions)[:, :8], axis=1)
    assert np.all(inside > 0.8)


def test_surveyed_gradients_are_those_of_each_record_and_the_rest_is_what_the_directions_leave():
    whole, records = measured(), public(75)  # not a multiple of the microbatch
    each = np.asarray(jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(PARAMS, records)["w"])
    basis = np.asarray(whole.directions)
    leading, totals, moved = public_curvature._gradients(loss_fn, PARAMS, whole.subspace, whole.directions, records)
    squares = public_curvature._squares(leading, totals, D - 8)
    np.testing.assert_array_equal(np.concatenate(moved), np.any(each != 0, axis=0))
    np.testing.assert_allclose(leading, each @ basis.T, atol=1e-4)
    np.testing.assert_allclose(squares[:, :-1], leading**2)
    outside = each - each @ basis.T @ basis
    np.testing.assert_allclose(squares[:, -1], np.mean(outside**2, axis=1) * D / (D - 8), rtol=1e-4, atol=1e-6)


def test_all_parameters_are_tuned_unless_another_space_is_given():
    assert planned(100.0).subspace.dim == D and planned(100.0).estimate.directions.shape == (8, D)
    assert planned(100.0, subspace=subspace.full(PARAMS, where="w")).subspace.dim == D
    assert planned(100.0, subspace_dim=5).subspace.dim == 5


def test_the_rounds_are_those_of_the_rule_or_given_whatever_the_shift():
    assert [(made.rounds, made.most_rounds) for made in (planned(100.0), planned(0.3), planned(0.3, rounds=3))] == [
        (12, 80), (12, 80), (3, 3)
    ]  # fmt: skip


def test_the_others_are_held_by_an_infinite_precision_with_a_clip_norm_of_its_own():
    made = planned(100.0)
    whole, leading = (jax.tree.map(lambda x, i=i: x[i], made.preconditioners) for i in (0, 1))
    np.testing.assert_array_equal(leading.tuned, jnp.arange(9) < 8)
    assert jnp.all(whole.tuned == 1) and leading.l2_clip_norm < whole.l2_clip_norm
    held = plan.precision_of(made.estimate.directions, leading)
    kept = plan.precision_of(made.estimate.directions, whole)
    records = public()
    sums = [
        clipping.clipped_sum(loss_fn, PARAMS, made.subspace, precision, records, l2_clip_norm=1e3)[0]
        for precision in (held, kept)
    ]
    inside = made.estimate.directions.T @ (made.estimate.directions @ sums[1])
    np.testing.assert_allclose(sums[0], inside, atol=1e-3 * float(jnp.linalg.norm(inside)))
    assert jnp.linalg.norm(sums[1] - inside) > 0.1 * jnp.linalg.norm(inside)


def test_the_clip_norm_is_a_quantile_of_public_norms():
    fractions = [planned(z).evidence["public_fraction_clipped"] for z in (100.0, 0.3)]
    np.testing.assert_allclose(fractions, 0.05, atol=0.01)
    for made in (planned(100.0, l2_clip_norm=2.5), planned(0.3, l2_clip_norm=2.5)):
        np.testing.assert_array_equal(made.preconditioners.l2_clip_norm, 2.5)


def test_a_space_of_leading_directions_alone_has_one_geometry():
    assert len(planned(100.0, subspace_dim=5).preconditioners.l2_clip_norm) == 1
    assert len(planned(100.0).preconditioners.l2_clip_norm) == 2


def skewed(n=400):
    records = public(n)
    noise = jax.random.exponential(jax.random.key(2), records["y"].shape) - 1
    records["y"] = records["x"] @ PARAMS["w"] + noise
    records["x"] = records["x"].at[:, 0].set(1.0)  # an intercept, whose gradient is the skewed noise
    return records


def test_what_clipping_adds_to_the_mean_gradient_of_skewed_records_is_found_in_each_geometry():
    """Against the sums of all public records, clipped and whole; the plan sees two thousand of them."""
    records = skewed(8000)
    made = planned(300.0, records)
    for i, (clip_norm, bias) in enumerate(
        zip(made.preconditioners.l2_clip_norm, made.preconditioners.bias, strict=True)
    ):
        preconditioner = jax.tree.map(lambda x, i=i: x[i], made.preconditioners)
        precision = plan.precision_of(made.estimate.directions, preconditioner)
        clipped, whole = (
            made.estimate.directions
            @ clipping.clipped_sum(loss_fn, PARAMS, made.subspace, precision, records, l2_clip_norm=c)[0]
            for c in (clip_norm, 1e2)
        )
        expected = (clipped - whole) / 8000
        np.testing.assert_allclose(bias, expected, atol=0.4 * float(jnp.linalg.norm(expected)), err_msg=str(i))


def leading_gradient(estimate, shift):
    return estimate.directions.T @ (jax.random.normal(KEY, (8,)) * jnp.sqrt(shift * estimate.moments[:-1]))


@pytest.mark.parametrize(
    ("shift", "tuned", "noise_multiplier"),
    [(0.0, 8, 10.0), (1e-3, 8, 10.0), (0.5, D, 10.0), (0.2, D, 10.0), (2.0, D, 30.0)],
)
def test_the_releases_choose_the_leading_directions_for_a_small_shift_and_all_for_a_heavy_one(
    shift, tuned, noise_multiplier
):
    """In the last two of a heavy shift the leading directions have the least expected excess."""
    made, num_units = planned(noise_multiplier), 1000
    estimate, seen = made.estimate, made.preconditioners.tuned[1]
    assert made.evidence["tuned_at_first"] == 8
    noise_var = (made.preconditioners.l2_clip_norm[1] * noise_multiplier / num_units) ** 2
    g = leading_gradient(estimate, shift)
    posterior = step_size.observe(
        before_release(estimate), estimate, decompose(estimate.directions, g), noise_var, seen
    )
    preconditioner = plan.choose(
        posterior, estimate, made.preconditioners, noise_multiplier, num_units, 80.0
    ).preconditioner
    assert jnp.vdot(preconditioner.tuned, estimate.dims) == tuned
    heavy = tuned == D
    assert plan.is_heavy(posterior, estimate, num_units) == heavy
    planned_one = jax.tree.map(lambda x: x[0 if heavy else 1], made.preconditioners)
    np.testing.assert_allclose(preconditioner.longest, planned_one.longest * (2 if heavy else 1), rtol=1e-6)
    share = 0.7 if heavy else 1
    np.testing.assert_allclose(preconditioner.share, share, rtol=1e-6)
    np.testing.assert_allclose(preconditioner.l2_clip_norm, share * planned_one.l2_clip_norm, rtol=1e-6)
    np.testing.assert_array_equal(preconditioner.bias, 0 if heavy else planned_one.bias)


@pytest.mark.parametrize(
    ("seen_in_others", "looked", "held", "tuned"),
    [(0.0, 17, 8, 8), (0.0, 17, 9, D), (0.0, 0, np.inf, D), (0.5, 17, 8, D), (3.0, 17, 8, D)],
)
def test_under_a_heavy_shift_all_are_tuned_where_it_pays_and_in_one_round_of_ten(seen_in_others, looked, held, tuned):
    """Of 80 rounds so far `looked` tuned all and the last `held` did not; the recent show in the others so many times
    the noise's energy.

    At .5 a step of all is expected to lower the loss, by less than a tenth of what one of the leading directions does.
    """
    made, num_units = planned(3.0), 1000
    estimate = made.estimate
    leading = leading_gradient(estimate, 0.5)
    others = jax.random.normal(jax.random.key(5), (D,))
    others = others - estimate.directions.T @ (estimate.directions @ others)
    posterior = step_size.observe(
        before_release(estimate), estimate, decompose(estimate.directions, leading), 1e-4, made.preconditioners.tuned[1]
    )
    recent_var = 0.5 * jnp.vdot(leading, leading) / (D - 8)
    recent = 0.5 * leading + jnp.sqrt(seen_in_others * recent_var) * others
    times, idle = jnp.full(9, 80.0).at[-1].set(looked), jnp.zeros(9).at[-1].set(held)
    recent = decompose(estimate.directions, recent)
    posterior = posterior._replace(recent=recent, recent_var=jnp.full(9, recent_var), times=times, idle=idle)
    assert plan.is_heavy(posterior, estimate, num_units)
    preconditioner = plan.choose(posterior, estimate, made.preconditioners, 3.0, num_units, 80.0).preconditioner
    assert jnp.vdot(preconditioner.tuned, estimate.dims) == tuned
    np.testing.assert_allclose(preconditioner.longest, 2 * made.preconditioners.longest[int(tuned == 8)])
