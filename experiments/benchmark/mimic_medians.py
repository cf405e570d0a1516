"""Median AUROCs of the published MIMIC-III tasks over the runs that the benchmark made of each, as in arXiv:2311.09200.

python -m experiments.benchmark.mimic_medians --results experiments/out/mimic_published
"""

import argparse
import collections
import pathlib
import statistics
from collections.abc import Sequence

from experiments.benchmark.results import read_rows
from experiments.data.splits import run_cli


def medians(rows: list[dict[str, str]]) -> list[tuple]:
    """(task, model, method, epsilon, runs, median AUROC) of the published tasks, from rows of `arena.csv`."""
    runs = collections.defaultdict(list)
    for row in rows:
        if row["task"].endswith("_published") and row["metric_name"] == "auroc":
            key = (row["task"], row["model"], row["method"], float(row["epsilon"]))
            runs[key].append(float(row["metric"]))
    return [(*key, len(values), statistics.median(values)) for key, values in sorted(runs.items())]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, required=True, help="folder of arena.csv")
    path = parser.parse_args(argv).results / "arena.csv"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}: run `make mimic-published DATA=<directory of MIMIC-III>` first.")
    print("task model method epsilon runs median_auroc")
    for *names, value in medians(read_rows(path)):
        print(*names, f"{value:.4f}")


if __name__ == "__main__":
    run_cli(main)
