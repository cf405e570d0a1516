"""Published relatives of DP-SGD, each where its result is known: most of them are DP-SGD in a limit."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant

from experiments.baselines import dp_sgd, preconditioning, public_gradients, recipes, selection
from experiments.baselines.adapters import ADAPTERS
from experiments.baselines.dp_sgd import Settings
from experiments.benchmark import models

BUDGET = {"epsilon": 1.0, "delta": 1e-5}
DESCENT = Settings(sampling_prob=0.5, steps=4, length=4.0, l2_clip_norm=0.3)


def records(count, shape=(3,), outputs=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, max(2, outputs), count).astype(np.int32)}


@functools.lru_cache
def start(name, shape=(3,), outputs=1):
    """Model, parameters, private and public records."""
    private = records(40, shape, outputs)
    model = models.make_model(name, outputs)
    params = jax.jit(model.module.init)(jax.random.key(0), private["x"][0])
    return model, params, private, records(64, shape, outputs, seed=1)


@pytest.fixture(autouse=True)
def noise_multiplier(monkeypatch):
    """Calibration takes seconds, and has tests of its own; returns it."""
    calibrated = dp_sgd.noise_multiplier
    monkeypatch.setattr(dp_sgd, "noise_multiplier", lambda *budget: 0.7)
    return calibrated


def quiet(monkeypatch):
    monkeypatch.setattr(dp_sgd, "noise_multiplier", lambda *budget: 0.0)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def distance(a, b):
    return math.sqrt(sum(float(np.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


def flat_difference(a, b):
    return ADAPTERS["all"].split(None, jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b))[0]


def dense_gradients(loss_fn, params, public):
    """Rows (n, ...) of each leaf."""
    gradients = jax.jit(jax.vmap(jax.grad(loss_fn), in_axes=(None, 0)))(params, public)
    return {path: np.asarray(g, np.float64) for path, g in ADAPTERS["all"].split(None, gradients)[0].items()}


def unscaled(params):
    """The matrix that is the identity, with blocks for the first layer."""
    flat = {path: np.ones_like(leaf) for path, leaf in dp_sgd.ADAPTERS["all"].split(None, params)[0].items()}
    layer = ("params", "Dense_0")
    kernel, bias = flat.pop((*layer, "kernel")), flat.pop((*layer, "bias"))
    return preconditioning.Scaling(
        {layer: np.eye(len(kernel) + 1, dtype=np.float32)}, {layer: np.eye(len(bias), dtype=np.float32)}, flat
    )


# Limits.


def test_identity_is_dp_sgd(monkeypatch):
    """AdaDPS is DP-SGD to the bit where the public matrix is the identity, KFAC up to the rounding of its products."""
    model, params, private, public = start("mlp")
    plain = dp_sgd.train(0, model.loss_fn, params, private, settings=DESCENT, **BUDGET)
    for name in ("second_moments", "kfac_blocks"):
        monkeypatch.setattr(preconditioning, name, lambda *public: unscaled(params))
    settings = preconditioning.Preconditioned(DESCENT, 1.0)
    methods = (preconditioning.adadps, preconditioning.public_kfac)
    same, close = (run(0, model.loss_fn, params, private, public, settings=settings, **BUDGET) for run in methods)
    assert_same(same, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), close, plain)


def test_a_record_is_scaled_by_vectors():
    """The gradient of a record is a g^T in each dense layer, and zero where nothing reaches its outputs."""
    model, params, private, public = start("mlp")
    scaling = preconditioning.kfac_blocks(model.loss_fn, params, public, 0.1)
    gradients = dense_gradients(model.loss_fn, params, private)
    for index in range(3):
        gradient = {path: jnp.asarray(g[index], jnp.float32) for path, g in gradients.items()}
        fast, slow = preconditioning.scaled_record(gradient, scaling), preconditioning.scaled(gradient, scaling)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), fast, slow)
    nothing = jax.tree.map(jnp.zeros_like, gradient)
    assert_same(preconditioning.scaled_record(nothing, scaling), nothing)


@pytest.mark.parametrize("scaling", [preconditioning.kfac_blocks, preconditioning.second_moments])
def test_damping_tends_to_identity(scaling):
    model, params, _, public = start("mlp")
    gradient = ADAPTERS["all"].split(None, jax.tree.map(jnp.ones_like, params))[0]
    same = preconditioning.scaled(gradient, scaling(model.loss_fn, params, public, 1e8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), same, gradient)
    other = preconditioning.scaled(gradient, scaling(model.loss_fn, params, public, 1e-2))
    assert distance(other, gradient) > 1


def test_private_weight_is_dp_sgd():
    """Mixing with weight 1, and a mirror map of infinite horizon, are DP-SGD to the bit."""
    model, params, private, public = start("mlp")
    plain = dp_sgd.train(0, model.loss_fn, params, private, settings=DESCENT, **BUDGET)
    method = functools.partial(public_gradients.mixed_gradients, 0, model.loss_fn, params, private, public, **BUDGET)
    assert_same(method(settings=public_gradients.Mixing(DESCENT, 1.0)), plain)
    assert distance(method(settings=public_gradients.Mixing(DESCENT, 0.5)), plain) > 1e-3
    mirror = public_gradients.Mirror(DESCENT, math.inf)
    assert_same(
        public_gradients.mirror_descent(0, model.loss_fn, params, private, public, settings=mirror, **BUDGET), plain
    )


def test_public_weight_is_public_descent(monkeypatch):
    """Mixing with weight 0 on all public records is gradient descent on them, at rate length / steps / C."""
    quiet(monkeypatch)
    model, params, private, public = start("mlp")
    found = public_gradients.mixed_gradients(
        0, model.loss_fn, params, private, public, settings=public_gradients.Mixing(DESCENT, 0.0), **BUDGET
    )
    for _ in range(DESCENT.steps):
        gradient = jax.tree.map(lambda g: g.mean(0), jax.vmap(jax.grad(model.loss_fn), (None, 0))(params, public))
        params = jax.tree.map(lambda p, g: p - 1.0 / DESCENT.l2_clip_norm * g, params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, params)


def test_cosine_schedule():
    settings = public_gradients.Mirror(DESCENT, 2.0)
    weights = [public_gradients.cosine_weight(settings, step) for step in (0, 4, 8)]
    np.testing.assert_allclose(weights, [1, math.sqrt(0.5), 0], atol=1e-12)


def test_zero_centre_is_dp_sgd(monkeypatch):
    model, params, private, public = start("mlp")
    plain = dp_sgd.train(0, model.loss_fn, params, private, settings=DESCENT, **BUDGET)
    method = functools.partial(
        public_gradients.dope_sgd, 0, model.loss_fn, params, private, public,
        settings=public_gradients.Centred(DESCENT), **BUDGET,
    )  # fmt: skip
    assert distance(method(), plain) > 1e-3
    monkeypatch.setattr(
        public_gradients, "_mean_gradient", lambda trainable, batch, loss_fn: jax.tree.map(jnp.zeros_like, trainable)
    )
    assert_same(method(), plain)


def test_centre_is_added_once(monkeypatch):
    """Where all differences are zero, a step is along the public gradient, whatever the size of the sample."""
    quiet(monkeypatch)
    model, params, private, _ = start("linear")
    one = {name: np.repeat(values[:1], 40, axis=0) for name, values in private.items()}
    settings = public_gradients.Centred(DESCENT._replace(steps=1, length=1.0, l2_clip_norm=2.0))
    gradient = jax.grad(model.loss_fn)(params, {name: values[0] for name, values in one.items()})
    for seed in range(3):
        found = public_gradients.dope_sgd(seed, model.loss_fn, params, one, one, settings=settings, **BUDGET)
        expected = jax.tree.map(lambda p, g: p - g / 2, params, gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_recipe_averages(monkeypatch):
    """The published recipe is the average, by hand, of DP-SGD's iterates; no decay is DP-SGD."""
    model, params, private, _ = start("linear")
    collected = []
    dp_sgd.train(
        0, model.loss_fn, params, private, settings=DESCENT, **BUDGET,
        summary=lambda iterates: [collected.append(iterate) for iterate in iterates] and collected[-1],
    )  # fmt: skip
    assert len(collected) == DESCENT.steps
    mean = collected[0]
    for step in (1, 2, 3):
        weight = min(0.25, (step + 1) / (step + 10))
        mean = {path: weight * mean[path] + (1 - weight) * collected[step][path] for path in mean}
    method = functools.partial(recipes.published_recipe, 0, model.loss_fn, params, private, **BUDGET)
    found = ADAPTERS["all"].split(None, method(recipe=recipes.Recipe(DESCENT, 0.25)))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, mean)
    plain = dp_sgd.train(0, model.loss_fn, params, private, settings=DESCENT, **BUDGET)
    assert_same(method(recipe=recipes.Recipe(DESCENT, 0.0)), plain)


