"""Tables of results on disk: reading and appending rows that several processes share, and how a table was made."""

import contextlib
import csv
import fcntl
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from experiments.benchmark.search import Point

RESULTS = pathlib.Path(__file__).parents[1] / "results"
COLUMNS = (
    "table task pretraining model n epsilon delta method seed metric_name metric loss seconds compile_seconds "
    "private_gradients noisy_steps peak_bytes settings lattice_point search_seconds"
).split()
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax_privacy", "dp_accounting", "numpy", "scipy", "scikit-learn")


class Group(NamedTuple):
    """A method in a setting: its seeds share their hyperparameters.

    Attributes:
      task: name of the task.
      model: name of the model.
      n: private records.
      epsilon: infinite for methods that protect nothing.
      method: name of the method.
    """

    task: str
    model: str
    n: int
    epsilon: float
    method: str

    @property
    def setting(self) -> tuple[str, str, int, float]:
        """(task, model, n, epsilon)."""
        return self.task, self.model, self.n, self.epsilon


def group_of(row: dict[str, Any]) -> Group:
    """The group that a row belongs to."""
    return Group(row["task"], row["model"], int(row["n"]), float(row["epsilon"]), row["method"])


def point_of(row: dict[str, str]) -> Point:
    """The lattice point of a row's hyperparameters; () where nothing was chosen."""
    return tuple(map(int, row["lattice_point"].split()))


def best_methods(rows: list[dict[str, str]], names: Sequence[str]) -> dict[tuple, str]:
    """Which of the methods `names` has the highest mean metric in each setting (task, model, n, epsilon)."""
    metrics: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        group = group_of(row)
        if group.method in names:
            of_setting = metrics.setdefault(group.setting, {})
            of_setting.setdefault(group.method, []).append(float(row["metric"]))
    # Of equal ones the first by name, whatever the order of the rows.
    return {setting: max(sorted(found), key=lambda name: np.mean(found[name])) for setting, found in metrics.items()}


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of an `arena.csv`; none where the file is missing.

    Raises:
      ValueError: the file has other columns than `COLUMNS`.
    """
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


def write_table(
    out: pathlib.Path, name: str, columns: Sequence[str], rows: list[dict[str, Any]], *, module: str
) -> None:
    """A table of one whole run, with its command, versions and machine beside it; earlier ones are replaced.

    Args:
      out: folder, made where it is missing.
      name: of NAME.csv and NAME_runs.json.
      columns: of the table, in order.
      rows: with these columns.
      module: that ran, as after `python -m`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    runs = out / f"{name}_runs.json"
    runs.unlink(missing_ok=True)
    record_run(runs, module)


def record_run(path: pathlib.Path, module: str) -> None:
    """Adds command, versions and machine to the list at `path`, beside the results."""
    entry = {
        "command": shlex.join([pathlib.Path(sys.executable).name, "-m", module, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": {
            "cpu": _processor(),
            "devices": [str(device) for device in jax.devices()],
            "system": platform.system(),
        },
    }
    add_entry(path, entry)


def _processor() -> str:
    """The processor's name, where the system says."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def add_entry(path: pathlib.Path, entry: dict[str, Any]) -> None:
    """Adds to a JSON list unless it is there, under a lock: processes that share a grid start at the same time."""
    with _locked(path) as file:
        file.seek(0)
        entries = json.loads(file.read() or "[]")
        if entry not in entries:
            text = json.dumps([*entries, entry], indent=1) + "\n"
            file.truncate(0)
            file.write(text)
