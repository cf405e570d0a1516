"""The arena: this library against existing private fine-tuning on equal terms, cell by cell, into one tidy CSV.

    python -m experiments.benchmark.grid                       # the whole grid; resumes after an interruption
    python -m experiments.benchmark.grid --part 0/2            # one of two processes that share the grid
    python -m experiments.benchmark.grid --models cnn --sizes 10000 --search-from 4000
    python -m experiments.benchmark.grid --settings-from DIR --best-baselines --out NEW   # anew, no search
    python -m experiments.benchmark.grid --tasks mnist_trained --sizes 1000 --epsilons 1 --seeds 3 --out DIR

A cell is task x model x n x epsilon. A seed is a private subsample of size n, the order of the public records (of which
a plan takes samples) and the noise; all methods share the subsamples. A baseline's hyperparameters are those with the
best mean test metric over the first two seeds: chosen on the test set, an advantage that ours does not get. A search
starts where that at the epsilon before ended and, with --search-from, where that at another n did. --settings-from
searches nothing: what DIR/arena.csv has is run again with the settings that it holds. Of the baselines, with
--best-baselines, the best in each cell and the best relative of DP-SGD are.
"""

import argparse
import contextlib
import csv
import fcntl
import itertools
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from experiments.benchmark import models, tasks
from experiments.benchmark.measure import measured
from experiments.benchmark.methods import BASELINES, DESCENT, METHODS, Cell, Method
from experiments.benchmark.search import Point, climb
from experiments.data.splits import run_cli, select

RESULTS = pathlib.Path(__file__).parents[1] / "results"
# Sized for a night on two cores: the CNN's searches at 10,000 records would take a day, if they did not start where
# those at 4000 ended, as in `make compare-full`.
SIZES = {
    "linear": (250, 1000, 4000, 10_000),
    "mlp": (250, 1000, 4000, 10_000),
    "cnn": (250, 1000, 4000),
    "gru": (250, 1000, 4000),
}
EPSILONS = (8.0, 2.0, 1.0, 0.5, 0.1)
SELECTION_SEEDS = 2
COLUMNS = (
    "task model n epsilon delta method seed metric_name metric loss seconds compile_seconds private_gradients "
    "noisy_steps peak_bytes settings lattice_point"
).split()
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax_privacy", "dp_accounting", "numpy", "scipy", "scikit-learn")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.OPEN_TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--models", nargs="+", default=["linear", "mlp", "cnn"], choices=list(models.MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, help="n, within what the task has; default: SIZES of the model")
    parser.add_argument("--epsilons", nargs="+", type=float, default=list(EPSILONS))
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0, help="searches see seeds 0 and 1, wherever the rows begin")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--metric", choices=list(models.METRICS), help="what baselines are chosen by; default: the task's"
    )
    parser.add_argument("--search-from", type=int, metavar="N", help="start searches where those at N records ended")
    parser.add_argument("--settings-from", type=pathlib.Path, metavar="DIR", help="run DIR/arena.csv again, no search")
    parser.add_argument("--best-baselines", action="store_true", help="of the baselines there, the best in each cell")
    parser.add_argument("--part", type=_part, default="0/1", help="i/m: the i-th, from 0, of m processes")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of arena.csv")
    args = parser.parse_args(argv)
    if args.best_baselines and args.settings_from is None:
        parser.error("--best-baselines chooses among the baselines of --settings-from")
    return args


def _part(text):
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected i/m with 0 <= i < m, found {text}")
    return int(part), int(parts)


def sizes_of(available: int, sizes: Sequence[int]) -> list[int]:
    """The sizes that the task has; its whole private part where the next size would exceed it by little or much."""
    return sorted({size for size in sizes if size <= available} or {available})


def columns_of_work(args, again: Iterable[tuple] | None = None) -> list[tuple[str, str, int, str]]:
    """(task, model, n, method), small n first: each search is warm-started by the one at the epsilon before.

    The whole grid; or, of the groups to run `again`, those that the arguments name.
    """
    part, parts = args.part
    columns = _grid(args) if again is None else _named(args, again)
    return sorted(columns, key=lambda column: column[2])[part::parts]


def _grid(args):
    pairs = [
        (task, model) for model in args.models for task in args.tasks if model in tasks.TASKS[task].pretraining
    ]  # fmt: skip
    work = []
    for task, model in pairs:
        available = len(tasks.load_split(task, args.data_dir, args.cache_dir).private["label"])
        names = [name for name in args.methods if model in METHODS[name].models]
        work += [(task, model, n, name) for n in sizes_of(available, args.sizes or SIZES[model]) for name in names]
    return work


