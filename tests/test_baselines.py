import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.integrate import quad
from scipy.stats import norm

from experiments.baselines import dp_sgd, linear
from experiments.baselines.adapters import ADAPTERS
from experiments.benchmark import models
from experiments.benchmark.search import climb


def records(n, p=3, outputs=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)).astype(np.float32)
    label = (x[:, 0] + 0.3 * rng.normal(size=n) > 0) if outputs == 1 else rng.integers(0, outputs, n)
    return {"x": x, "label": label.astype(np.int32)}


def start(name, data, outputs=1):
    model = models.make_model(name, outputs)
    return model, models.init(model, jax.random.key(0), data)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_at_the_pretrained_parameters_and_trains_what_it_says(name):
    _, params = start("mlp", records(4))
    split, merge = ADAPTERS[name]
    trainable, frozen = split(jax.random.key(1), params)
    jax.tree.map(np.testing.assert_array_equal, merge(trainable, frozen), params)
    moved = merge(jax.tree.map(lambda x: x + 1, trainable), frozen)
    changed = {jax.tree_util.keystr(path) for path, (a, b) in paths(params, moved) if not np.array_equal(a, b)}
    everything = {"['params']['Dense_0']['kernel']", "['params']['Dense_0']['bias']",
                  "['params']['head']['kernel']", "['params']['head']['bias']"}  # fmt: skip
    expected = {
        "all": everything,
        "last": {leaf for leaf in everything if "head" in leaf},
        "bias": {leaf for leaf in everything if "bias" in leaf},
        "lora": {leaf for leaf in everything if "kernel" in leaf},
    }
    assert changed == expected[name]


def paths(a, b):
    return jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x, y: (x, y), a, b), is_leaf=_is_pair)[0]


def _is_pair(x):
    return isinstance(x, tuple)


def test_dp_gd_without_noise_or_clipping_is_gradient_descent(monkeypatch):
    monkeypatch.setattr(dp_sgd, "noise_multiplier", lambda *a: 0.0)
    data = records(50)
    model, params = start("linear", data)
    settings = dp_sgd.Settings(sampling_prob=1.0, steps=3, length=0.3 * 1e6, l2_clip_norm=1e6)
    found = dp_sgd.train(
        0, model.loss_fn, params, data, optimizer="sgd", adapter="all", settings=settings, epsilon=1.0, delta=1e-5
    )

    def mean_loss(p):
        return jnp.mean(jax.vmap(model.loss_fn, in_axes=(None, 0))(p, data))

    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(mean_loss)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, params)


def test_the_noise_of_dp_sgd_spends_the_budget_and_is_added():
    sigma = dp_sgd.noise_multiplier(1.0, 1e-5, 0.25, 5)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(0.25, GaussianDpEvent(sigma)), 5))
    assert accountant.get_epsilon(1e-5) == pytest.approx(1.0, abs=0.01)
    data = records(64)
    data["x"] *= 0  # no gradient reaches the kernel
    model, params = start("linear", data)
    settings = dp_sgd.Settings(sampling_prob=0.25, steps=5, length=5.0, l2_clip_norm=1.0)
    moves = [
        dp_sgd.train(
            seed, model.loss_fn, params, data, optimizer="sgd", adapter="all", settings=settings, epsilon=1, delta=1e-5
        )["params"]["head"]["kernel"]
        - params["params"]["head"]["kernel"]
        for seed in range(40)
    ]
    # Five steps of rate 1 on an expected batch of 16.
    assert np.std(moves) == pytest.approx(math.sqrt(5) * sigma / 16, rel=0.25)


def test_blocks_leave_the_clipped_sum_as_it_is(monkeypatch):
    data = {name: jnp.asarray(values) for name, values in records(100).items()}
    model, params = start("linear", data)
    _, merge = ADAPTERS["all"]
    trainable, frozen = ADAPTERS["all"].split(jax.random.key(0), params)
    index = np.arange(0, 100, 2)
    sums = []
    for block in (16, 64):
        monkeypatch.setattr(dp_sgd, "_BLOCK", block)
        padded = jnp.asarray(dp_sgd._padded(index, 50.0))
        sums.append(dp_sgd._clipped_sum(trainable, frozen, data, padded, 50, 0.1, model.loss_fn, merge))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *sums)
    assert math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(sums[0]))) <= 50


