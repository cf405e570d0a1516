"""A whole fine-tune against DP-SGD at its best hyperparameters in the benchmark, at equal epsilon, on the same tasks.

Ours plans, passes and draws with nothing chosen; the baseline's hyperparameters are the best of its lattice, and the
search for them is not counted. Both are warm.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from experiments.benchmark import results, tasks
from experiments.benchmark.methods import DESCENT, METHODS
from experiments.benchmark.runs import metric_of, subsample
from experiments.benchmark.setting import Hyperparameters, Setting
from experiments.benchmarks.libraries import find
from experiments.benchmarks.timing import WORSE, Row, race, row

PATH = "whole fine-tune"
GOAL = 1.0
DELTA = 1e-5


def rows(
    task: str,
    model: str,
    n: int,
    epsilon: float,
    *,
    table: pathlib.Path,
    data: pathlib.Path,
    seeds: int,
    seconds: float,
) -> Iterator[Row]:
    """One setting; nothing, with a notice, where its data or the baseline's hyperparameters are missing.

    Args:
      task: name of the task.
      model: name of the model.
      n: private records.
      epsilon: of both sides.
      table: `arena.csv` of the benchmark.
      data: folder with what the publishers distribute.
      seeds: over which metrics are averaged.
      seconds: about how long the race may take.
    """
    label = f"{task}, {model}, n={n}, epsilon={epsilon:g}"
    baseline = best_baseline(table, task, model, n, epsilon)
    if find("jax_privacy") is None:
        return
    if baseline is None:
        print(f"notice: {label} is left out: no settings of a baseline in {table}")
        return
    try:
        pretrained = tasks.pretrained_on(tasks.TASKS[task], model, data, tasks.cache_dir())
    except FileNotFoundError as error:
        print(f"notice: {label} is left out: {error}")
        return
    settings = [Setting(pretrained, subsample(pretrained, n, seed), epsilon, DELTA) for seed in range(seeds)]
    name, hyperparameters = baseline
    calls = {
        "ours": lambda: METHODS["qexp"].run(settings[0], 0, {}).params,
        "peer": lambda: METHODS[name].run(settings[0], 0, hyperparameters).params,
    }
    times = race(calls, seconds=seconds)
    ours = _mean_metric(settings, "qexp", {})
    theirs = _mean_metric(settings, name, hyperparameters)
    metrics = f"{pretrained.task.metric} {ours:.4f} against {theirs:.4f}" + (WORSE if ours < theirs else "")
    yield row(PATH, f"{label}, {metrics}", f"jax_privacy, {name}", times["ours"], times["peer"], GOAL)


def _mean_metric(settings: list[Setting], name: str, hyperparameters: Hyperparameters) -> float:
    """Over seeds, one for each setting."""
    runs = (METHODS[name].run(setting, seed, hyperparameters) for seed, setting in enumerate(settings))
    return np.mean([metric_of(setting, run.params) for setting, run in zip(settings, runs, strict=True)])


def best_baseline(
    table: pathlib.Path, task: str, model: str, n: int, epsilon: float
) -> tuple[str, Hyperparameters] | None:
    """The variant of DP-SGD of best mean metric in a setting, and its hyperparameters; None where there is none.

    Args:
      table: `arena.csv` of the benchmark.
      task: name of the task.
      model: name of the model.
      n: private records.
      epsilon: of the setting.
    """
    rows = results.read_rows(table)
    name = results.best_methods(rows, DESCENT).get((task, model, n, epsilon))
    if name is None:
        return None
    by_group = {results.group_of(row): row["settings"] for row in rows}
    return name, json.loads(by_group[results.Group(task, model, n, epsilon, name)])
