"""The benchmark's results as one page and three pictures.

    python -m experiments.benchmark.report [--results DIR]   # DIR holds arena.csv; default experiments/results

Writes arena.md, arena_epsilon.png, arena_time.png and arena_gain.png beside the CSV, complete or not: what has not been
run yet is shown as missing.
"""

import argparse
import pathlib
from collections.abc import Sequence

from experiments.benchmark import comparison, figures, tables

RESULTS = pathlib.Path(__file__).parents[1] / "results"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of arena.csv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes page and pictures."""
    folder = parse_args(argv).results
    df = comparison.read(folder / "arena.csv")
    compared = comparison.compare(df)
    (folder / "arena.md").write_text(tables.page(df, compared), encoding="utf-8")
    figures.epsilon_figure(df, compared, folder / "arena_epsilon.png")
    figures.time_figure(df, folder / "arena_time.png")
    figures.gain_figure(compared, folder / "arena_gain.png")
    print(f"wrote arena.md and three pictures into {folder}")


if __name__ == "__main__":
    main()
