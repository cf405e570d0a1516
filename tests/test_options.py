"""What may be chosen of a release, and what is said of it."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qexp_jax
from qexp_jax import NeighboringRelation
from qexp_jax.data.dataset import as_dataset
from qexp_jax.fine_tuning import options, progress

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (300, 3))
DATA = {"x": X, "y": X @ jnp.array([1.0, 2.0, 3.0])}
PUBLIC, PRIVATE = (jax.tree.map(lambda a, s=s: a[s], DATA) for s in (slice(100), slice(100, 300)))


def loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def tuned(public=PUBLIC, private=PRIVATE, **settings):
    settings = {"plan": qexp_jax.PlanOptions(rounds=1, tilt=False)} | settings
    return qexp_jax.fine_tune(
        KEY, loss, {"w": jnp.ones(3)}, public=public, private=private, epsilon=1.0, delta=1e-5, **settings
    )


def test_options_are_frozen():
    """And compare by value, so that they may be static arguments."""
    assert qexp_jax.PlanOptions(rounds=2) == qexp_jax.PlanOptions(rounds=2) != qexp_jax.PlanOptions()
    assert hash(qexp_jax.RunOptions()) == hash(qexp_jax.RunOptions())
    with pytest.raises(dataclasses.FrozenInstanceError):
        qexp_jax.PlanOptions().rounds = 3


def test_numbers_become_python():
    checked = options.checked_plan(qexp_jax.PlanOptions(rounds=np.int64(3), damping=np.float32(0.5)))
    assert type(checked.rounds) is int and type(checked.damping) is float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": {"rounds": 2}}, "plan to be a PlanOptions, found dict"),
        ({"run": qexp_jax.PlanOptions()}, "run to be a RunOptions, found PlanOptions"),
        ({"plan": qexp_jax.PlanOptions(subspace="head")}, "subspace to be a Subspace, found str"),
        ({"run": qexp_jax.RunOptions(mesh="data")}, "mesh to be a Mesh, found str"),
        ({"run": qexp_jax.RunOptions(mode="fast")}, "Expected a mode of"),
        ({"run": qexp_jax.RunOptions(progress="yes")}, "progress to be a function, found str"),
        ({"public": qexp_jax.Dataset(records=PUBLIC, public_count=3)}, "Public data has neither"),
    ],
)
def test_wrong_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tuned(**settings)


def test_a_dataset_of_records_is_the_records():
    """Bit for bit; with ids, and with a public count, it is another release."""
    plain = tuned()
    same = tuned(private=qexp_jax.Dataset(records=PRIVATE), public=qexp_jax.Dataset(records=PUBLIC))
    np.testing.assert_array_equal(plain.params["w"], same.params["w"])
    pairs = qexp_jax.Dataset(records=PRIVATE, unit_ids=np.arange(200) // 2)
    assert tuned(private=pairs).certificate["num_units"] == 100
    counted = qexp_jax.Dataset(records=PRIVATE, public_count=150)
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    assert tuned(private=counted, neighboring_relation=relation).certificate["num_units"] == 150
    assert as_dataset("private", pairs) is pairs


@pytest.mark.parametrize("installed", [True, False])
def test_a_bar_counts_rounds(installed, monkeypatch, capsys):
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    show = progress.bar(rounds=2)
    for stage in ("public curvature", "private pass", "draw", "private pass", "draw", "private pass", "done"):
        show(stage)
    shown = capsys.readouterr().err
    assert ("3/3" in shown) == installed and "done" in shown


def test_progress_may_be_true(capsys):
    tuned(run=qexp_jax.RunOptions(progress=True))
    assert "done" in capsys.readouterr().err
    tuned(run=qexp_jax.RunOptions(progress=False))
    assert not capsys.readouterr().err


def test_a_report_says_what_is_promised():
    release = tuned()
    said = qexp_jax.report(release)
    assert said == qexp_jax.report(release.certificate)
    for part in ("(1, 1e-05)-differentially private", "any single record been left out", "e^1 = 2.72", "200 units"):
        assert part in said
    assert all(assumption in said for assumption in release.certificate["assumptions"])
    pairs = qexp_jax.Dataset(records=PRIVATE, unit_ids=np.arange(200) // 2)
    replaced = tuned(private=pairs, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    assert "all records of any single person (or other unit) together been replaced" in qexp_jax.report(replaced)


def test_a_promise_of_nothing_is_not_stated_as_a_number():
    """e^1000 is no double."""
    assert "e^1000 = more than 10^21" in qexp_jax.report(tuned().certificate | {"epsilon": 1000.0})