def test_the_recipe_is_the_published_one():
    settings = recipes.Recipe().descent
    assert settings.length / settings.steps == 1
    assert settings.steps == 250 and settings.l2_clip_norm == 1
    assert settings.sampling_prob == pytest.approx(16384 / 50000, abs=0.01)


def test_automatic_clipping_normalises(monkeypatch):
    """A full-batch step is along the mean of g / (|g| + gamma)."""
    quiet(monkeypatch)
    model, params, private, _ = start("mlp")
    recipe = recipes.Recipe(Settings(1.0, 1, 1.0, 7.0), 0.0)
    found = recipes.automatic_clipping(0, model.loss_fn, params, private, recipe=recipe, gamma=0.5, **BUDGET)
    gradients = dense_gradients(model.loss_fn, params, private)
    norms = np.sqrt(sum((g.reshape(40, -1) ** 2).sum(1) for g in gradients.values()))
    for path, moved in flat_difference(params, found).items():
        step = np.tensordot(1 / (norms + 0.5), gradients[path], axes=1) / 40
        np.testing.assert_allclose(moved, step, atol=1e-6)


# Public moments against dense ones.


def test_factors_of_one_record_are_its_fisher():
    """For one record A (x) G is g g^T, of kernel and bias together."""
    model, params, _, public = start("mlp")
    one = {name: values[:1] for name, values in public.items()}
    found = preconditioning.moments(model.loss_fn, params, one)
    gradients = dense_gradients(model.loss_fn, params, one)
    assert set(found.inputs) == {("params", "Dense_0"), ("params", "head")}
    for layer in found.inputs:
        stacked = np.concatenate([gradients[*layer, "kernel"][0], gradients[*layer, "bias"]])
        fisher = np.outer(stacked.ravel(), stacked.ravel())
        np.testing.assert_allclose(np.kron(found.inputs[layer], found.outputs[layer]), fisher, atol=1e-5)


