"""The benchmark's results as pages and pictures.

    python -m experiments.benchmark.report [--results DIR]   # DIR holds arena.csv; default experiments/results

Writes beside the CSV, complete or not: README.md, what is read first; for each table that the CSV holds a page of every
setting, `main.md` and so on; and three pictures of the first table. What has not been run yet is shown as missing.
"""

import argparse
import pathlib
from collections.abc import Sequence

from experiments.benchmark import comparison, figures, summary, tables

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of arena.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes pages and pictures."""
    folder = parse_args(argv).results
    df = comparison.read(folder / "arena.csv")
    # In the order of the alphabet "main" comes before the others.
    of_tables = dict(list(df.groupby("table")))
    for name, rows in of_tables.items():
        (folder / f"{name}.md").write_text(tables.page(name, rows, comparison.compare(rows)), encoding="utf-8")
    first = next(iter(of_tables.values()))
    (folder / "README.md").write_text(summary.page(first), encoding="utf-8")
    compared = comparison.compare(first)
    figures.epsilon_figure(first, compared, folder / "epsilon.png")
    figures.time_figure(first, folder / "time.png")
    figures.gain_figure(compared, folder / "gain.png")
    print(f"wrote README.md, {', '.join(f'{name}.md' for name in of_tables)} and three pictures into {folder}")


if __name__ == "__main__":
    main()