def _named(args, groups):
    """A model on a task in turn, as it is pretrained each time."""
    columns = {(task, model, n, name) for task, model, n, _, name in groups}
    sizes = args.sizes or sorted({n for _, _, n, _ in columns})
    in_turn = itertools.product(args.models, args.tasks, sizes, args.methods)
    return [(task, model, n, name) for model, task, n, name in in_turn if (task, model, n, name) in columns]


def subsample(anchor: tasks.Anchor, n: int, seed: int) -> dict[str, np.ndarray]:
    """The private records of a seed, the same for every method."""
    private = anchor.split.private
    return select(private, np.random.default_rng([seed, n]).permutation(len(private["label"]))[:n])


def reordered(cell: Cell, seed: int) -> Cell:
    """The public records in an order of the seed's own, so that standard errors know of what a plan samples."""
    split = cell.anchor.split
    order = np.random.default_rng([seed, 1]).permutation(len(split.public["label"]))
    return cell._replace(anchor=cell.anchor._replace(split=split._replace(public=select(split.public, order))))


def choose(method: Method, cells: list[Cell], near: list[Point]) -> Point:
    """The lattice point of best mean test metric over the first seeds; () where nothing is chosen.

    The search starts at those points of `near` that are allowed, or where the method's searches do.
    """

    def score(point):
        settings = method.settings(point)
        return float(np.mean([metric_of(c, method.run(c, s, settings).params) for s, c in enumerate(cells)]))

    def allowed(point):
        return method.allowed(cells[0], method.settings(point))

    starts = [point for point in near if allowed(point)] or method.starts(cells[0].num_private)
    return climb(score, starts, allowed) if starts else ()


def metric_of(cell: Cell, params: Any) -> float:
    anchor = cell.anchor
    return models.evaluate(anchor.model, params, anchor.split.test, anchor.task.metric)