def test_factors_of_independent_ones_are_the_fisher():
    """Records with every pair of an input and a label have independent factors where the logit is constant."""
    model, params, _, _ = start("linear")
    params = jax.tree.map(jnp.zeros_like, params)
    inputs = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    public = {"x": np.repeat(inputs, 2, axis=0), "label": np.tile(np.array([0, 1], np.int32), 5)}
    found = preconditioning.moments(model.loss_fn, params, public)
    gradients = dense_gradients(model.loss_fn, params, public)
    layer = ("params", "head")
    rows = np.concatenate([gradients[*layer, "kernel"][..., 0], gradients[*layer, "bias"]], axis=1)
    np.testing.assert_allclose(
        np.kron(found.inputs[layer], found.outputs[layer]), rows.T @ rows / len(rows), atol=1e-6
    )  # fmt: skip


def test_blocks_are_inverse_roots():
    """Twice the matrix of a layer, on a gradient, solves the damped dense block up to the scalar."""
    model, params, _, public = start("linear", outputs=4)
    damping = 0.3
    found = preconditioning.moments(model.loss_fn, params, public)
    layer = ("params", "head")
    a, g = found.inputs[layer], found.outputs[layer]
    typical = np.trace(a) * np.trace(g) / (len(a) * len(g))
    ratio = math.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    squares = np.concatenate([x.ravel() for x in found.squares.values()]).mean()
    strength = math.sqrt(damping * squares)
    block = np.kron(a + ratio * strength * np.eye(len(a)), g + strength / ratio * np.eye(len(g)))
    gradient = {path: np.asarray(leaf) for path, leaf in ADAPTERS["all"].split(None, params)[0].items()}
    scaling = preconditioning.kfac_blocks(model.loss_fn, params, public, damping)
    twice = preconditioning.scaled(preconditioning.scaled(gradient, scaling), scaling)
    stacked = np.concatenate([gradient[*layer, "kernel"], gradient[*layer, "bias"][None]])
    solved = squares * (1 + damping) * np.linalg.solve(block, stacked.ravel()).reshape(stacked.shape)
    np.testing.assert_allclose(twice[*layer, "kernel"], solved[:-1], rtol=1e-3, atol=1e-5)
    assert typical == pytest.approx(squares, rel=0.5)  # the scalar is of the Kronecker blocks' size too


