"""A transformer of 124 million parameters fine-tuned privately on a laptop's cores: memory and seconds a stage.

    python -m experiments.studies.large                     # count-sketch of all parameters, k = 4096
    python -m experiments.studies.large --tune lora         # LoRA factors with a dense precision, by the pure functions

The shape of GPT-2 small with random weights, so that nothing is to be learnt about accuracy; bytes of this Python's own
library as text, one half public, the other private. Writes large_<tune>.csv into --out.
"""

import argparse
import pathlib
import sysconfig
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qexp_jax
from experiments.benchmark.measure import live_bytes, peak, reset_peak, resident
from experiments.benchmark.results import RESULTS, write_table
from experiments.data.splits import Records, run_cli
from experiments.studies.gpt import GPT
from qexp_jax import accuracy, clipping, curvature, mechanism, precision, preflight, privacy, subspace

COLUMNS = (
    "tune num_params k records_private records_public tokens stage seconds peak_bytes parameter_bytes estimate_bytes"
).split()
RELATION = qexp_jax.NeighboringRelation.REPLACE_SPECIAL


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", choices=["count_sketch", "lora"], default="count_sketch")
    parser.add_argument("--dim", type=int, default=4096, help="k of the count-sketch")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--private", type=int, default=128)
    parser.add_argument("--public", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return parser.parse_args(argv)


def text_records(count: int, tokens: int, seed: int) -> Records:
    """`count` passages of `tokens` + 1 bytes of the standard library: even modules for seed 0, odd ones for seed 1."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[seed::2]
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    starts = np.random.default_rng(seed).integers(len(text) - tokens - 1, size=count)
    return {"tokens": text[starts[:, None] + np.arange(tokens + 1)].astype(np.int32)}


class Stage(NamedTuple):
    """What one stage took: `peak_bytes` as `Stages` counts them."""

    name: str
    seconds: float
    peak_bytes: int


class Stages:
    """Seconds and memory of each stage; called with a stage's name as it begins.

    Memory is what JAX's arrays hold as the stage begins and what the process grows by at most until it ends: without
    interpreter and compiler, and of a stage that compiles, with its compilation. On an accelerator, whose count does
    not begin anew, it is the most that was allocated up to the end of the stage.
    """

    def __init__(self) -> None:
        """Nothing has begun."""
        self.ended: list[Stage] = []
        self._name = ""

    def __call__(self, name: str) -> None:
        """Ends the stage before, and begins `name`."""
        if self._name:
            on_cpu = jax.default_backend() == "cpu"
            most = self._live + max(0, peak() - self._resident) if on_cpu else peak()
            stage = Stage(self._name, time.perf_counter() - self._began, most)
            self.ended.append(stage)
            print(f"{stage.name:>20}  {stage.seconds:8.1f} s  {stage.peak_bytes / 2**20:8.0f} MiB", flush=True)
        self._live = live_bytes()
        self._resident = resident()
        reset_peak()
        self._name = name
        self._began = time.perf_counter()


class Job(NamedTuple):
    """What is fine-tuned.

    Attributes:
      loss_fn: of one record.
      params: before.
      public: records.
      private: records.
      args: the command line.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    public: Records
    private: Records
    args: argparse.Namespace


def sketched(job: Job, stages: Stages) -> tuple[Any, dict[str, Any]]:
    """The one call in a count-sketch of all parameters, two rounds: the second pass compiles nothing.

    Returns:
      The released parameters, and the options of `preflight.estimate`.
    """
    space = subspace.count_sketch(jax.random.key(1), job.params, job.args.dim)
    options = {"subspace": space, "precision_rank": 8}
    release = qexp_jax.fine_tune(
        qexp_jax.fresh_key(), job.loss_fn, job.params, public=job.public, private=job.private,
        epsilon=job.args.epsilon, delta=job.args.delta,
        plan=qexp_jax.PlanOptions(rounds=2, **options), run=qexp_jax.RunOptions(progress=stages),
    )  # fmt: skip
    return release.params, options


def lora(job: Job, stages: Stages) -> tuple[Any, dict[str, Any]]:
    """One draw in the B factors, with the damped public Fisher matrix factored densely.

    Returns:
      The released parameters, and the options of `preflight.estimate`.
    """
    space = subspace.full(job.params, where="lora_b")
    stages("public curvature")
    fisher = jax.jit(curvature.projected_fisher, static_argnums=0, static_argnames="microbatch_size")(
        job.loss_fn, job.params, space, job.public, microbatch_size=1
    )
    damping = 0.1 * jnp.linalg.norm(fisher, 2)
    H = jax.block_until_ready(precision.dense(fisher + damping * jnp.eye(space.dim)))
    z = privacy.noise_multiplier(privacy.mu_from_budget(job.args.epsilon, job.args.delta), RELATION)
    clipped_sum = jax.jit(clipping.clipped_sum, static_argnames=("loss_fn", "microbatch_size"))
    # Twice, so that the second pass is without compilation.
    for stage in ("compilation", "private pass"):
        stages(stage)
        total, _ = clipped_sum(job.loss_fn, job.params, space, H, job.private, l2_clip_norm=1.0, microbatch_size=1)
        total.block_until_ready()
    stages("draw")
    quadratic = mechanism.Quadratic(H, total, job.args.private)
    w = mechanism.draw(qexp_jax.fresh_key(), quadratic, noise_std=z)
    moved = jax.block_until_ready(subspace.displace(space, job.params, w))
    stages("done")
    print("expected excess per record", accuracy.expected_excess(space.dim, z, job.args.private))
    return moved, {"subspace": space, "microbatch_size": 1}


def estimated_bytes(job: Job, options: dict[str, Any]) -> int:
    """What `preflight` expects of a private pass of the one call."""
    record = jax.tree.map(lambda x: x[0], job.private)
    sizes = {"num_units": job.args.private, "num_public": job.args.public}
    return preflight.estimate(job.loss_fn, job.params, record, **sizes, **options).pass_bytes


def job_of(args: argparse.Namespace) -> Job:
    """Model and records of the command line."""
    model = GPT(args.vocabulary, args.width, layers=args.layers, lora_rank=int(args.tune == "lora"))

    def loss_fn(params: Any, record: Any) -> jax.Array:
        logits = model.apply(params, record["tokens"][:-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, record["tokens"][1:]))

    private = text_records(args.private, args.tokens, seed=1)
    public = text_records(args.public, args.tokens, seed=0)
    params = jax.jit(model.init)(jax.random.key(0), private["tokens"][0, :-1])
    return Job(loss_fn, params, public, private, args)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes one release, stage by stage; writes the table."""
    args = parse_args(argv)
    job = job_of(args)
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(job.params))
    stages = Stages()
    tune = sketched if args.tune == "count_sketch" else lora
    moved, options = tune(job, stages)
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(moved)):
        raise ValueError("The released parameters are not finite.")
    space = options["subspace"]
    common = {
        "tune": args.tune,
        "num_params": space.layout.num_params,
        "k": space.dim,
        "records_private": args.private,
        "records_public": args.public,
        "tokens": args.tokens,
        "parameter_bytes": parameter_bytes,
        # The pure functions are no pass of the one call.
        "estimate_bytes": "" if args.tune == "lora" else estimated_bytes(job, options),
    }
    rows = [
        common | {"stage": stage.name, "seconds": round(stage.seconds, 2), "peak_bytes": stage.peak_bytes}
        for stage in stages.ended
    ]
    write_table(args.out, f"large_{args.tune}", COLUMNS, rows, module="experiments.studies.large")
    *_, last = (stage.peak_bytes for stage in stages.ended if stage.name == "private pass")
    print(f"last private pass: {last / parameter_bytes:.2f} times the parameters' {parameter_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    run_cli(main)
