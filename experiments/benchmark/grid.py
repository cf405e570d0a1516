"""The benchmark: this library against existing private fine-tuning on equal terms, setting by setting, in one tidy CSV.

    python -m experiments.benchmark.grid                       # the whole grid; resumes after an interruption
    python -m experiments.benchmark.grid --part 0/2            # one of two processes that share the grid
    python -m experiments.benchmark.grid --models cnn --sizes 10000 --search-from 4000
    python -m experiments.benchmark.grid --settings-from DIR --best-baselines --out NEW   # anew, no search
    python -m experiments.benchmark.grid --tasks mnist_trained --sizes 1000 --epsilons 1 --seeds 3 --out DIR

A setting is task x model x n x epsilon. A seed is a private subsample of size n, the order of the public records (of
which a plan takes samples) and the noise; all methods share the subsamples. A baseline's hyperparameters are those with
the best mean test metric over the first two seeds: chosen on the test set, an advantage that ours does not get. Those
of a method `rehearsed_...` are chosen by the loss of held-out public records (`rehearsal`). A search starts where that
at the epsilon before ended and, with --search-from, where that at another n did. --settings-from searches nothing: what
DIR/arena.csv has is run again with the hyperparameters that it holds. Of the baselines, with --best-baselines, the best
in each setting and the best relative of DP-SGD are.
"""

import argparse
import functools
import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tqdm import tqdm

from experiments.benchmark import models, rehearsal, runs, tasks
from experiments.benchmark.methods import BASELINES, DEFAULT_METHODS, DESCENT, METHODS
from experiments.benchmark.results import (
    RESULTS,
    Group,
    append_rows,
    best_methods,
    group_of,
    point_of,
    read_rows,
    record_run,
)
from experiments.benchmark.search import Point
from experiments.data.splits import run_cli

# Sized for a night on two cores: the CNN's searches at 10,000 records would take a day, if they did not start where
# those at 4000 ended, as in `make compare-full`.
SIZES = {
    "linear": (250, 1000, 4000, 10_000),
    "mlp": (250, 1000, 4000, 10_000),
    "cnn": (250, 1000, 4000),
    "gru": (250, 1000, 4000),
}
EPSILONS = (8.0, 2.0, 1.0, 0.5, 0.1)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
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
    parser.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        choices=list(METHODS),
        help="default: none that sees public data",
    )
    parser.add_argument(
        "--metric", choices=list(models.METRICS), help="what baselines are chosen by; default: the task's"
    )
    parser.add_argument("--search-from", type=int, metavar="N", help="start searches where those at N records ended")
    parser.add_argument("--settings-from", type=pathlib.Path, metavar="DIR", help="run DIR/arena.csv again, no search")
    parser.add_argument(
        "--best-baselines", action="store_true", help="of the baselines there, the best in each setting"
    )
    parser.add_argument("--part", type=_part, default="0/1", help="i/m: the i-th, from 0, of m processes")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of arena.csv")
    args = parser.parse_args(argv)
    if args.best_baselines and args.settings_from is None:
        parser.error("--best-baselines chooses among the baselines of --settings-from")
    return args


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected i/m with 0 <= i < m, found {text}")
    return int(part), int(parts)


# Which groups are run, and in which order


class Sweep(NamedTuple):
    """A method over all epsilons: the unit of work that processes share, as each search starts from the one before.

    Attributes:
      task: name of the task.
      model: name of the model.
      n: private records.
      method: name of the method.
    """

    task: str
    model: str
    n: int
    method: str

    def at(self, epsilon: float) -> Group:
        """The group at one epsilon."""
        return Group(self.task, self.model, self.n, epsilon, self.method)


def sweeps_of(args: argparse.Namespace, again: Iterable[Group] | None = None) -> list[Sweep]:
    """This process's part of the sweeps, small n first.

    The whole grid; or, of the groups to run `again`, those that the arguments name.
    """
    part, parts = args.part
    sweeps = _grid(args) if again is None else _named(args, again)
    return sorted(sweeps, key=lambda sweep: sweep.n)[part::parts]


def _grid(args: argparse.Namespace) -> list[Sweep]:
    pairs = [
        (task, model) for model in args.models for task in args.tasks if model in tasks.TASKS[task].pretraining
    ]  # fmt: skip
    sweeps = []
    for task, model in pairs:
        available = len(tasks.load_split(task, args.data_dir, args.cache_dir).private["label"])
        names = [name for name in args.methods if model in METHODS[name].models]
        for n in sizes_of(available, args.sizes or SIZES[model]):
            sweeps += [Sweep(task, model, n, name) for name in names]
    return sweeps