@pytest.mark.parametrize("name", ["cnn", "gru"])
def test_other_leaves_have_a_diagonal(name):
    """Convolutions and a recurrent cell are scaled by their second moments; dense layers around them have blocks."""
    model, params, _, public = start(name, {"cnn": (9, 9), "gru": (4, 2)}[name])
    scaling = preconditioning.kfac_blocks(model.loss_fn, params, public, 0.5)
    dense = {"cnn": {"Dense_0", "head"}, "gru": {"head"}}[name]
    assert {layer[-1] for layer in scaling.inputs} == dense
    gradients = dense_gradients(model.loss_fn, params, public)
    assert set(scaling.diagonal) == {path for path in gradients if path[1] not in dense}
    squares = {path: (g**2).mean(0) for path, g in gradients.items()}
    typical = np.concatenate([x.ravel() for x in squares.values()]).mean()
    for path, factor in scaling.diagonal.items():
        np.testing.assert_allclose(factor, np.sqrt(1.5 / (squares[path] / typical + 0.5)), rtol=1e-4)


def test_a_layer_called_twice_has_no_block():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            return nn.Dense(1, name="head")(dense(dense(x)))

    _, _, _, public = start("linear")
    params = Twice().init(jax.random.key(0), public["x"][0])

    def loss_fn(params, record):
        return models.cross_entropy(Twice().apply(params, record["x"]), record["label"])

    assert set(preconditioning.moments(loss_fn, params, public).inputs) == {("params", "head")}


def test_adadps_divides_by_second_moments():
    model, params, _, public = start("mlp")
    scaling = preconditioning.second_moments(model.loss_fn, params, public, 0.1)
    roots = {path: np.sqrt((g**2).mean(0)) for path, g in dense_gradients(model.loss_fn, params, public).items()}
    typical = math.sqrt(np.concatenate([x.ravel() ** 2 for x in roots.values()]).mean())
    for path, root in roots.items():
        np.testing.assert_allclose(scaling.diagonal[path], 1.1 / (root / typical + 0.1), rtol=1e-4)


def test_moments_are_means_over_blocks(monkeypatch):
    model, params, _, public = start("mlp")
    whole = preconditioning.moments(model.loss_fn, params, public)
    monkeypatch.setattr(preconditioning, "_BLOCK", 24)  # the last block is shorter
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        preconditioning.moments(model.loss_fn, params, public),
        whole,
    )


