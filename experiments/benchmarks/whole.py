"""A whole fine-tune against DP-SGD at its best settings in the arena, at equal epsilon, on the arena's tasks.

Ours plans, passes and draws with nothing chosen; the baseline's hyperparameters are the best of its lattice, and the
search for them is not counted. Both are warm.
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from experiments.benchmark import grid, methods, tasks
from experiments.benchmarks import peers
from experiments.benchmarks.timing import WORSE, Row, race, row

PATH = "whole fine-tune"
GOAL = 10.0


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
    """One cell of the arena; nothing, with a notice, where its data or the baseline's settings are missing."""
    label = f"{task}, {model}, n={n}, epsilon={epsilon:g}"
    baseline = best_baseline(table, task, model, n, epsilon)
    if peers.find("jax_privacy") is None:
        return
    if baseline is None:
        print(f"notice: {label} is left out: no settings of a baseline in {table}")
        return
    try:
        anchor = tasks.make_anchor(tasks.TASKS[task], model, data, tasks.cache_dir())
    except FileNotFoundError as error:
        print(f"notice: {label} is left out: {error}")
        return
    cells = [methods.Cell(anchor, grid.subsample(anchor, n, seed), epsilon, 1e-5) for seed in range(seeds)]
    name, settings = baseline
    contestants = {
        "ours": lambda: methods.METHODS["qexp"].run(cells[0], 0, {}).params,
        "peer": lambda: methods.METHODS[name].run(cells[0], 0, settings).params,
    }
    times = race(contestants, seconds=seconds)
    ours, theirs = (_metric(cells, *one) for one in (("qexp", {}), baseline))
    metrics = f"{anchor.task.metric} {ours:.4f} against {theirs:.4f}" + (WORSE if ours < theirs else "")
    yield row(PATH, f"{label}, {metrics}", f"jax_privacy, {name}", times["ours"], times["peer"], GOAL)


def _metric(cells, name, settings):
    return np.mean([grid.metric_of(c, methods.METHODS[name].run(c, s, settings).params) for s, c in enumerate(cells)])


def best_baseline(table: pathlib.Path, task: str, model: str, n: int, epsilon: float) -> tuple[str, dict] | None:
    """The variant of DP-SGD of best mean metric in the arena's table, and its settings."""
    rows = grid.read_rows(table)
    name = grid.best_methods(rows, methods.DESCENT).get((task, model, n, epsilon))
    settings = {grid.group_of(row): row["settings"] for row in rows}
    return name and (name, json.loads(settings[task, model, n, epsilon, name]))