def group_rows(
    anchor, model_name, n, name, epsilon, args, near: list[Point], before: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """All seeds of one method in one cell, its hyperparameters chosen first, or those of a row that ran `before`."""
    method = METHODS[name]
    if before is None:
        searched = [_cell(anchor, n, seed, epsilon, args.delta) for seed in range(min(SELECTION_SEEDS, args.seeds))]
        point = choose(method, searched, near)
        settings = method.settings(point)
    else:
        point, settings = _point_of(before), json.loads(before["settings"])
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        cell = _cell(anchor, n, seed, epsilon, args.delta)
        rows.append(_row(anchor, model_name, cell, name, seed, settings, point, args.delta))
    return rows


def _cell(anchor, n, seed, epsilon, delta):
    return Cell(anchor, subsample(anchor, n, seed), epsilon, delta)


def _row(anchor, model_name, cell, name, seed, settings, point, delta):
    prepared = reordered(cell, seed)
    with measured() as cost:
        outcome = METHODS[name].run(prepared, seed, settings)
    metric, negative_loss = models.scores(
        anchor.model, outcome.params, anchor.split.test, (anchor.task.metric, "negative_loss")
    )
    return {
        "task": anchor.task.name,
        "model": model_name,
        "n": cell.num_private,
        "epsilon": cell.epsilon,
        "delta": delta,
        "method": name,
        "seed": seed,
        "metric_name": anchor.task.metric,
        "metric": round(metric, 6),
        "loss": round(-negative_loss, 6),
        "seconds": round(cost.seconds, 4),
        "compile_seconds": round(cost.compile_seconds, 4),
        "private_gradients": outcome.private_gradients,
        "noisy_steps": outcome.noisy_steps,
        "peak_bytes": cost.peak_bytes,
        "settings": json.dumps(settings),
        "lattice_point": " ".join(map(str, point)),
    }


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and list(rows[0]) != COLUMNS:
        raise ValueError(f"{path}: expected the columns {COLUMNS}, found {list(rows[0])}; move the file away.")
    return rows


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[TextIO]:
    """A file to read and append to, at the end that it has once no other process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        yield file


def append_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Appends a group's rows at once under a lock, so that processes share the file and none is left half written."""
    with _locked(path) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def record_run(path: pathlib.Path, module: str) -> None:
    """Command, versions and machine, beside the results."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    entry = {
        "command": shlex.join([pathlib.Path(sys.executable).name, "-m", module, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": {"cpu": cpu, "devices": [str(device) for device in jax.devices()], "system": platform.system()},
    }
    add_entry(path, entry)


def add_entry(path: pathlib.Path, entry: dict[str, Any]) -> None:
    """Adds to a JSON list unless it is there, under a lock: processes that share a grid start at the same time."""
    with _locked(path) as file:
        file.seek(0)
        entries = json.loads(file.read() or "[]")
        if entry not in entries:
            text = json.dumps([*entries, entry], indent=1) + "\n"
            file.truncate(0)
            file.write(text)


def write_table(
    out: pathlib.Path, name: str, columns: Sequence[str], rows: list[dict[str, Any]], script: str = ""
) -> None:
    """NAME.csv of one whole run of `script` (default NAME), and its command, versions and machine beside it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    runs = out / f"{name}_runs.json"
    runs.unlink(missing_ok=True)
    record_run(runs, f"experiments.studies.{script or name}")


def _lines(path):
    return pathlib.Path(path).read_text().splitlines() if pathlib.Path(path).is_file() else []


def group_of(row: dict[str, Any]) -> tuple[str, str, int, float, str]:
    """(task, model, n, epsilon, method): the seeds of a group share their settings."""
    return row["task"], row["model"], int(row["n"]), float(row["epsilon"]), row["method"]


def best_methods(rows: list[dict[str, str]], names: Sequence[str]) -> dict[tuple, str]:
    """Which of the methods `names` has the highest mean metric in each cell (task, model, n, epsilon)."""
    metrics: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        *cell, name = group_of(row)
        if name in names:
            metrics.setdefault(tuple(cell), {}).setdefault(name, []).append(float(row["metric"]))
    return {cell: max(sorted(found), key=lambda name: np.mean(found[name])) for cell, found in metrics.items()}


def to_run_again(rows: list[dict[str, str]], best_baselines: bool) -> dict[tuple, dict[str, str]]:
    """A row of each group; of the baselines' perhaps only the best in their cell, and the best relative of DP-SGD."""
    groups = {group_of(row): row for row in rows}
    if not best_baselines:
        return groups
    bests = [best_methods(rows, names) for names in (BASELINES, DESCENT)]
    return {
        (*cell, name): row
        for (*cell, name), row in groups.items()
        if name not in BASELINES or name in [best.get(tuple(cell)) for best in bests]
    }


def run(args) -> None:
    """Fills in what the CSV lacks."""
    path = args.out / "arena.csv"
    done = {group_of(row): row for row in read_rows(path)}
    again = None
    if args.settings_from is not None:
        again = to_run_again(read_rows(args.settings_from / "arena.csv"), args.best_baselines)
        if not again:
            raise ValueError(f"{args.settings_from}: found no rows of an arena.csv to run again.")
    work = columns_of_work(args, again)
    record_run(args.out / "arena_runs.json", "experiments.benchmark.grid")
    anchor, anchored = None, None
    progress = tqdm(total=sum(len(_epsilons(column[3], args)) for column in work), unit="group")
    for task, model_name, n, name in work:
        previous = None
        for epsilon in _epsilons(name, args):
            progress.set_description(f"{task} {model_name} n={n} {name} epsilon={epsilon:g}")
            group = (task, model_name, n, epsilon, name)
            if group not in done and (again is None or group in again):
                if anchored != (task, model_name):
                    anchor = tasks.make_anchor(tasks.TASKS[task], model_name, args.data_dir, args.cache_dir)
                    anchor = anchor._replace(task=anchor.task._replace(metric=args.metric or anchor.task.metric))
                    anchored = (task, model_name)
                near = _chosen(done, group, previous, args.search_from)
                before = again and again[group]
                rows = group_rows(anchor, model_name, n, name, epsilon, args, near, before)
                append_rows(path, rows)
                done[group] = {key: str(value) for key, value in rows[-1].items()}
            previous = epsilon
            progress.update()
    progress.close()


def _chosen(done, group, previous, size):
    """What was chosen beside a group: at the epsilon `previous`, and at `size` records."""
    task, model_name, n, epsilon, name = group
    beside = (task, model_name, n, previous, name), (task, model_name, size, epsilon, name)
    points = [_point_of(done[other]) for other in beside if other in done]
    return [point for point in points if point]


def _point_of(row):
    return tuple(map(int, row["lattice_point"].split()))


def _epsilons(name, args):
    """From large to small; a method that protects nothing has the one epsilon of infinity."""
    return sorted(args.epsilons, reverse=True) if METHODS[name].private else [math.inf]


def main(argv=None):
    args = parse_args(argv)
    run(args)
    print(f"results: {args.out / 'arena.csv'}")


if __name__ == "__main__":
    run_cli(main)
