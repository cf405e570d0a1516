import functools
import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import fine_tune, network, network_loss

import qexp_jax
from qexp_jax import NeighboringRelation, accuracy, clipping, plan, privacy, subspace
from qexp_jax.fine_tuning import one_pass, one_round, rounds, stages
from qexp_jax.mechanism import gaussian
from qexp_jax.privacy import certificate as certificates
from qexp_jax.quadratic import empirical_bayes, step_size
from qexp_jax.quadratic.components import decompose, scale

KEY = jax.random.key(17)
BUDGET = {"epsilon": 1.0, "delta": 1e-5}


def regression_loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def regression(n=600, d=3, noise=0.1):
    x = jax.random.normal(jax.random.key(1), (n, d))
    data = {"x": x, "y": x @ jnp.arange(1.0, d + 1) + noise * jax.random.normal(jax.random.key(2), (n,))}
    third = n // 3
    return {
        "public": jax.tree.map(lambda a: a[:third], data),
        "private": jax.tree.map(lambda a: a[third:], data),
    }


def tune(loss=regression_loss, params=None, key=KEY, **changes):
    arguments = regression() | BUDGET | changes
    return fine_tune(key, loss, {"w": jnp.ones(3)} if params is None else params, **arguments)


def test_the_private_model_is_better_than_the_pretrained_one():
    private = regression()["private"]

    def mean_loss(params):
        return jnp.mean(jax.vmap(regression_loss, in_axes=(None, 0))(params, private))

    assert mean_loss(tune().params) < 0.9 * mean_loss({"w": jnp.ones(3)})
    assert mean_loss(tune(epsilon=8.0).params) < 0.2 * mean_loss({"w": jnp.ones(3)})


def test_the_certificate_has_a_digest_of_the_public_records_that_the_plan_reads_and_of_no_others():
    data = regression(n=9600)
    public = jax.tree.map(np.asarray, data["public"])
    read = qexp_jax.plan.looked_at(jax.random.key(stages._PLAN_SEED), public)
    is_read = np.isin(public["y"], np.asarray(read["y"]))
    assert 0 < np.sum(~is_read) < 200

    def release(at=None, tilt=False, **changes):
        y = public["y"].copy()
        y[at] += 0.0 if at is None else 1.0
        found = tune(public=public | {"y": y}, private=data["private"], rounds=1, tilt=tilt, **changes)
        return found.params["w"], found.certificate["provenance"]["public_records_sha256"]

    w, digest = release()
    assert digest == certificates.sha256_of(read)
    unread, seen = release(np.argmin(is_read)), release(np.argmax(is_read))
    np.testing.assert_array_equal(unread[0], w)
    assert unread[1] == digest and seen[1] != digest
    assert release(public_unit_ids=np.arange(3200))[1] == certificates.sha256_of(public)
    assert release(tilt=True)[1] == certificates.sha256_of(public)  # it weights all of them


def test_where_there_is_nothing_but_noise_the_model_hardly_gets_worse():
    data = regression()
    truth = {"w": jnp.arange(1.0, 4.0)}

    def mean_loss(params):
        return float(jnp.mean(jax.vmap(regression_loss, in_axes=(None, 0))(params, data["private"])))

    losses = [mean_loss(tune(params=truth, key=jax.random.key(i), epsilon=0.1).params) for i in range(20)]
    root_mean_square = float(jnp.sqrt(jnp.mean(jax.vmap(regression_loss, (None, 0))(truth, data["private"]) ** 2)))
    assert np.mean(losses) - mean_loss(truth) < 0.02 * root_mean_square


def test_certificate_is_json_complete_and_rederives_the_budget():
    certificate = json.loads(json.dumps(tune(rounds=2).certificate))
    qexp_jax.verify(certificate)
    required = "epsilon delta mu neighboring_relation num_units noise_multiplier geometries subspace_dim rounds"
    assert set(required.split()) <= set(certificate)
    assert len(certificate["assumptions"]) >= 4 and certificate["num_units"] == 400
    np.testing.assert_allclose(privacy.epsilon_from_mu(certificate["mu"], 1e-5), 1.0, rtol=1e-9)
    assert certificate["rounds"] == 2
    mus = [1 / certificate["noise_multiplier"]] * 2
    np.testing.assert_allclose(privacy.compose(mus), certificate["mu"], rtol=1e-12)