def test_adadps_does_not_multiply_back(monkeypatch):
    """A full-batch step without clipping is along the mean gradient, scaled once; that of KFAC is scaled twice."""
    quiet(monkeypatch)
    model, params, private, public = start("mlp")
    settings = preconditioning.Preconditioned(Settings(1.0, 1, 1e6, 1e6), 0.5)
    gradients = dense_gradients(model.loss_fn, params, private)
    mean = {path: g.mean(0) for path, g in gradients.items()}
    for method, build, times in (
        (preconditioning.adadps, preconditioning.second_moments, 1),
        (preconditioning.public_kfac, preconditioning.kfac_blocks, 2),
    ):
        found = method(0, model.loss_fn, params, private, public, settings=settings, **BUDGET)
        step = mean
        for _ in range(times):
            step = preconditioning.scaled(step, build(model.loss_fn, params, public, 0.5))
        for path, moved in flat_difference(params, found).items():
            np.testing.assert_allclose(moved, step[path], rtol=1e-3, atol=1e-5)


# Sensitivity.


def coordinates_of(name, model, params, public):
    """`before` of a method, with what it is told."""
    if name == "plain":
        return lambda g: g
    if name == "automatic":
        return lambda g: recipes.normalised(g, 0.01)
    if name == "dope":
        centre = jax.tree.map(lambda x: 100 * jnp.ones_like(x), ADAPTERS["all"].split(None, params)[0])
        return lambda g: public_gradients._from_centre(g, public_gradients._Told(centre, 0.3, 1.0))
    build = {"kfac": preconditioning.kfac_blocks, "adadps": preconditioning.second_moments}[name]
    scaling = build(model.loss_fn, params, public, 1e-6)
    return lambda g: preconditioning.scaled_record(g, scaling)


@pytest.mark.parametrize("name", ["plain", "automatic", "kfac", "adadps", "dope"])
def test_one_record_moves_the_sum_by_one(name):
    """A record that is zeroed out leaves the sum of unit-norm coordinates within 1, however large it was."""
    model, params, private, public = start("mlp")
    coordinates = coordinates_of(name, model, params, public)
    trainable, frozen = ADAPTERS["all"].split(None, params)
    everything = np.pad(np.arange(40), (0, 24), constant_values=-1)
    without = np.where(everything == 7, -1, everything)

    def total(private, index):
        return dp_sgd._clipped_sum(
            trainable, frozen, jax.tree.map(jnp.asarray, private), jnp.asarray(index), 40, 0.3,
            model.loss_fn, ADAPTERS["all"].merge, coordinates,
        )  # fmt: skip

    moves = []
    for size in (1.0, 1e6, 1e30, np.inf, np.nan):
        hostile = {"x": private["x"].copy(), "label": private["label"]}
        hostile["x"][7] = size
        moves.append(distance(total(hostile, everything), total(hostile, without)))
    assert max(moves) <= 1 + 1e-4
    assert moves[1] > 0.98  # the bound is reached


@pytest.mark.parametrize("method", ["mixed_gradients", "mirror_descent", "dope_sgd"])
def test_a_step_moves_by_one_record(monkeypatch, method):
    """The first step, without noise, of two neighbours differs by at most rate / expected batch."""
    quiet(monkeypatch)
    model, params, private, public = start("mlp")
    descent = Settings(sampling_prob=1.0, steps=1, length=10.0, l2_clip_norm=0.3)
    settings = {
        "mixed_gradients": public_gradients.Mixing(descent, 0.7),
        "mirror_descent": public_gradients.Mirror(descent, 1.0),
        "dope_sgd": public_gradients.Centred(descent),
    }[method]
    hostile = {"x": private["x"].copy(), "label": private["label"]}
    hostile["x"][7] = 1e6
    everyone = np.arange(40)
    found = []
    for index in (everyone, everyone[everyone != 7]):  # zeroed out, a record is sampled as one that is not there
        monkeypatch.setattr(dp_sgd, "_batches", lambda seed, count, settings, index=index: iter([index]))
        run = getattr(public_gradients, method)
        found.append(run(0, model.loss_fn, params, hostile, public, settings=settings, **BUDGET))
    assert 0 < distance(*found) <= 10 / 40 * (1 + 1e-4)


# Selective pretraining.


