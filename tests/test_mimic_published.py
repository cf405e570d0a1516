"""The published protocol on MIMIC-III: by hand on few patients, and its shapes on the demo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("duckdb", reason="duckdb is not installed; it comes with the extra 'experiments'")

from test_mimic import MIMIC_III, MIMIC_IV, event, hours, needs_iii, needs_iv, patient, population, write

from experiments.benchmark import methods, mimic_medians, models, tasks
from experiments.data import clinical, mimic_extract, mimic_published, mimic_sql

NAMES = list(mimic_extract.VARIABLES)


def test_the_variables_are_104_of_distinct_items():
    items = [item for items in mimic_extract.VARIABLES.values() for item in items]
    assert len(NAMES) == 104 and len(set(items)) == len(items)
    assert set(mimic_extract.BOUNDED) <= set(NAMES)
    assert set(mimic_extract.BOUNDED.values()) <= set(clinical.BOUNDS)
    assert {item for items in mimic_published.CONVERSIONS.values() for item in items} <= set(items)


def derived(folder, cache):
    return mimic_published.mimic_build.read(
        mimic_published.mimic_build.derive(folder, cache, mimic_published._study(), "1GB", False)
    )


def test_hourly_means_are_those_computed_by_hand(tmp_path):
    chart = [
        event(1, 211, 0.2, 60),
        event(1, 211, 0.9, 80),
        event(1, 211, 5, 90),
        event(1, 211, 5.5, 7350),  # implausible
        event(1, 211, 24, 99),  # later than the inputs
        event(1, 678, 2, 98.6),  # degrees Fahrenheit
        event(1, 190, 3, 50),  # per cent
        event(1, 1394, 4, 70),  # inches
    ]
    patients = [patient(1), patient(2, outtime=hours(240)), patient(3, outtime=hours(240.1))]
    table = derived(write(tmp_path / "raw", patients, chart), tmp_path / "cache")
    assert table["subject_id"].tolist() == [1, 2]
    found = mimic_published._hourly_means(table, [0])[0]
    expected = np.full((24, 104), np.nan)
    expected[[0, 5], NAMES.index("heart rate")] = 70, 90
    expected[2, NAMES.index("temperature")] = 37
    expected[3, NAMES.index("fraction inspired oxygen set")] = 0.5
    expected[4, NAMES.index("height")] = 177.8
    expected[1, NAMES.index("creatinine")] = 1
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gaps_have_the_value_before_in_units_of_the_public_spread():
    public = np.full((2, 4, 2), np.nan)
    public[0, :2, 0] = 1, 3
    private = np.full((1, 4, 2), np.nan)
    private[0, 1, 0], private[0, 3, 0], private[0, 0, 1] = 4, 1000, 7
    scaled, other = mimic_published._standardise(public, private)
    np.testing.assert_array_equal(scaled[:, :, 0], [[-1, 1, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(other[0, :, 0], [0, 2, 2, 5])
    np.testing.assert_array_equal(other[0, :, 1], 0)  # of a variable that no public patient has, nothing is known


def test_the_split_is_by_patient_in_the_published_shares(tmp_path):
    patients, _, labs = population(40)
    raw = write(tmp_path / "raw", patients, [event(i, 211, 1, 60 + i) for i in range(40)], labs)
    arguments = {"outcome": "long_stay", "cache_dir": tmp_path / "cache", "progress": False}
    split = mimic_published.load(raw, seed=1, **arguments)
    assert [len(part["label"]) for part in split[:3]] == [4, 28, 8]
    assert "public is the validation tenth" in split.description
    other = mimic_published.load(raw, seed=2, **arguments)
    assert not np.array_equal(other.test["x"], split.test["x"])


@needs_iii
def test_the_demo_has_the_published_shapes(tmp_path):
    split = mimic_published.load(MIMIC_III, outcome="long_stay", cache_dir=tmp_path, progress=False)
    assert [part["x"].shape for part in split[:3]] == [(5, 24, 104), (38, 24, 104), (11, 24, 104)]
    assert all(part["x"].dtype == np.float32 and np.isfinite(part["x"]).all() for part in split[:3])


@needs_iv
def test_another_mimic_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds mimic-iv: the published protocol is one of MIMIC-III"):
        mimic_published.load(MIMIC_IV, cache_dir=tmp_path)


def test_medians_are_over_the_runs_of_a_cell(tmp_path):
    cell = {"task": "mimic_mortality_published", "model": "gru", "method": "qexp", "metric_name": "auroc"}
    rows = [cell | {"epsilon": "1.0", "metric": metric} for metric in (".6", ".9", ".7")]
    rows += [
        cell | {"epsilon": "10.0", "metric": ".8"},
        cell | {"task": "physionet_icu", "epsilon": "1", "metric": "0"},
    ]
    expected = [("mimic_mortality_published", "gru", "qexp", 1.0, 3, 0.7)]
    assert mimic_medians.medians(rows) == [*expected, ("mimic_mortality_published", "gru", "qexp", 10.0, 1, 0.8)]
    with pytest.raises(FileNotFoundError, match="make mimic-published"):
        mimic_medians.main(["--results", str(tmp_path)])


@pytest.mark.parametrize("outcome", ["mortality", "long_stay"])
def test_published_tasks_are_run_by_name(outcome):
    """By the linear and the recurrent model, by every method that suits any model."""
    task = tasks.MIMIC_TASKS[f"mimic_{outcome}_published"]
    assert set(task.pretraining) == {"linear", "gru"} <= set(models.MODELS)
    assert {"qexp", "dp_sgd_all", "non_private"} <= {name for name, m in methods.METHODS.items() if "gru" in m.models}
    network = models.MODELS["gru"](1)
    x = jnp.ones((mimic_sql.INPUT_HOURS, 104))
    assert network.apply(network.init(jax.random.key(0), x), x).shape == (1,)