def test_certificate_does_not_depend_on_private_values():
    private = regression()["private"]
    other = {"x": -3 * private["x"], "y": jnp.full_like(private["y"], jnp.nan)}
    assert tune().certificate == tune(private=other).certificate


def test_under_add_or_remove_nothing_but_the_draw_sees_the_true_number():
    relation = {"neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE, "public_count": 400}
    private = regression()["private"]
    fewer = jax.tree.map(lambda a: a[:-1], private)
    none = jax.tree.map(lambda a: a[:0], private)
    certificates = [tune(private=data, **relation).certificate for data in (private, fewer, none)]
    assert certificates[0] == certificates[1] == certificates[2]
    assert certificates[0]["num_units"] == 400


def test_diagnostics_are_apart_and_measure_the_excess():
    release, info = tune(diagnostics=True, rounds=1)
    assert release._fields == ("params", "certificate")
    assert info[0].noise_cost > 0 and info[0].clip_info.num_units == 400
    plan = info[0].plan
    step = scale(plan.estimate.directions, info[0].multiples, info[0].w)
    moved = subspace.displace(plan.subspace, {"w": jnp.ones(3)}, step)
    np.testing.assert_allclose(moved["w"], release.params["w"], rtol=1e-5)
    mean, degrees = accuracy.noise_cost(
        plan.estimate.curvature, info[0].multiples, plan.estimate.dims, noise_std=info[0].noise_std, num_units=400
    )
    assert one_round.predicted_cost(info[0]) == (mean, degrees)
    assert 0 < info[0].noise_cost < 20 * mean and 1 <= degrees <= 3


WIDE = 40


def wide_loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


TWO_SCALES = np.where(np.arange(WIDE) < 4, 1.0, 0.3)


def wide_data(slope, scales=TWO_SCALES):
    """Steep in four directions, shallow in 36; private records differ from public ones by `slope` in each."""
    x = jax.random.normal(jax.random.key(5), (1200, WIDE)) * scales
    y = x @ jnp.ones(WIDE) + jax.random.normal(jax.random.key(6), (1200,))
    public = {"x": x[:600], "y": y[:600]}
    return {"public": public, "private": {"x": x[600:], "y": y[600:] + slope * x[600:].sum(axis=1)}}


def wide_rounds(data, epsilon, rank=4, **options):
    options |= {"epsilon": epsilon, "delta": 1e-5, "precision_rank": rank, "diagnostics": True, "tilt": False}
    release, infos = fine_tune(KEY, wide_loss, {"w": jnp.ones(WIDE)}, **data, **options)
    return release, infos, [int(i.preconditioner.tuned[-1]) for i in infos]


def test_a_release_begins_in_the_leading_directions_and_tunes_all_under_a_heavy_shift_where_noise_lets_it():
    release, _, whole = wide_rounds(wide_data(0.0), epsilon=0.3)
    assert release.certificate["public_evidence"]["tuned_at_first"] == 4 and not any(whole)
    shifted, _, whole = wide_rounds(wide_data(3.0), epsilon=0.3)
    assert whole[0] == 0 and 0.2 < np.mean(whole) < 1
    assert shifted.certificate == release.certificate  # which is written before
    assert all(wide_rounds(wide_data(3.0), epsilon=8.0)[2])


def test_the_noise_of_each_round_is_that_of_its_own_geometrys_clip_norm():
    """A unit of huge gradient sits on the clip boundary of each round: together they spend the budget exactly."""
    data = wide_data(3.0)
    one = {"x": 100 * data["private"]["x"][:1], "y": jnp.array([1e4])}
    release, infos, whole = wide_rounds(data, epsilon=0.3)
    norms = {w: g["l2_clip_norm"] for w, g in zip((1, 0), release.certificate["geometries"], strict=True)}
    assert set(whole) == {0, 1} and norms[0] < 0.9 * norms[1]
    shares = [float(info.preconditioner.share) for info in infos]
    assert len(shares) == 80 and shares[0] == 1
    np.testing.assert_allclose(shares[10:], 0.7, rtol=1e-6)
    clipped_sum = jax.jit(functools.partial(clipping.clipped_sum, wide_loss))
    mus = []
    for info, is_whole, part in zip(infos, whole, shares, strict=True):
        total, counts = clipped_sum(
            {"w": jnp.ones(WIDE)}, info.plan.subspace, info.quadratic.precision, one,
            l2_clip_norm=part * norms[is_whole],
        )  # fmt: skip
        assert counts.num_clipped == 1
        mus.append(float(jnp.linalg.norm(total)) / info.noise_std)
    np.testing.assert_allclose(privacy.compose(mus), release.certificate["mu"], rtol=1e-4)


def spent(infos):
    """The sum over rounds of mu_t^2, from what noise each added in units of its clip norm."""
    return sum((float(i.preconditioner.l2_clip_norm) / i.noise_std) ** 2 for i in infos)


def test_under_a_heavy_shift_the_budget_left_is_split_over_more_rounds_and_spent_to_the_same_total():
    scales = np.geomspace(1, 0.03, WIDE)  # much is left to follow in shallow directions
    calm, few, _ = wide_rounds(wide_data(0.0, scales), epsilon=8.0, rank=30)
    shifted, many, _ = wide_rounds(wide_data(3.0, scales), epsilon=8.0, rank=30)
    assert calm.certificate == shifted.certificate
    assert len(few) == calm.certificate["rounds"] < len(many) == calm.certificate["most_rounds"]
    for infos in (few, many):
        np.testing.assert_allclose(spent(infos), calm.certificate["mu"] ** 2, rtol=1e-5)
    assert (
        many[0].noise_std / many[0].preconditioner.l2_clip_norm
        < many[-1].noise_std / many[-1].preconditioner.l2_clip_norm
    )


@pytest.mark.parametrize(("shift", "is_heavy"), [(0.004, False), (0.3, True)])
def test_a_round_takes_its_share_of_the_best_length_or_under_a_heavy_shift_the_best_step(shift, is_heavy):
    _, infos, _ = wide_rounds(wide_data(0.0), epsilon=8.0)
    made, quadratic = infos[0].plan, infos[0].quadratic
    estimate, num_units = made.estimate, quadratic.num_units
    preconditioner = jax.tree.map(lambda x: x[0], made.preconditioners)._replace(
        share=jnp.float32(1), bias=jnp.zeros(4)
    )
    state = rounds.start(made.subspace.layout, {"w": jnp.ones(WIDE)}, estimate, made.rounds)
    g = scale(estimate.directions, jnp.sqrt(shift * estimate.moments), jax.random.normal(KEY, (WIDE,)))
    noise_var = jnp.mean(g**2) / 4
    multiples, _ = one_round.follow(
        num_units * g, state, made.subspace, quadratic, num_units * noise_var**0.5, estimate, preconditioner, 8.0
    )
    posterior = step_size.observe(state.posterior, estimate, decompose(estimate.directions, g), noise_var)
    assert plan.is_heavy(posterior, estimate, num_units) == is_heavy
    signal = empirical_bayes.pooled_signal(posterior, estimate, num_units)
    share = step_size.best_length(signal, estimate, noise_var / 8, num_units, preconditioner.longest)[0] / 8
    step, _ = step_size.best_step(posterior, estimate, noise_var, num_units, preconditioner.longest / 8)
    expected, other = (
        step_size.advance(posterior, estimate, x, num_units)[0] for x in ((step, share) if is_heavy else (share, step))
    )
    np.testing.assert_allclose(multiples, expected, rtol=1e-4)
    assert jnp.all(jnp.abs(multiples / other - 1) > 0.05)


def test_what_clipping_adds_is_taken_off_a_release_before_it_is_followed():
    """Beside noise's own, the state and what is believed are those of a release without it."""
    _, infos, _ = wide_rounds(wide_data(0.0), epsilon=8.0)
    info, bias = infos[0], jnp.array([0.3, -0.2, 0.0, 0.1])
    state = rounds.start(info.plan.subspace.layout, {"w": jnp.ones(WIDE)}, info.plan.estimate, 8)
    noisy = info.quadratic.whitened_sum + 2.0

    def followed(noisy, bias):
        preconditioner = info.preconditioner._replace(bias=bias)
        return one_round.follow(
            noisy, state, info.plan.subspace, info.quadratic, 2.0, info.plan.estimate, preconditioner, 8.0
        )

    def draw(noisy, bias):
        plan, quadratic = info.plan, info.quadratic
        corrected = one_round._corrected(
            noisy, plan.subspace, quadratic.num_units, plan.estimate.directions, info.preconditioner._replace(bias=bias)
        )
        return gaussian.release_step(quadratic, corrected)

    expected = draw(noisy, jnp.zeros(4)), followed(noisy, jnp.zeros(4))[1]
    biased = noisy + info.quadratic.num_units * info.plan.estimate.directions.T @ bias
    found = draw(biased, bias), followed(biased, bias)[1]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    assert jnp.linalg.norm(draw(biased, jnp.zeros(4)) - expected[0]) > 0.1


def test_skewed_errors_pull_a_model_that_fits_six_times_as_far_where_nothing_is_taken_off(monkeypatch):
    """Errors of mean 0 and a long tail, which clipping cuts: what is left moves the intercept."""
    n = 3000
    x = jax.random.normal(jax.random.key(5), (2 * n, 5)).at[:, 0].set(1.0)
    y = x @ jnp.ones(5) + 3 * (jax.random.exponential(jax.random.key(6), (2 * n,)) - 1)
    data = {"public": {"x": x[:n], "y": y[:n]}, "private": {"x": x[n:], "y": y[n:]}}
    options = {"epsilon": 8.0, "delta": 1e-5, "l2_clip_norm": 6.0, "tilt": False}

    def intercept():
        return float(fine_tune(KEY, wide_loss, {"w": jnp.ones(5)}, **data, **options).params["w"][0])

    assert abs(intercept() - 1) < 0.1
    monkeypatch.setattr(
        "qexp_jax.quadratic.preconditioner._clipping_bias", lambda leading, *_: np.zeros(leading.shape[1])
    )
    assert intercept() < 0.6


def test_a_sum_of_gradients_that_are_all_clipped_is_followed_alike_whatever_the_share_of_the_clip_norm():
    """But for the noise, of which a half is left."""
    _, infos, _ = wide_rounds(wide_data(3.0), epsilon=8.0)
    info = infos[-1]
    whole, half = (info.preconditioner._replace(share=jnp.float32(x)) for x in (1.0, 0.5))
    state = rounds.start(info.plan.subspace.layout, {"w": jnp.ones(WIDE)}, info.plan.estimate, 8)
    total = info.quadratic.whitened_sum

    def followed(factor, preconditioner, noise_std):
        quadratic = info.quadratic._replace(whitened_sum=factor * total)
        noisy = factor * (total + jnp.ones_like(total))
        out = one_round.follow(
            noisy, state, info.plan.subspace, quadratic, noise_std, info.plan.estimate, preconditioner, 80.0
        )
        cost = one_round._measured_cost(noisy, quadratic, info.plan.subspace, info.plan.estimate, out[0])
        return out[0], cost, out[1].params["w"] - state.params["w"]

    multiples, cost, moved = followed(1.0, whole, 2.0)
    assert jnp.linalg.norm(moved) > 0 and cost > 0
    again = followed(0.5, half, 1.0)
    for found, expected in zip(again, (2 * multiples, cost, moved), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert jnp.linalg.norm(followed(0.5, whole, 1.0)[2] - moved) > 0.1 * jnp.linalg.norm(moved)


def test_a_hardened_release_spends_no_more_than_its_zcdp_when_it_splits():
    data = wide_data(3.0, np.geomspace(1, 0.03, WIDE))
    release, many, _ = wide_rounds(data, epsilon=8.0, rank=30, hardened=True)
    assert len(many) == release.certificate["most_rounds"]
    assert 0.999 < spent(many) / 2 / release.certificate["zcdp_rho"] <= 1 + 1e-6


def logistic_loss(params, record):
    z = record["x"] @ params["w"] + params["b"]
    return jnp.logaddexp(0.0, z) - record["y"] * z


def logistic_data(seed, moved):
    """60 features; the means of those 52 that vary least are `moved`."""
    x_key, y_key = jax.random.split(jax.random.key(seed))
    steep = jnp.arange(60) < 8
    x = jax.random.normal(x_key, (2000, 60)) * jnp.where(steep, 1.0, 0.3)
    y = jax.random.uniform(y_key, (2000,)) < jax.nn.sigmoid(x @ jnp.linspace(-2, 2, 60))
    return {"x": x + moved * (1.0 - steep), "y": y.astype(jnp.float32)}


@pytest.mark.parametrize(("rank", "moved"), [(8, 0.5), (128, 0.5), (8, 2.0), (128, 2.0)])
def test_steps_do_not_overshoot_where_the_means_of_features_moved(rank, moved):
    """There the private curvature is a hundred times the public one, in directions that public records hardly show.

    Rounds that measure their curvature in the leading directions alone end at .31 and .40 where features moved by .5;
    those that take the mean of the curvatures they met at 1.3 and 2.0 where they moved by 2.
    """

    def mean_loss(params, data):
        return jnp.mean(jax.vmap(logistic_loss, in_axes=(None, 0))(params, data))

    public, private, test = logistic_data(0, 0.0), logistic_data(1, moved), logistic_data(2, moved)
    descend = jax.jit(lambda p: jax.tree.map(lambda x, g: x - g, p, jax.grad(mean_loss)(p, public)))
    params = {"w": jnp.zeros(60), "b": jnp.zeros(())}
    for _ in range(300):
        params = descend(params)
    release = fine_tune(
        KEY, logistic_loss, params, public=public, private=private, epsilon=8.0, delta=1e-5, precision_rank=rank,
        tilt=False,
    )  # fmt: skip
    assert mean_loss(params, test) > 1
    assert mean_loss(release.params, test) < 0.28


class Stopped(Exception):
    """A preemption."""


def test_a_release_that_is_preempted_after_the_split_goes_on_with_the_same_bits(tmp_path):
    data, passes = wide_data(3.0, np.geomspace(1, 0.03, WIDE)), []

    def stop(stage):
        passes.append(stage == "private pass")
        if sum(passes) > 6:
            raise Stopped

    whole, infos, _ = wide_rounds(data, epsilon=8.0, rank=30)
    place = qexp_jax.Checkpoint(directory=tmp_path)
    with pytest.raises(Stopped):
        wide_rounds(data, epsilon=8.0, rank=30, checkpoint=place, progress=stop)
    resumed, rest, _ = wide_rounds(data, epsilon=8.0, rank=30, checkpoint=place)
    assert len(infos) == 80 and len(rest) == 74
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])


