"""Rehearsals look at public records alone, and play the task that is to come."""

import jax
import numpy as np
import pytest

from experiments.benchmark import lattices, rehearsal, runs
from experiments.benchmark.methods import BASELINES, DEFAULT_METHODS, METHODS
from experiments.benchmark.models import init, make_model
from experiments.benchmark.results import Group
from experiments.benchmark.tasks import Pretrained, Task
from experiments.data.splits import Split

RNG = np.random.default_rng(0)
PRETRAINING = {"linear": {"epochs": 2, "learning_rate": 1e-2, "batch_size": 16}}


def records(count, fill=None):
    x = RNG.normal(size=(count, 6)).astype(np.float32) if fill is None else np.full((count, 6), fill, np.float32)
    return {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}


def task(private):
    model = make_model("linear", 1)
    split = Split(records(120) | {"writer": np.arange(120) // 4}, private, private, "toy")
    loaded = Task("main", "toy", "auroc", 1, PRETRAINING, lambda *dirs: split)
    return Pretrained(loaded, split, model, init(model, jax.random.key(0), split.public))


@pytest.fixture(scope="module")
def rehearsed():
    # Whoever looked at these would find nothing but NaN.
    return rehearsal.rehearsals(task(records(50, np.nan)), "linear")


def test_parts_are_public_and_disjoint(rehearsed):
    assert len(rehearsed) == rehearsal.NUM_REHEARSALS
    for one in rehearsed:
        parts = [one.split.public["x"], one.split.private["x"], one.split.test["x"]]
        together = np.concatenate(parts)
        assert np.all(np.isfinite(together)) and len(np.unique(together, axis=0)) == len(together) == 120
        assert one.task.metric == "negative_loss"


def test_half_of_them_hold_out_whole_writers(rehearsed):
    for one in rehearsed[rehearsal.NUM_REHEARSALS // 2 :]:
        assert not set(one.split.public["writer"]) & set(one.split.private["writer"])


def test_a_short_part_is_drawn_from_again(rehearsed):
    settings = runs.rehearsal_settings(rehearsed, Group("toy", "linear", 300, 1.0, "rehearsed_dp_gd"), 1e-5)
    assert [setting.num_private for setting in settings] == [300] * rehearsal.NUM_REHEARSALS
    few = rehearsal.subsample(rehearsed[0], 10, 0)
    assert len(np.unique(few["x"], axis=0)) == 10


def test_a_rehearsed_method_is_the_same_but_for_its_choice():
    names = [name for name, method in METHODS.items() if method.rehearsed]
    assert names and all(
        METHODS[name]._replace(rehearsed=False) == METHODS[name.removeprefix("rehearsed_")] for name in names
    )
    assert not any(METHODS[name].rehearsed for name in DEFAULT_METHODS) and set(BASELINES) < set(DEFAULT_METHODS)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("public_")])
def test_published_methods_start_where_they_may(name):
    method = METHODS[name]
    private = records(1000)
    setting = runs.Setting(task(private), private, 1.0, 1e-5)
    starts = method.starts(1000)
    assert starts and all(method.allowed(setting, method.hyperparameters(point)) for point in starts)
    assert lattices.descent(starts[0][:4]).items() <= method.hyperparameters(starts[0]).items()
