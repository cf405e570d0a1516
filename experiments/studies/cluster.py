"""One release over the processes of a cluster: the same script on one machine, under SLURM and on TPU pods.

    python -m experiments.studies.cluster --local 2                                    # two processes on this machine
    srun --ntasks-per-node=1 python -m experiments.studies.cluster                     # SLURM, one process a node
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd qexp_jax && python -m experiments.studies.cluster"

Every process loads its share of the private images and calls `fine_tune` with the same public data over a mesh of all
devices; `jax.distributed.initialize()` finds the others by itself. The first process's key is taken by all, noise is
added once, and the first process alone writes certificate.json and params.msgpack into --out. If a process dies, the
others end with an error and nothing is written. With --checkpoint, a restart goes on where it stopped.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import flax.serialization
import jax
import numpy as np

import qexp_jax
from experiments import demo
from experiments.benchmark import models
from experiments.data import mnist
from experiments.data.splits import Split, run_cli, select

OUT = pathlib.Path(__file__).parents[1] / "out" / "cluster"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, help="start so many processes on this machine, on the CPU")
    parser.add_argument("--coordinator", help="host:port; by default found from the cluster's environment")
    parser.add_argument("--process", type=int, help="number of this process, with --coordinator")
    parser.add_argument("--processes", type=int, help="number of all processes, with --coordinator")
    parser.add_argument("--model", default="cnn", choices=list(models.MODELS))
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder with full MNIST and QMNIST's labels")
    parser.add_argument("--num-private", type=int, default=5000, help="private records used of full MNIST")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder; its sums are not private")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    return parser.parse_args(argv)


def start_locally(count: int, arguments: Sequence[str]) -> int:
    """Runs this script `count` times, and ends with the first exit status that is not 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.studies.cluster", *arguments, "--coordinator", f"localhost:{port}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, "--process", str(i), "--processes", str(count)], env=environment)
        for i in range(count)
    ]
    # All are waited for before any status is looked at.
    statuses = [process.wait() for process in started]
    return next((status for status in statuses if status), 0)


def write(release: qexp_jax.Release, accuracies: dict[str, float], out: pathlib.Path) -> None:
    """All files under temporary names first, so that none is there alone or by half."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "certificate.json": json.dumps(release.certificate, indent=2).encode(),
        "params.msgpack": flax.serialization.to_bytes(jax.device_get(release.params)),
        "metrics.json": json.dumps(accuracies, indent=2).encode(),
    }
    for name, content in contents.items():
        (out / f"{name}.tmp").write_bytes(content)
    for name in contents:
        os.replace(out / f"{name}.tmp", out / name)


def load(args: argparse.Namespace) -> tuple[Split, dict[str, Any]]:
    """The images, and the hyperparameters of pretraining on them."""
    if args.data_dir is None:
        return mnist.packaged_mnist(), demo.PRETRAIN
    return mnist.writers_mnist(args.data_dir, num_private=args.num_private), demo.PRETRAIN_FULL


def main(argv: Sequence[str] | None = None) -> None:
    """One process's share of the release; with --local, the start of all of them."""
    args = parse_args(argv)
    if args.local:
        raise SystemExit(start_locally(args.local, _without_local(argv or sys.argv[1:])))
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
    process = jax.process_index()
    num_processes = jax.process_count()
    model = models.make_model(args.model, 10)
    split, hyperparameters = load(args)
    start = models.init(model, jax.random.key(1), split.public)
    name = f"process {process}: pretraining"
    pretrained = models.train(model, start, split.public, **hyperparameters, seed=0, name=name)
    num_private = demo.num_private(split)
    own_share = select(split.private, np.arange(process, num_private, num_processes))
    release = qexp_jax.fine_tune(
        qexp_jax.fresh_key(),  # the first process's is taken by all
        model.loss_fn,
        pretrained,
        public=split.public,
        private=qexp_jax.Dataset(records=own_share, public_count=num_private),
        epsilon=args.epsilon,
        delta=args.delta,
        checkpoint=args.checkpoint and qexp_jax.Checkpoint(directory=args.checkpoint),
        run=qexp_jax.RunOptions(mesh=jax.make_mesh((jax.device_count(),), ("data",))),
    )
    if process == 0:
        models_by_name = {"zero_shot": pretrained, "private": release.params}
        accuracies = {
            name: models.evaluate(model, params, split.test, "accuracy") for name, params in models_by_name.items()
        }
        write(release, accuracies, args.out)
        print(f"{num_processes} processes, {jax.device_count()} devices: {accuracies}; written to {args.out}")


def _without_local(arguments: Sequence[str]) -> list[str]:
    """The other arguments, for the processes that are started."""
    at = next(i for i, argument in enumerate(arguments) if argument.startswith("--local"))
    after = at + (1 if "=" in arguments[at] else 2)
    return [*arguments[:at], *arguments[after:]]


if __name__ == "__main__":
    run_cli(main)
