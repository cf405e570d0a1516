import concurrent.futures
import csv
import fcntl
import json
import math
import time

import numpy as np
import pytest

from experiments.benchmark import grid, lattices, measure, methods, models, results, runs, tasks
from experiments.benchmark.setting import Outcome, Setting
from experiments.data import splits
from experiments.studies import ablation, predicted, units

PRETRAINING = {name: {"epochs": 1, "learning_rate": 1e-2, "batch_size": 32} for name in ("linear", "mlp")}


def tiny_split(data_dir, cache_dir):
    """Two clusters, of which the private ones lean."""
    rng = np.random.default_rng(0)
    parts = []
    for shift in (0.0, 0.5, 0.5):
        label = rng.integers(0, 2, 120)
        x = rng.normal(size=(120, 4)) + 1.5 * label[:, None] + shift
        parts.append({"x": x.astype(np.float32), "label": label.astype(np.int32)})
    return splits.Split(*parts, "tiny")


@pytest.fixture(autouse=True)
def tiny_task(monkeypatch, tmp_path):
    tiny = {"tiny": tasks.Task("main", "tiny", "auroc", 1, PRETRAINING, tiny_split)}
    monkeypatch.setattr(tasks, "TASKS", tiny)
    monkeypatch.setattr(tasks, "OPEN_TASKS", tiny)
    monkeypatch.setattr(lattices, "MAX_STEPS", 6)
    monkeypatch.setattr(lattices, "MIN_BATCH", 8)
    for name, starts in (("dp_gd", [(0, 1, 0)]), ("dp_adam_all", [(-1, 0, -3, 0)]), ("dp_sgd_bias", [(-1, 0, 1, 0)])):
        few = methods.METHODS[name]._replace(starts=lambda n, starts=starts: starts)
        monkeypatch.setitem(methods.METHODS, name, few)
    monkeypatch.setattr(methods, "NON_PRIVATE_EPOCHS", 2)
    tasks.load_split.cache_clear()
    monkeypatch.setattr(runs, "climb", lambda score, starts, allowed: max(starts, key=score))
    yield
    tasks.load_split.cache_clear()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(tmp_path, *extra):
    grid.main(["--models", "linear", "--sizes", "60", "--epsilons", "1", "8", "--seeds", "2",
                "--out", str(tmp_path), "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path), *extra])  # fmt: skip
    return rows_of(tmp_path / "arena.csv")


def test_the_grid_writes_every_method_with_paired_seeds_and_its_provenance(tmp_path):
    private = {"qexp", "one_draw", "dp_gd", "objective_perturbation", "adassp"}
    rows = run(tmp_path, "--methods", *sorted(private), "zero_shot", "non_private")
    assert list(rows[0]) == results.COLUMNS
    expected = {(m, e, s) for m in private for e in (1.0, 8.0) for s in (0, 1)}
    expected |= {(m, math.inf, s) for m in ("zero_shot", "non_private") for s in (0, 1)}
    assert {(r["method"], float(r["epsilon"]), int(r["seed"])) for r in rows} == expected
    assert len(rows) == len(expected)
    assert all(0 <= float(r["metric"]) <= 1 and float(r["seconds"]) >= 0 and int(r["peak_bytes"]) > 0 for r in rows)
    chosen = [json.loads(r["settings"]) for r in rows if r["method"] == "dp_gd"]
    assert all(s["sampling_prob"] == 1 and s["steps"] == 5 for s in chosen)
    (entry,) = json.loads((tmp_path / "arena_runs.json").read_text())
    assert "experiments.benchmark.grid" in entry["command"] and entry["versions"]["jax_privacy"]


def test_later_seeds_have_the_hyperparameters_of_the_first(tmp_path):
    """A search sees seeds 0 and 1, wherever the rows begin."""
    first = run(tmp_path / "first", "--methods", "dp_gd")
    later = run(tmp_path / "later", "--methods", "dp_gd", "--first-seed", "1")
    assert [r["seed"] for r in later] == ["1", "2"] * 2
    assert [r["settings"] for r in first] == [r["settings"] for r in later]
    assert [r["metric"] for r in first if r["seed"] == "1"] == [r["metric"] for r in later if r["seed"] == "1"]


def test_a_second_run_computes_nothing(tmp_path, monkeypatch):
    first = run(tmp_path, "--methods", "qexp", "zero_shot")
    monkeypatch.setattr(runs, "group_rows", None)
    assert run(tmp_path, "--methods", "qexp", "zero_shot") == first


def test_searches_start_at_the_epsilon_before_and_where_those_of_another_size_ended(tmp_path, monkeypatch):
    starts = {}

    def fake(pretrained, group, *, near, **_):
        starts[group.n, group.epsilon] = near
        point = f"{group.n} {group.epsilon:g}"
        return [dict.fromkeys(results.COLUMNS, "") | group._asdict() | {"lattice_point": point}]

    monkeypatch.setattr(runs, "group_rows", fake)
    run(tmp_path, "--methods", "dp_gd")
    run(tmp_path, "--methods", "dp_gd", "--sizes", "80", "--search-from", "60")
    assert starts == {(60, 8.0): [], (60, 1.0): [(60, 8)], (80, 8.0): [(60, 8)], (80, 1.0): [(80, 8), (60, 1)]}


def test_a_search_starts_where_it_may(monkeypatch):
    method = methods.METHODS["dp_gd"]._replace(run=lambda setting, seed, hyperparameters: Outcome(None, 0, 0))
    pretrained = tasks.pretrained_on(tasks.TASKS["tiny"], "linear", None, None)
    settings = [Setting(pretrained, runs.subsample(pretrained, 60, 0), 1.0, 1e-5)]
    seen = []
    monkeypatch.setattr(runs, "climb", lambda score, starts, allowed: seen.append(starts) or starts[0])
    monkeypatch.setattr(runs, "metric_of", lambda setting, params: 0.0)
    assert runs.choose(method, settings, [(0, 2, 1), (9, 2, 1)]) == (0, 2, 1)  # 5 * 3^9 steps are too many
    assert runs.choose(method, settings, [(9, 2, 1)]) == (0, 1, 0)
    assert seen == [[(0, 2, 1)], [(0, 1, 0)]]


def test_a_table_is_run_again_with_the_hyperparameters_that_it_holds_and_no_search(tmp_path, monkeypatch):
    options = "--methods", "qexp", "zero_shot", "non_private", "dp_gd", "adassp"
    first = run(tmp_path / "first", *options)
    monkeypatch.setattr(runs, "choose", None)
    again = run(tmp_path / "again", *options, "--settings-from", str(tmp_path / "first"))
    kept = [name for name in results.COLUMNS if name not in ("seconds", "compile_seconds", "peak_bytes")]
    assert [[row[name] for name in kept] for row in again] == [[row[name] for name in kept] for row in first]
    with pytest.raises(ValueError, match="no rows"):
        run(tmp_path / "none", "--settings-from", str(tmp_path / "absent"))


def test_baselines_may_be_chosen_by_their_loss(tmp_path):
    rows = run(tmp_path, "--methods", "zero_shot", "dp_gd", "--metric", "negative_loss")
    assert {row["metric_name"] for row in rows} == {"negative_loss"}
    assert all(float(row["metric"]) == -float(row["loss"]) < 0 for row in rows)
    assert models.negative_loss(np.array([[np.nan], [1.0]]), np.array([0, 1])) == -math.inf
    assert models.negative_loss(np.array([[0.0, 0.0]]), np.array([1])) == pytest.approx(-math.log(2))
    assert models.negative_loss(np.array([[2.0]]), np.array([0])) == pytest.approx(-math.log1p(math.exp(2)))


def test_of_the_baselines_the_best_and_the_best_relative_of_dp_sgd_are_run_again():
    fixed = dict.fromkeys(results.COLUMNS, "") | {"task": "t", "model": "linear", "n": 10}
    metrics = {"qexp": (0.1, 0.1), "dp_gd": (0.6, 0.9), "dp_sgd_all": (0.7, 0.2), "adassp": (0.9, 0.8)}
    table = [
        fixed | {"method": name, "epsilon": e, "metric": m[i]}
        for name, m in metrics.items()
        for i, e in ((0, 1.0), (1, 8.0))
    ]
    table += [fixed | {"method": "zero_shot", "epsilon": math.inf, "metric": 1.0}]
    chosen = {(group.epsilon, group.method) for group in grid.to_run_again(table, best_baselines=True)}
    best = {(1.0, "adassp"), (1.0, "dp_sgd_all"), (8.0, "dp_gd")}
    assert chosen == best | {(1.0, "qexp"), (8.0, "qexp"), (math.inf, "zero_shot")}
    assert len(grid.to_run_again(table, best_baselines=False)) == 9


@pytest.mark.parametrize("options", ["--part 2/2", "--part -1/2", "--part 1", "--part a/b", "--best-baselines"])
def test_a_part_that_is_none_and_a_choice_without_a_table_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        grid.parse_args(options.split())
    assert "error" in capsys.readouterr().err


def test_two_processes_share_the_work_without_overlap(tmp_path):
    options = ["--methods", "zero_shot", "adassp", "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path)]
    parts = [
        grid.sweeps_of(grid.parse_args([*options, "--models", "linear", "--sizes", "50", "100", "--part", part]))
        for part in ("0/2", "1/2")
    ]
    assert len(parts[0] + parts[1]) == len(set(parts[0] + parts[1])) == 4


def test_processes_that_start_together_all_leave_their_command(tmp_path):
    path = tmp_path / "arena_runs.json"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: results.add_entry(path, {"command": i}), [*range(40), *range(40)]))
    assert sorted(entry["command"] for entry in json.loads(path.read_text())) == list(range(40))


def test_processes_that_start_together_write_one_header(tmp_path):
    path = tmp_path / "arena.csv"
    written = [dict.fromkeys(results.COLUMNS, str(i)) for i in range(16)]
    first = path.open("a")  # what the others wait for
    fcntl.flock(first, fcntl.LOCK_EX)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        appended = [pool.submit(results.append_rows, path, [row]) for row in written]
        time.sleep(0.2)
        first.close()
    assert all(x.exception() is None for x in appended)
    assert sorted(row["seed"] for row in results.read_rows(path)) == sorted(row["seed"] for row in written)


def test_every_network_baseline_runs(tmp_path):
    out = ["--methods", "dp_adam_all", "dp_sgd_bias", "--models", "mlp", "--epsilons", "8"]
    rows = run(tmp_path, *out)
    assert {(r["method"], r["noisy_steps"]) for r in rows} == {("dp_adam_all", "5"), ("dp_sgd_bias", "5")}


def test_methods_see_the_same_private_records():
    pretrained = tasks.pretrained_on(tasks.TASKS["tiny"], "linear", None, None)
    a, b, c = (runs.subsample(pretrained, 40, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a["x"], b["x"])
    assert not np.array_equal(a["x"], c["x"])


def test_sizes_beyond_the_task_fall_away():
    assert grid.sizes_of(4084, [250, 1000, 4000, 10_000]) == [250, 1000, 4000]
    assert grid.sizes_of(100, [250, 1000]) == [100]


def test_another_table_is_not_appended_to(tmp_path):
    (tmp_path / "arena.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns"):
        run(tmp_path, "--methods", "zero_shot")


def test_compilation_is_told_apart_from_running():
    import jax
    import jax.numpy as jnp

    f = jax.jit(lambda x: jnp.linalg.svd(x @ x.T)[1])
    with measure.measured() as first:
        f(jnp.ones((30, 30))).block_until_ready()
    with measure.measured() as second:
        f(jnp.ones((30, 30))).block_until_ready()
    assert first.compile_seconds > 10 * second.compile_seconds and first.peak_bytes > 0


def test_bad_input_ends_a_script_with_a_message(tmp_path):
    def main():
        raise FileNotFoundError("No set-a.tar.gz in X. Get it from Y.")

    with pytest.raises(SystemExit, match=r"error: No set-a.tar.gz in X. Get it from Y."):
        splits.run_cli(main)


def test_the_ablation_covers_every_kind_of_subspace(tmp_path):
    ablation.main(["--tasks", "tiny", "--dims", "4", "--n", "60", "--seeds", "1", "--out", str(tmp_path),
                   "--models", "linear", "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path)])  # fmt: skip
    rows = rows_of(tmp_path / "ablation.csv")
    assert {row["subspace"] for row in rows} == set(ablation.KINDS) and (tmp_path / "ablation.png").is_file()
    assert all(float(row["predicted_cost"]) > 0 and float(row["measured_cost"]) > 0 for row in rows)
    assert "one draw, rank k" in (tmp_path / "ablation.md").read_text()


def test_predictions_are_compared_with_measurements_and_with_an_accountant(tmp_path):
    predicted.main(["--tasks", "tiny", "--models", "linear", "--sizes", "60", "--epsilons", "1", "--seeds", "3",
                    "--out", str(tmp_path), "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path)])  # fmt: skip
    rows = rows_of(tmp_path / "predicted.csv")
    assert all(float(row["accountant_epsilon"]) == pytest.approx(1.0, abs=1e-3) for row in rows)
    ratios = [float(row["measured_cost"]) / float(row["predicted_cost"]) for row in rows]
    assert 0.01 < np.mean(ratios) < 10 and (tmp_path / "predicted.png").is_file()


def test_writers_and_images_are_compared_on_the_same_records(tmp_path, monkeypatch):
    def with_writers(data_dir, cache_dir):
        split = tiny_split(data_dir, cache_dir)
        parts = [part | {"writer": np.arange(120) // 4} for part in split[:3]]
        return splits.Split(*parts, "tiny")

    monkeypatch.setitem(tasks.TASKS, "tiny", tasks.Task("main", "tiny", "auroc", 1, PRETRAINING, with_writers))
    options = ["--task", "tiny", "--writers", "20", "--models", "linear", "--seeds", "1", "--out", str(tmp_path)]
    units.main([*options, "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path)])
    rows = rows_of(tmp_path / "units.csv")
    assert {(r["unit"], r["num_units"], r["num_records"]) for r in rows} == {
        ("image", "80", "80"),
        ("writer", "20", "80"),
    }
    assert (tmp_path / "units.md").read_text().count("linear") == 2


def test_units_need_records_that_name_their_writer(tmp_path):
    with pytest.raises(ValueError, match="name their writer"):
        units.main(["--task", "tiny", "--models", "linear", "--out", str(tmp_path),
                    "--data-dir", str(tmp_path), "--cache-dir", str(tmp_path)])  # fmt: skip
