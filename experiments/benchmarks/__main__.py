"""How fast the hot paths are: ratios to other libraries and to their own parts, one device, one thread on a CPU.

    python -m experiments.benchmarks

Each line races ours against a peer in turns in this one process and compares medians, compilation excluded; `ratio` is
the peer's time over ours and `goal` the least that it should be. Writes benchmarks.csv and benchmarks.md into --out. A
peer that is not installed (extra `benchmarks`) is left out with a notice.
"""

import argparse
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version

# Before JAX starts: every side has one thread. A GPU's host needs its own.
if __name__ == "__main__" and shutil.which("nvidia-smi") is None:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
from tqdm import tqdm

from experiments.benchmark import tasks
from experiments.benchmark.results import RESULTS, write_table
from experiments.benchmarks import cases, curvature, draws, first, libraries, modes, private_pass, timing, whole
from experiments.data.splits import run_cli

PATHS = ("private", "draws", "curvature", "modes", "whole", "first")
FIRST = [("toy", 1000), ("linear", 1000), ("mlp", 1000), ("cnn", 1000), ("mlp", 10_000)]
WHOLE = [
    ("physionet_icu", "linear"), ("physionet_icu", "mlp"), ("mnist_trained", "linear"), ("mnist_trained", "mlp"),
    ("mnist_trained", "cnn"),
]  # fmt: skip
NO_GOAL = "—"
# Why a goal is missed: (path, how its case begins) -> a line; shown where one is.
SHORTFALLS = {
    (private_pass.PATH, "linear, n=512, orthonormal"): "a product of each gradient with a dense 256 x 7850 matrix, "
    "which the peer does not make",
    (private_pass.PATH, ""): "sums are exact, in integers, and whitened, which the peer's are not",
    (draws.PATH, ""): "the same triangular solve, within the noise of the clock",
    (whole.PATH, "physionet"): "a tilt, its training and twelve rounds start many programs of less work than it takes "
    "to start them; the peer starts one a step",
    (whole.PATH, ""): "a metric lower by less than it varies from seed to seed, or programs too small for the device",
    (first.PATH, "import"): "many modules of Python",
    **dict.fromkeys(
        [(first.PATH, "cnn, n=1137"), (first.PATH, "mlp, n=10137")],
        "the passes themselves take most of it, and the sum over another number of records is compiled anew",
    ),
    (first.PATH, ""): "46 to 50 programs are compiled, where the peer has 3 to 8: features, two curvatures, the tilt, "
    "the choice and the length of a step",
}


def _default_records() -> int:
    """A CPU's caches decide, not the number; an accelerator must be filled."""
    return 512 if jax.default_backend() == "cpu" else 8192


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long a race takes")
    parser.add_argument("--records", type=int, default=_default_records(), help="of the linear model; others fewer")
    parser.add_argument("--dims", nargs="+", type=int, default=[256, 2048, 8192], help="k of the draws")
    parser.add_argument("--tiny", action="store_true", help="sizes that finish at once, and mean nothing")
    parser.add_argument("--data-dir", type=pathlib.Path, default=tasks.data_dir(), help="default: $QEXP_DATA")
    parser.add_argument("--table", type=pathlib.Path, default=RESULTS / "arena.csv", help="with the baselines' rows")
    parser.add_argument("--epsilon", type=float, default=1.0, help="of the whole fine-tune")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