def test_rounds_that_are_given_are_kept_under_a_heavy_shift():
    data = wide_data(3.0, np.geomspace(1, 0.03, WIDE))
    release, infos, _ = wide_rounds(data, epsilon=8.0, rank=30, rounds=4)
    assert len(infos) == release.certificate["most_rounds"] == 4


@pytest.mark.parametrize(("rounds_planned", "most"), [(8, 80), (24, 80), (12, 13), (40, 40)])
def test_every_schedule_spends_the_budget_exactly(rounds_planned, most):
    assert rounds.schedule(rounds_planned, most, rounds_planned) == (rounds_planned, rounds_planned)
    for split in range(1, rounds_planned):
        last, of_rounds = rounds.schedule(rounds_planned, most, split)
        np.testing.assert_allclose(split / rounds_planned + (last - split) / of_rounds, 1, rtol=1e-12)


def test_progress_names_the_stages_and_changes_nothing():
    stages = []
    watched = tune(rounds=2, progress=stages.append)
    assert stages == ["public curvature", *["private pass", "draw"] * 2, "done"]
    np.testing.assert_array_equal(watched.params["w"], tune(rounds=2).params["w"])


def test_private_records_go_to_the_device_once(monkeypatch):
    seen = []
    exact_sum = one_pass.exact_sum

    def watched(options, linearisation, units, *args):
        seen.append(units.records["x"])
        return exact_sum(options, linearisation, units, *args)

    monkeypatch.setattr(one_pass, "exact_sum", watched)
    on_host = jax.tree.map(np.asarray, regression()["private"])
    released = tune(private=on_host, rounds=3)
    assert isinstance(seen[0], jax.Array) and all(x is seen[0] for x in seen) and len(seen) == 3
    np.testing.assert_array_equal(released.params["w"], tune(rounds=3).params["w"])


