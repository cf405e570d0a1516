"""Record-level against writer-level privacy on MNIST: what it costs to protect a person rather than an image.

    python -m experiments.studies.units

The private records are all images of `--writers` students; a unit is one image, or all images of one writer. Writes
units.csv and units.md into --out.
"""

import argparse
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.benchmark.results import RESULTS, write_table
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records, run_cli, select

COLUMNS = "task model unit num_units num_records epsilon delta method seed metric_name metric".split()
UNITS = ("image", "writer")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--task", default="mnist_writers", help="a task whose records name their writer")
    parser.add_argument("--models", nargs="+", default=["linear", "mlp"], choices=list(models.MODELS))
    parser.add_argument("--writers", type=int, default=250)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


def of_writers(records: Records, count: int, seed: int) -> Records:
    """All records of `count` random writers."""
    chosen = np.random.default_rng([seed, count]).permutation(np.unique(records["writer"]))[:count]
    return select(records, np.flatnonzero(np.isin(records["writer"], chosen)))


def release(
    pretrained: Pretrained, private: Records, unit: str, epsilon: float, delta: float, seed: int
) -> tuple[Any, int]:
    """Parameters and number of units; both units see the same records.

    Args:
      pretrained: where the release starts, and the public records.
      private: records that name their writer.
      unit: one of `UNITS`.
      epsilon: of the release.
      delta: of the release.
      seed: of the noise.
    """
    data: dict[str, Any] = {"public": pretrained.split.public, "private": private}
    if unit == "writer":
        data = {name: qexp_jax.Dataset(records=part, unit_ids=part["writer"]) for name, part in data.items()}
    found = qexp_jax.fine_tune(
        jax.random.key(seed), pretrained.model.loss_fn, pretrained.params, **data, epsilon=epsilon, delta=delta,
    )  # fmt: skip
    return found.params, found.certificate["num_units"]


def rows_of(
    pretrained: Pretrained, model_name: str, args: argparse.Namespace, progress: tqdm
) -> Iterator[dict[str, Any]]:
    """All seeds, units and epsilons for one pretrained model.

    Args:
      pretrained: where all releases start.
      model_name: in the table.
      args: the command line.
      progress: is told of each release.
    """
    metric = pretrained.task.metric
    for seed in range(args.seeds):
        private = of_writers(pretrained.split.private, args.writers, seed)
        for unit in UNITS:
            for epsilon in args.epsilons:
                params, num_units = release(pretrained, private, unit, epsilon, args.delta, seed)
                value = models.evaluate(pretrained.model, params, pretrained.split.test, metric)
                yield {
                    "task": pretrained.task.name,
                    "model": model_name,
                    "unit": unit,
                    "num_units": num_units,
                    "num_records": len(private["label"]),
                    "epsilon": epsilon,
                    "delta": args.delta,
                    "method": "qexp",
                    "seed": seed,
                    "metric_name": metric,
                    "metric": round(value, 6),
                }
                progress.update()


def table(rows: list[dict[str, Any]], pretrained_metrics: dict[str, float]) -> str:
    """Mean and standard error, a line for each model and unit; the pretrained models' metrics are by model."""
    epsilons = sorted({row["epsilon"] for row in rows})
    lines = [
        "| model | unit | units | pretrained | " + " | ".join(f"epsilon {e:g}" for e in epsilons) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(epsilons),
    ]
    for model_name in dict.fromkeys(row["model"] for row in rows):
        for unit in UNITS:
            releases = [row for row in rows if (row["model"], row["unit"]) == (model_name, unit)]
            num_units = round(np.mean([row["num_units"] for row in releases]))
            values = [np.array([row["metric"] for row in releases if row["epsilon"] == e]) for e in epsilons]
            texts = [f"{v.mean():.4f} ± {v.std() / max(1, len(v) - 1) ** 0.5:.4f}" for v in values]
            before = pretrained_metrics[model_name]
            lines.append(f"| {model_name} | {unit} | {num_units} | {before:.4f} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all releases; writes the tables."""
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []
    pretrained_metrics: dict[str, float] = {}
    with tqdm(total=len(args.models) * args.seeds * len(UNITS) * len(args.epsilons), unit="release") as progress:
        for model_name in args.models:
            pretrained = tasks.pretrained_on(tasks.TASKS[args.task], model_name, args.data_dir, args.cache_dir)
            split = pretrained.split
            if "writer" not in split.private:
                raise ValueError(f"Expected records that name their writer, found {list(split.private)}.")
            pretrained_metrics[model_name] = models.evaluate(
                pretrained.model, pretrained.params, split.test, pretrained.task.metric
            )
            rows += rows_of(pretrained, model_name, args, progress)
    write_table(args.out, "units", COLUMNS, rows, module="experiments.studies.units")
    (args.out / "units.md").write_text(table(rows, pretrained_metrics))
    print(table(rows, pretrained_metrics))


if __name__ == "__main__":
    run_cli(main)