def _named(args: argparse.Namespace, groups: Iterable[Group]) -> list[Sweep]:
    """A model on a task in turn, as it is pretrained each time."""
    known = {Sweep(group.task, group.model, group.n, group.method) for group in groups}
    sizes = args.sizes or sorted({sweep.n for sweep in known})
    in_turn = itertools.product(args.models, args.tasks, sizes, args.methods)
    sweeps = [Sweep(task, model, n, name) for model, task, n, name in in_turn]
    return [sweep for sweep in sweeps if sweep in known]


def sizes_of(available: int, sizes: Sequence[int]) -> list[int]:
    """The sizes that the task has; its whole private part where the next size would exceed it by little or much."""
    return sorted({size for size in sizes if size <= available} or {available})


def epsilons_of(method: str, args: argparse.Namespace) -> list[float]:
    """From large to small; a method that protects nothing has the one epsilon of infinity."""
    return sorted(args.epsilons, reverse=True) if METHODS[method].private else [math.inf]


def to_run_again(rows: list[dict[str, str]], best_baselines: bool) -> dict[Group, dict[str, str]]:
    """A row of each group.

    Args:
      rows: of an `arena.csv`.
      best_baselines: whether of the baselines only the best in each setting, and the best relative of DP-SGD, are
        kept.
    """
    groups = {group_of(row): row for row in rows}
    if not best_baselines:
        return groups
    bests = [best_methods(rows, names) for names in (BASELINES, DESCENT)]
    return {
        group: row
        for group, row in groups.items()
        if group.method not in BASELINES or group.method in [best.get(group.setting) for best in bests]
    }


# Running them


def run(args: argparse.Namespace) -> None:
    """Fills in what the CSV lacks."""
    path = args.out / "arena.csv"
    done = {group_of(row): row for row in read_rows(path)}
    again = _before(args)
    sweeps = sweeps_of(args, again)
    record_run(args.out / "arena_runs.json", "experiments.benchmark.grid")
    # Sweeps of a model on a task follow each other, so that one is pretrained at a time.
    pretrained = functools.lru_cache(maxsize=1)(functools.partial(_pretrained, args))

    @functools.lru_cache(maxsize=1)
    def rehearsals(task: str, model: str) -> list[tasks.Pretrained]:
        return rehearsal.rehearsals(pretrained(task, model), model, args.metric or "negative_loss")

    with tqdm(total=sum(len(epsilons_of(sweep.method, args)) for sweep in sweeps), unit="group") as progress:
        for sweep in sweeps:
            previous = None
            for epsilon in epsilons_of(sweep.method, args):
                group = sweep.at(epsilon)
                progress.set_description(
                    f"{group.task} {group.model} n={group.n} {group.method} epsilon={group.epsilon:g}"
                )
                if group not in done and (again is None or group in again):
                    rows = runs.group_rows(
                        pretrained(group.task, group.model),
                        group,
                        delta=args.delta,
                        first_seed=args.first_seed,
                        num_seeds=args.seeds,
                        near=_chosen_beside(group, done, previous, args.search_from),
                        rehearsals=functools.partial(rehearsals, group.task, group.model),
                        before=again and again[group],
                    )
                    append_rows(path, rows)
                    done[group] = {key: str(value) for key, value in rows[-1].items()}
                previous = epsilon
                progress.update()


def _before(args: argparse.Namespace) -> dict[Group, dict[str, str]] | None:
    """What --settings-from names: a row of each group to run again; None without it."""
    if args.settings_from is None:
        return None
    again = to_run_again(read_rows(args.settings_from / "arena.csv"), args.best_baselines)
    if not again:
        raise ValueError(f"{args.settings_from}: found no rows of an arena.csv to run again.")
    return again


def _pretrained(args: argparse.Namespace, task: str, model: str) -> tasks.Pretrained:
    """The pretrained model; its task has the metric that the arguments name."""
    found = tasks.pretrained_on(tasks.TASKS[task], model, args.data_dir, args.cache_dir)
    return found._replace(task=found.task._replace(metric=args.metric or found.task.metric))


def _chosen_beside(
    group: Group, done: dict[Group, dict[str, str]], previous: float | None, size: int | None
) -> list[Point]:
    """What was chosen beside a group: at the epsilon `previous`, and at `size` records."""
    beside = (group._replace(epsilon=previous), group._replace(n=size))
    points = [point_of(done[other]) for other in beside if other in done]
    return [point for point in points if point]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the grid."""
    args = parse_args(argv)
    run(args)
    print(f"results: {args.out / 'arena.csv'}")


if __name__ == "__main__":
    run_cli(main)
