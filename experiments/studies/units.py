"""Record-level against writer-level privacy on MNIST: what it costs to protect a person rather than an image.

    python -m experiments.studies.units

The private records are all images of `--writers` students; a unit is one image, or all images of one writer. Writes
units.csv and units.md into --out.
"""

import argparse
import pathlib

import jax
import numpy as np
from tqdm import tqdm

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.benchmark.grid import RESULTS, write_table
from experiments.data.splits import run_cli, select

COLUMNS = "task model unit num_units num_records epsilon delta method seed metric_name metric".split()
UNITS = ("image", "writer")


def parse_args(argv=None):
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


def of_writers(records, count, seed):
    """All records of `count` random writers."""
    chosen = np.random.default_rng([seed, count]).permutation(np.unique(records["writer"]))[:count]
    return select(records, np.flatnonzero(np.isin(records["writer"], chosen)))


def release(anchor, private, unit, epsilon, delta, seed):
    """Parameters and number of units; both units see the same records."""
    data = {"public": anchor.split.public, "private": private}
    if unit == "writer":
        data = {name: qexp_jax.Dataset(records=found, unit_ids=found["writer"]) for name, found in data.items()}
    found = qexp_jax.fine_tune(
        jax.random.key(seed), anchor.model.loss_fn, anchor.params, **data, epsilon=epsilon, delta=delta,
    )  # fmt: skip
    return found.params, found.certificate["num_units"]


def rows_of(anchor, model_name, args, progress):
    metric = anchor.task.metric
    for seed in range(args.seeds):
        private = of_writers(anchor.split.private, args.writers, seed)
        for unit in UNITS:
            for epsilon in args.epsilons:
                params, num_units = release(anchor, private, unit, epsilon, args.delta, seed)
                value = models.evaluate(anchor.model, params, anchor.split.test, metric)
                labels = anchor.task.name, model_name, unit, num_units, len(private["label"]), epsilon, args.delta
                yield dict(zip(COLUMNS, (*labels, "qexp", seed, metric, round(value, 6)), strict=True))
                progress.update()


def table(rows, floors):
    """Mean and standard error, a line for each model and unit."""
    epsilons = sorted({row["epsilon"] for row in rows})
    lines = [
        "| model | unit | units | pretrained | " + " | ".join(f"epsilon {e:g}" for e in epsilons) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(epsilons),
    ]
    for model_name in dict.fromkeys(row["model"] for row in rows):
        for unit in UNITS:
            mine = [row for row in rows if (row["model"], row["unit"]) == (model_name, unit)]
            units = round(np.mean([row["num_units"] for row in mine]))
            values = [np.array([row["metric"] for row in mine if row["epsilon"] == e]) for e in epsilons]
            cells = [f"{v.mean():.4f} ± {v.std() / max(1, len(v) - 1) ** 0.5:.4f}" for v in values]
            lines.append(f"| {model_name} | {unit} | {units} | {floors[model_name]:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_args(argv)
    rows, floors = [], {}
    with tqdm(total=len(args.models) * args.seeds * len(UNITS) * len(args.epsilons), unit="release") as progress:
        for model_name in args.models:
            anchor = tasks.make_anchor(tasks.TASKS[args.task], model_name, args.data_dir, args.cache_dir)
            if "writer" not in anchor.split.private:
                raise ValueError(f"Expected records that name their writer, found {list(anchor.split.private)}.")
            floors[model_name] = models.evaluate(anchor.model, anchor.params, anchor.split.test, anchor.task.metric)
            rows += rows_of(anchor, model_name, args, progress)
    write_table(args.out, "units", COLUMNS, rows)
    (args.out / "units.md").write_text(table(rows, floors))
    print(table(rows, floors))


if __name__ == "__main__":
    run_cli(main)