def test_a_release_repeats_with_its_key_and_changes_with_another():
    np.testing.assert_array_equal(tune().params["w"], tune().params["w"])
    assert not np.array_equal(tune().params["w"], tune(key=jax.random.key(18)).params["w"])


def test_repeated_calls_trace_the_loss_once_and_take_milliseconds():
    traces = []

    def loss(params, record):
        traces.append(0)
        return regression_loss(params, record)

    data, params = regression(), {"w": jnp.ones(3)}
    fine_tune(KEY, loss, params, **data, **BUDGET)
    before, start = len(traces), time.process_time()
    for seed in range(30):
        fine_tune(jax.random.key(seed), loss, params, **data, **BUDGET)
    assert len(traces) == before
    assert time.process_time() - start < 9  # 6 s, whatever runs beside it: 80 rounds each


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_keep_their_dtype_through_rounds(dtype):
    release = tune(params={"w": jnp.ones(3, dtype)}, rounds=2)
    reference = tune(params={"w": jnp.ones(3)}, rounds=2)
    assert release.params["w"].dtype == dtype
    np.testing.assert_allclose(release.params["w"].astype(jnp.float32), reference.params["w"], rtol=0.02)


def test_x64_changes_neither_the_setting_nor_the_certificate():
    plain = tune(rounds=2).certificate
    with jax.enable_x64(True):
        release = tune(params={"w": jnp.ones(3, jnp.float32)}, rounds=2)
        assert jax.config.jax_enable_x64
    assert release.params["w"].dtype == jnp.float32
    assert {k: release.certificate[k] for k in ("mu", "noise_multiplier", "num_units")} == {
        k: plain[k] for k in ("mu", "noise_multiplier", "num_units")
    }
    assert not jax.config.jax_enable_x64