def test_the_share_is_composed(noise_multiplier):
    """Classifier and DP-SGD together spend the budget, by an accountant of their own."""
    settings = selection.Selection(DESCENT, 0.3, 0.5, classifier_steps=3)
    sigmas = selection.noise_multipliers(1.0, 1e-5, settings)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(selection.composed_event(settings, *sigmas))
    assert 0.98 < accountant.get_epsilon(1e-5) <= 1.0 + 1e-4
    alone = noise_multiplier(1.0, 1e-5, DESCENT.sampling_prob, DESCENT.steps)
    assert sigmas[1] > 1.05 * alone


def test_without_a_share_dp_sgd_has_the_budget(noise_multiplier):
    settings = selection.Selection(DESCENT, 1e-4, 0.5)
    of_classifier, of_descent = selection.noise_multipliers(1.0, 1e-5, settings)
    alone = noise_multiplier(1.0, 1e-5, DESCENT.sampling_prob, DESCENT.steps)
    assert of_descent == pytest.approx(alone, rel=2e-3)
    assert of_classifier > 100 * alone


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_leaves_something(share):
    with pytest.raises(ValueError, match="share"):
        selection.noise_multipliers(1.0, 1e-5, selection.Selection(DESCENT, share, 0.5))


def shifted(count, seed=3):
    """Public records of which the first half are from the private population, whose first input is 4."""
    public = records(count, seed=seed)
    public["x"][: count // 2, 0] += 4
    return public


def test_the_classifier_finds_the_private_population():
    public, private = shifted(80), records(40, seed=4)
    private["x"][:, 0] += 4
    settings = selection.Selection(DESCENT, 0.5, 0.5)
    scores = selection.domain_scores(0, private, public, settings, 0.0)
    assert np.mean(np.argsort(-scores)[:40] < 40) > 0.9
    noise = selection.domain_scores(0, private, public, settings, 1e9)
    assert np.corrcoef(scores, noise)[0, 1] < 0.99


def test_selective_pretraining_without_training_is_dp_sgd(monkeypatch):
    """It hands over the best records, and with nothing trained on them it is DP-SGD with the noise that is left."""
    public, private = shifted(80), records(40, seed=4)
    private["x"][:, 0] += 4
    model = models.make_model("linear", 1)
    params = models.init(model, jax.random.key(0), private)
    monkeypatch.setattr(selection, "noise_multipliers", lambda *budget: (0.0, 2.0))
    seen = []

    def train_on_public(params, chosen):
        seen.append(chosen)
        return params

    settings = selection.Selection(DESCENT, 0.5, 0.25)
    found = selection.selective_pretraining(
        0, model.loss_fn, params, private, public, settings=settings, train_on_public=train_on_public, **BUDGET
    )
    assert_same(found, dp_sgd.descend(0, model.loss_fn, params, private, settings=DESCENT, sigma=2.0))
    (chosen,) = seen
    assert len(chosen["label"]) == 20
    assert chosen["x"][:, 0].min() > 0.5


def test_features_are_of_the_public_units():
    public, private = records(50, (4, 3), outputs=3), records(20, (4, 3), outputs=3, seed=5)
    private["x"] = 100 * private["x"]
    private["label"][0] = 7  # unknown to the public records
    rows = selection.domain_features(public, private)
    assert rows.shape == (20, 12 + 3)
    assert abs(rows[:, :12]).max() == pytest.approx(5 / math.sqrt(12))
    assert rows[0, 12:].sum() == 0 and rows[1, 12:].sum() == 1


def test_two_stages_have_two_noises(monkeypatch):
    """The classifier does not use the seed of DP-SGD, whose noise its release would otherwise tell."""
    seeds = []

    def descend(seed, loss_fn, params, *args, **kwargs):
        seeds.append(seed)
        return params

    monkeypatch.setattr(dp_sgd, "descend", descend)
    model, params, private, public = start("linear")
    selection.selective_pretraining(
        5, model.loss_fn, params, private, public, settings=selection.Selection(DESCENT, 0.5, 0.5),
        train_on_public=lambda params, records: params, **BUDGET,
    )  # fmt: skip
    assert len(set(seeds)) == 2 and seeds[1] == 5