def races(args: argparse.Namespace) -> Iterator[tuple[str, Iterator[timing.Row]]]:
    """(label, iterator of rows) of all that is asked for."""
    tiny = args.tiny
    seconds = args.seconds
    n = 8 if tiny else args.records
    tokens = 8 if tiny else 64
    dim = 8 if tiny else 256
    if "private" in args.paths:
        for case in (cases.linear(n), cases.cnn(n // 2), cases.transformer(max(4, n // 8), tokens)):
            yield private_pass.PATH, private_pass.rows(case, dim=dim, rank=dim // 2, seconds=seconds)
    if "draws" in args.paths:
        for k in (dim,) if tiny else args.dims:
            for num_draws in (1, 8 if tiny else 1000):
                yield draws.PATH, draws.rows(k, num_draws, seconds=seconds)
    if "curvature" in args.paths:
        for case in (cases.mlp(n // 4), cases.cnn(n // 8 or 1)):
            yield curvature.PATH, curvature.rows(case, dim, seconds=seconds)
    if "modes" in args.paths:
        for case in (cases.linear(n), cases.cnn(n // 4), cases.transformer(max(4, n // 16), tokens)):
            for k in (2,) if tiny else (1, 4, 16, 256):
                yield modes.PATH, modes.rows(case, k, seconds=seconds)
    if "whole" in args.paths:
        for task, model in WHOLE[:1] if tiny else WHOLE:
            num_private = 250 if tiny else 1000
            seeds = 1 if tiny else 3
            options = {"table": args.table, "data": args.data_dir, "seeds": seeds, "seconds": seconds}
            yield whole.PATH, whole.rows(task, model, num_private, args.epsilon, **options)
    if "first" in args.paths:
        yield first.PATH, first.import_rows()
        for model, n in [("toy", 100)] if tiny else FIRST:
            yield first.PATH, first.rows(model, n)


def table(rows: Sequence[timing.Row], ceilings: dict[str, float]) -> str:
    """The rows in words, with the machine's two ceilings."""
    lines = [
        f"Device: {timing.device()}; copy {ceilings['copy_gb_per_s']:.1f} GB/s, "
        f"float32 matrix product {ceilings['product_tflop_per_s']:.3f} TFLOP/s.",
        "",
        "| path | case | peer | ours, ms | peer, ms | ratio | goal | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        goal = NO_GOAL
        met = NO_GOAL
        if row["goal"]:
            goal = f"{row['goal']:.3g}"
            met = "yes" if timing.met(row) else "**no**"
        times = f"{1e3 * row['ours_seconds']:.4g} | {1e3 * row['peer_seconds']:.4g} | {row['ratio']:.2f}"
        lines.append(f"| {row['path']} | {row['case']} | {row['peer']} | {times} | {goal} | {met} |")
    if missed := {shortfall(row) for row in rows if not timing.met(row)}:
        lines += ["", "What falls short, and why:", "", *sorted(missed)]
    return "\n".join(lines) + "\n"


def shortfall(row: timing.Row) -> str:
    """Why a row misses its goal, as an item of a list."""
    reasons = (
        f"- {path}{', ' if case else ''}{case}: {why}."
        for (path, case), why in SHORTFALLS.items()
        if row["path"] == path and row["case"].startswith(case)
    )
    return next(reasons, f"- {row['path']}, {row['case']}, {row['peer']}: not explained.")


def record_peers(path: pathlib.Path) -> None:
    """Adds the peers' versions to the run's provenance."""
    runs = json.loads(path.read_text())
    installed = [name for module, name in libraries.DISTRIBUTIONS.items() if libraries.find(module) is not None]
    runs[-1]["versions"] |= {name: version(name) for name in installed}
    runs[-1]["xla_flags"] = os.environ.get("XLA_FLAGS", "").split()
    path.write_text(json.dumps(runs, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the races; writes the tables."""
    args = parse_args(argv)
    rows = []
    with tqdm(unit="row") as progress:
        for label, lines in races(args):
            progress.set_description(label)
            for line in lines:
                rows.append(line)
                progress.write(
                    f"{line['case']}; {line['peer']}: ratio {line['ratio']:.2f}, goal {line['goal'] or NO_GOAL}"
                )
                progress.update()
    ceilings = timing.ceilings(args.tiny, args.seconds)
    write_table(args.out, "benchmarks", timing.COLUMNS, rows, module="experiments.benchmarks")
    record_peers(args.out / "benchmarks_runs.json")
    (args.out / "benchmarks.md").write_text(table(rows, ceilings))
    print(table(rows, ceilings))


if __name__ == "__main__":
    run_cli(main)