def test_units_of_several_records_are_counted_and_clipped_as_one():
    ids = np.arange(400) // 4
    release, info = tune(unit_ids=ids, diagnostics=True)
    assert release.certificate["num_units"] == info[0].clip_info.num_units == 100
    capped = tune(unit_ids=ids, max_records_per_unit=2, public_unit_ids=np.arange(200) // 4)
    assert capped.certificate["num_units"] == 100


@pytest.mark.parametrize("make", [subspace.count_sketch, subspace.gaussian])
def test_a_given_subspace_is_used(make):
    params, data = network(KEY, 300)
    public, private = jax.tree.map(lambda a: a[:100], data), jax.tree.map(lambda a: a[100:], data)
    space = make(KEY, params, 7, where="layer")
    release = fine_tune(KEY, network_loss, params, public=public, private=private, subspace=space, **BUDGET)
    assert release.certificate["subspace_dim"] == 7
    np.testing.assert_array_equal(release.params["head"], params["head"])
    assert np.any(release.params["layer"]["w"] != params["layer"]["w"])


def test_all_parameters_are_tuned_unless_a_dimension_is_given():
    params = {"w": jnp.ones(700)}
    whole = tune(params=params, **regression(d=700)).certificate
    assert whole["subspace_dim"] == 700 and whole["precision_rank"] == 100
    few = tune(params=params, subspace_dim=5, **regression(d=700)).certificate
    assert few["subspace_dim"] == 5 and "top eigenspace" in few["subspace"]


def test_a_sketch_is_tuned_where_gradients_would_not_fit(monkeypatch):
    monkeypatch.setattr("qexp_jax.quadratic.tuned_space._GRADIENT_BYTES", 1000)
    monkeypatch.setattr("qexp_jax.quadratic.tuned_space._SKETCH_DIM", 20)
    certificate = tune(params={"w": jnp.ones(50)}, **regression(d=50)).certificate
    assert certificate["subspace"] == "count_sketch" and certificate["subspace_dim"] == 20


def test_rounds_are_the_same_for_all_budgets_and_the_total_privacy_stays():
    scale = jnp.geomspace(1.0, 0.03, 8)  # the low curvatures need a long flow, which only a large budget allows
    data = {name: part | {"x": part["x"] * scale} for name, part in regression(6000, d=8).items()}
    options = {"params": {"w": jnp.ones(8)}, "tilt": False}
    certificates = [tune(epsilon=e, **options, **data).certificate for e in (0.1, 1.0, 8.0)]
    rounds = [c["rounds"] for c in certificates]
    assert rounds == [12, 12, 12]
    for c, epsilon in zip(certificates, (0.1, 1.0, 8.0), strict=True):
        np.testing.assert_allclose(privacy.epsilon_from_mu(c["mu_per_round"] * c["rounds"] ** 0.5, 1e-5), epsilon)


def test_non_finite_private_records_neither_raise_nor_reach_the_release():
    private = regression()["private"]
    broken = private | {"y": private["y"].at[::7].set(jnp.nan)}
    assert np.all(np.isfinite(tune(private=broken).params["w"]))


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


def classes():
    x = jax.random.normal(KEY, (300, 3))
    data = {"x": x, "label": (x[:, 0] > 0).astype(int)}
    return {"public": jax.tree.map(lambda a: a[:100], data), "private": jax.tree.map(lambda a: a[100:], data)}


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def test_flax_linen_models_work_unchanged():
    model = Classifier()
    params = model.init(KEY, jnp.zeros(3))
    release = fine_tune(
        KEY, lambda p, r: cross_entropy(model.apply(p, r["x"]), r["label"]), params, **classes(), **BUDGET
    )
    assert jax.tree.structure(release.params) == jax.tree.structure(params)


def test_flax_nnx_models_work_unchanged():
    graph, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    release = fine_tune(
        KEY,
        lambda p, r: cross_entropy(nnx.merge(graph, p)(r["x"]), r["label"]),
        params,
        **classes(),
        **BUDGET,
    )
    assert jax.tree.structure(release.params) == jax.tree.structure(params)
    assert nnx.merge(graph, release.params)(jnp.ones(3)).shape == (2,)


def impure(state=[0.0]):  # noqa: B006
    def loss(params, record):
        state[0] += 1.0
        return regression_loss(params, record) + state[0]

    return loss


def printing(params, record):
    jax.debug.print("{}", record["y"])
    return regression_loss(params, record)


def collective(params, record):
    return jax.lax.pmean(regression_loss(params, record), "data")


EMPTY = jax.tree.map(lambda a: a[:0], regression()["private"])
BAD = {
    "epsilon": ({"epsilon": 0.0}, "epsilon=0.0"),
    "delta": ({"delta": 1.0}, "delta=1.0"),
    "empty private": ({"private": EMPTY}, "at least one private record"),
    "empty public": ({"public": EMPTY}, "at least one public record"),
    "axes": ({"private": {"x": jnp.ones((4, 3)), "y": jnp.ones(5)}}, r"\(4, 3\), \(5,\)"),
    "integer leaf": ({"params": {"w": jnp.ones(3, int)}}, "int32"),
    "k > d": ({"subspace_dim": 4}, r"\[1, 3\], found 4"),
    "k < 1": ({"subspace_dim": 0}, r"\[1, 3\], found 0"),
    "vector loss": ({"loss": lambda p, r: p["w"] * r["x"]}, "scalar"),
    "impure": ({"loss": impure()}, "pure"),
    "callback": ({"loss": printing}, "pure"),
    "collective": ({"loss": collective}, "collective"),
    "public NaN": (
        {"public": {"x": jnp.full((9, 3), jnp.nan), "y": jnp.ones(9)}},
        r"found nan in leaf \['x'\]",
    ),
    "parameter inf": ({"params": {"w": jnp.array([1.0, jnp.inf, 1.0])}}, "found inf"),
    "no gradient": ({"loss": lambda p, r: 0.0 * (p["w"] @ r["x"])}, "vanish"),
    "no curvature": ({"loss": lambda p, r: p["w"] @ r["x"]}, "vanish"),
    "seed": ({"key": 0}, "typed key"),
    "legacy key": ({"key": jax.random.PRNGKey(0)}, "typed key"),
    "rounds": ({"rounds": 0}, "found 0"),
    "public count": ({"neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE}, "public_count"),
    "both": ({"subspace": subspace.full({"w": jnp.ones(3)}), "subspace_dim": 2}, "not both"),
    "other params": ({"subspace": subspace.full({"w": jnp.ones(4)})}, r"\(\(4,\),\), found \(\(3,\),\)"),
    "damping": ({"damping": -1.0}, "found -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_value_before_private_data_is_read(case, monkeypatch):
    changes, message = BAD[case]

    def never(*args, **kwargs):
        raise AssertionError("private data was read")

    monkeypatch.setattr("qexp_jax.fine_tuning.one_pass.exact_sum", never)
    with pytest.raises(ValueError, match=message):
        tune(**changes)