def exact_delta(epsilon, sigma, regularisation, rows, labels, extra):
    """delta of one-dimensional objective perturbation between `rows` with and without `extra`, by quadrature."""

    def log_density(w, rows, labels):
        z = rows * w
        p = 1 / (1 + np.exp(-z))
        b = -(np.sum(rows * (p - labels)) + regularisation * w)
        return norm.logpdf(b, scale=sigma) + np.log(np.sum(rows**2 * p * (1 - p)) + regularisation)

    more, more_labels = np.append(rows, extra[0]), np.append(labels, extra[1])

    def excess(first, second):
        f = lambda w: max(0.0, math.exp(log_density(w, *first)) - math.exp(epsilon + log_density(w, *second)))
        return quad(f, -12, 12, limit=400, points=[0])[0]

    with_, without = (more, more_labels), (rows, labels)
    return max(excess(with_, without), excess(without, with_))


@pytest.mark.parametrize("regularisation", [1.0, 8.0])
def test_objective_perturbation_keeps_its_promise_and_is_not_wasteful(regularisation):
    epsilon, delta = 1.0, 1e-3
    mu = linear.gradient_mu(1, 1.0, regularisation, epsilon, delta)
    rng = np.random.default_rng(0)
    rows, labels = rng.uniform(-1, 1, 5), rng.integers(0, 2, 5)
    worst = max(
        exact_delta(epsilon, 1 / mu, regularisation, rows, labels, extra) for extra in ((1, 0), (1, 1), (-1, 1))
    )
    assert worst <= delta
    # Power: a third of the noise breaks the promise.
    assert exact_delta(epsilon, 1 / (3 * mu), regularisation, rows, labels, (1, 0)) > delta


def test_perturbation_delta_of_one_logit_is_twice_the_gaussian_tail():
    mu, epsilon = 0.25, 1.0
    gaussian = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert linear.perturbation_delta(mu, 1, epsilon) == pytest.approx(2 * gaussian, rel=1e-6)
    assert linear.perturbation_delta(mu, 10, epsilon) > linear.perturbation_delta(mu, 3, epsilon)


def test_too_little_regularisation_leaves_no_budget():
    with pytest.raises(ValueError, match="too small"):
        linear.gradient_mu(1, 1.0, 1e-3, 1.0, 1e-5)


@pytest.mark.parametrize("outputs", [1, 3])
def test_with_a_huge_budget_objective_perturbation_finds_the_regularised_minimiser(outputs):
    data = records(200, outputs=outputs)
    model, params = start("linear", data, outputs)
    found, passes = linear.objective_perturbation(
        np.random.default_rng(0), params, data, norm_bound=100.0, regularisation=10.0, epsilon=5000.0, delta=0.5
    )

    def objective(p):
        distance = sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(params), strict=True))
        return jnp.sum(jax.vmap(model.loss_fn, in_axes=(None, 0))(p, data)) + 5 * distance

    assert passes > 1
    gradient = jax.grad(objective)(found)
    noise = 100 * math.sqrt(2) / linear.gradient_mu(outputs, 100.0, 10.0, 5000.0, 0.5)
    assert max(float(jnp.max(abs(g))) for g in jax.tree.leaves(gradient)) < 6 * noise + 0.02


def test_rows_are_bounded_and_the_pretrained_head_is_kept():
    data = records(30)
    _, params = start("linear", data)
    head = linear.head_of(params, data, 1.5)
    assert np.linalg.norm(head.rows, axis=1).max() <= 1.5 + 1e-12
    jax.tree.map(np.testing.assert_array_equal, linear.moved(params, np.zeros((4, 1))), params)


def test_with_a_huge_budget_adassp_is_least_squares_on_the_residuals():
    data = records(300)
    _, params = start("linear", data)
    found = linear.adassp(np.random.default_rng(0), params, data, norm_bound=50.0, step=2.0, mu=1e7)
    rows = np.concatenate([data["x"], np.ones((300, 1))], axis=1)
    head = params["params"]["head"]
    theta = np.concatenate([head["kernel"], np.asarray(head["bias"])[None]])
    residual = data["label"][:, None] - 1 / (1 + np.exp(-rows @ theta))
    expected = theta + 2 * np.linalg.lstsq(rows, residual, rcond=None)[0]
    np.testing.assert_allclose(found["params"]["head"]["kernel"], expected[:-1], atol=1e-3)


def test_adassp_at_a_tiny_budget_hardly_moves():
    data = records(300)
    _, params = start("linear", data)
    found = linear.adassp(np.random.default_rng(0), params, data, norm_bound=2.0, step=1.0, mu=1e-3)
    np.testing.assert_allclose(
        found["params"]["head"]["kernel"], params["params"]["head"]["kernel"], atol=0.5
    )  # fmt: skip


def test_the_search_beats_every_neighbour_and_respects_what_is_allowed():
    target = (4, -3, 7)

    def score(point):
        return -sum((a - b) ** 2 for a, b in zip(point, target, strict=True))

    assert climb(score, [(0, 0, 0), (9, 9, 9)], lambda p: True) == target
    assert climb(score, [(0, 0, 0)], lambda p: p[0] <= 2) == (2, -3, 7)
