"""Membership inference on tiny data: attacks with known answers, and shadow models that are the library's own."""

import csv

import jax
import numpy as np
import pytest
from problems import fine_tune
from scipy import stats

from experiments.benchmark import tasks
from experiments.data import splits
from experiments.studies import attacks, membership, shadow_models
from qexp_jax import NeighboringRelation

PRETRAINING = {"linear": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 32}}


def tiny_split(data_dir, cache_dir):
    """Labels are noise, so that only memory tells members apart; the public population differs."""
    rng = np.random.default_rng(0)

    def part(count):
        x = rng.normal(size=(count, 30)).astype(np.float32)
        return {"x": x, "label": rng.integers(2, size=count).astype(np.int32)}

    return splits.Split(part(300), part(80), part(120), "tiny")


@pytest.fixture
def tiny(monkeypatch):
    tasks.load_split.cache_clear()
    monkeypatch.setitem(tasks.TASKS, "tiny", tasks.Task("main", "tiny", "auroc", 1, PRETRAINING, tiny_split))
    yield tasks.pretrained_on(tasks.TASKS["tiny"], "linear", None, None)
    tasks.load_split.cache_clear()


def gaussian_game(mu, shadows=60, pool=300):
    """Confidences that are exactly N(mu, 1) and N(0, 1) around each record's own hardness."""
    rng = np.random.default_rng(1)
    included = rng.integers(2, size=(shadows, pool)).astype(bool)
    noise, hardness = rng.normal(size=(shadows, pool)), 5 * rng.normal(size=pool)
    return attacks.Game(included, hardness + mu * included + noise, 0.0)


def test_lira_reaches_what_gaussian_dp_allows_and_the_loss_alone_does_not():
    game = gaussian_game(1.5)
    allowed = attacks.bounds(1.5)
    low, high = attacks.intervals(attacks.lira(game), game.included)
    found = attacks.summary(attacks.lira(game), game.included)
    assert np.all(low < found) and np.all(found < high)
    assert np.all(found < 1.1 * allowed) and np.all(found > [0.97, 0.4, 0.8] * allowed)
    assert attacks.summary(game.confidence, game.included)[0] < 0.65
    nothing = gaussian_game(0.0)
    low, high = attacks.intervals(attacks.lira(nothing), nothing.included)
    assert low[0] < 0.5 < high[0]


def test_the_roc_of_known_scores_is_exact_and_ties_are_one_threshold():
    included = np.array([[True, True, False, False]])
    assert attacks.summary(np.array([[3.0, 1.0, 2.0, 0.0]]), included)[0] == 0.75
    assert attacks.summary(np.zeros((1, 4)), included)[0] == 0.5
    np.testing.assert_allclose(attacks.bounds(0.0), [0.5, 1e-3, 1e-2])
    np.testing.assert_allclose(attacks.bounds(1.0)[2], stats.norm.cdf(stats.norm.ppf(0.01) + 1))


def test_confidence_is_the_logit_of_the_true_labels_probability():
    logits = np.random.default_rng(2).normal(size=(3, 5, 4))
    labels = np.array([0, 1, 2, 3, 0])
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    true = p[:, np.arange(5), labels]
    np.testing.assert_allclose(attacks.confidence(logits, labels), np.log(true / (1 - true)))
    binary = attacks.confidence(np.array([[[2.0], [2.0]]]), np.array([1, 0]))
    np.testing.assert_allclose(binary, [[2.0, -2.0]])


def test_shadow_models_are_what_fine_tune_releases(tiny):
    """With next to no noise, the batched release on half of the pool is that of the one call on these records alone."""
    key, epsilon = jax.random.key(5), 1e4
    half = np.random.default_rng(3).permutation(80) < 40
    stacked = shadow_models.released(key, tiny, tiny.split.private, half[None], epsilon, 1e-5)
    release = fine_tune(
        key, tiny.model.loss_fn, tiny.params, public=tiny.split.public,
        private=splits.select(tiny.split.private, np.flatnonzero(half)), epsilon=epsilon, delta=1e-5,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE, public_count=40, tilt=False,
    )  # fmt: skip
    start, moved, own = (p["params"]["head"]["kernel"] for p in (tiny.params, release.params, stacked))
    assert np.linalg.norm(own[0] - moved) < 0.02 * np.linalg.norm(moved - start)


def test_the_experiment_writes_its_table_and_its_figure(tiny, tmp_path):
    options = "--tasks tiny --models linear --pool 60 --shadows 24 --epsilons 1 --steps 200".split()
    folders = ["--out", str(tmp_path), "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path)]
    membership.main([*options, *folders])
    with (tmp_path / "membership.csv").open(newline="") as file:
        rows = {(row["method"], row["attack"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(method, attack) for method in ("adamw, 200 steps", "qexp") for attack in ("lira", "loss")}
    assert float(rows["adamw, 200 steps", "lira"]["auc"]) > 0.8  # labels are noise: it must have memorised
    private = rows["qexp", "lira"]
    assert float(private["auc_low"]) < float(private["auc_bound"]) == pytest.approx(0.5752, abs=1e-3)
    assert float(private["auc"]) < 0.62
    assert (tmp_path / "membership.png").is_file() and (tmp_path / "membership_runs.json").is_file()
    assert "qexp, epsilon 1" in (tmp_path / "membership.md").read_text()
