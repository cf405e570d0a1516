import collections
import csv
import itertools
import json
import time

import pytest

from experiments.benchmark import results
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import cases, libraries, private_pass, timing, whole


def test_a_race_tells_the_slower_call():
    waits = {"fast": 0.002, "slow": 0.006}
    times = timing.race({name: lambda s=s: time.sleep(s) for name, s in waits.items()}, seconds=0.1)
    assert 1.5 < times["slow"] / times["fast"] < 4.5


def test_in_a_race_nobody_mostly_runs_after_the_same_other():
    names, order = "abcd", []
    timing.race({name: lambda n=name: (order.append(n), time.sleep(0.006)) for name in names}, seconds=0.8)
    turns = order[2 * len(names) :]
    followed = collections.Counter(itertools.pairwise(turns))
    assert len(turns) > 80 and max(followed.values()) < 0.6 * len(turns) / len(names)


def test_a_ratio_is_the_peers_time_over_ours_and_a_missed_goal_shows():
    line = timing.row("path", "case", "peer", 2.0, 3.0, 1.6)
    assert line["ratio"] == 1.5 and not timing.met(line) and timing.met(line | {"goal": 1.5})
    assert not timing.met(line | {"goal": 1.5, "case": "case" + timing.WORSE})
    ceilings = {"copy_gb_per_s": 1.0, "product_tflop_per_s": 1.0}
    assert "| 1.50 | 1.6 | **no** |" in benchmarks.table([line], ceilings)
    assert "What falls short, and why:\n\n- path, case, peer: not explained." in benchmarks.table([line], ceilings)
    assert "falls short" not in benchmarks.table([line | {"goal": 1.5}], ceilings)
    assert "| 1.50 | — | — |" in benchmarks.table([line | {"goal": ""}], ceilings)


def test_the_private_pass_is_raced_and_a_missing_peer_is_left_out(monkeypatch, capsys):
    setups = private_pass.setups
    monkeypatch.setattr(private_pass, "setups", lambda *args: list(setups(*args))[::2])
    monkeypatch.setattr(libraries.importlib, "import_module", lambda name: _only({"opacus", "torch"}, name))
    libraries.find.cache_clear()
    lines = list(private_pass.rows(cases.linear(8), dim=4, rank=2, seconds=0.01))
    libraries.find.cache_clear()
    assert [line["peer"] for line in lines] == [
        "jax_privacy clipped_grad", "sum of its parts",
        "jax_privacy clipped_grad", "sum of its parts", "vmap(grad) sum",
    ]  # fmt: skip
    assert all(line["ours_seconds"] > 0 and line["peer_seconds"] > 0 for line in lines)
    assert "notice: opacus is left out" in capsys.readouterr().out


_IMPORT = libraries.importlib.import_module


def _only(missing, name):
    if name in missing:
        raise ImportError(name)
    return _IMPORT(name)


@pytest.mark.filterwarnings("ignore")  # peers, where they are installed, give their own
def test_the_command_writes_table_and_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    benchmarks.main(["--tiny", "--seconds", "0.01", "--paths", "draws", "--out", str(tmp_path)])
    with (tmp_path / "benchmarks.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == timing.COLUMNS and {line["path"] for line in lines} == {"draws"}
    assert "jax.random.multivariate_normal" in (tmp_path / "benchmarks.md").read_text()
    run = json.loads((tmp_path / "benchmarks_runs.json").read_text())[0]
    assert run["command"].split()[1:3] == ["-m", "experiments.benchmarks"]
    assert run["versions"]["jax_privacy"] and run["machine"]["cpu"]


def test_the_baseline_of_a_setting_is_its_best_in_the_benchmark(tmp_path):
    fixed = dict.fromkeys(results.COLUMNS, "") | {"task": "t", "model": "m", "n": 10, "epsilon": 1.0}
    rows = [
        fixed | {"method": name, "metric": metric, "settings": json.dumps({"steps": steps})}
        for name, metric, steps in [
            ("dp_gd", 0.7, 1),
            ("dp_sgd_all", 0.6, 2),
            ("dp_sgd_all", 0.9, 2),
            ("qexp", 0.99, 3),
        ]
    ]
    results.append_rows(tmp_path / "arena.csv", rows)
    assert whole.best_baseline(tmp_path / "arena.csv", "t", "m", 10, 1.0) == ("dp_sgd_all", {"steps": 2})
    assert whole.best_baseline(tmp_path / "arena.csv", "t", "m", 11, 1.0) is None


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_every_model_has_a_finite_loss(name):
    case = cases.transformer(2, 8) if name == "transformer" else cases.cnn(2)
    assert case.loss_fn(case.params, {key: value[0] for key, value in case.records.items()}) > 0
