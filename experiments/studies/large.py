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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qexp_jax
from experiments.benchmark.grid import RESULTS, write_table
from experiments.benchmark.measure import live_bytes, peak, reset_peak, resident
from experiments.data.splits import run_cli
from qexp_jax import accuracy, clipping, curvature, mechanism, precision, preflight, privacy, subspace

COLUMNS = (
    "tune num_params k records_private records_public tokens stage seconds peak_bytes parameter_bytes estimate_bytes"
).split()
_HEAD = 64
RELATION = qexp_jax.NeighboringRelation.REPLACE_SPECIAL


class LoraDense(nn.Module):
    """A dense layer with a low-rank term A B beside it; A is random and B zero, and B alone is tuned (LoRA-FA)."""

    features: int
    rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(tokens, width) -> (tokens, features)."""
        a = self.param("lora_a", nn.initializers.normal(x.shape[-1] ** -0.5), (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return nn.Dense(self.features)(x) + x @ a @ b


class Block(nn.Module):
    """Pre-norm attention, heads of 64, and MLP; LoRA on the query, key and value where `lora_rank` is not 0."""

    width: int
    lora_rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(tokens, width) -> (tokens, width)."""
        tokens, h = len(x), nn.LayerNorm()(x)
        qkv = LoraDense(3 * self.width, self.lora_rank)(h) if self.lora_rank else nn.Dense(3 * self.width)(h)
        q, k, v = (y.reshape(tokens, -1, _HEAD) for y in jnp.split(qkv, 3, axis=-1))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(tokens, self.width)
        x = x + nn.Dense(self.width)(attended)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))


class GPT(nn.Module):
    """GPT-2; its defaults are those of the small model."""

    vocabulary: int = 50257
    width: int = 768
    layers: int = 12
    context: int = 1024
    lora_rank: int = 0
    lora_layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (tokens, vocabulary)."""
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens) + nn.Embed(self.context, self.width)(jnp.arange(len(tokens)))
        for i in range(self.layers):
            rank = self.lora_rank if i >= self.layers - self.lora_layers else 0
            x = Block(self.width, rank)(x)
        return embed.attend(nn.LayerNorm()(x))


def parse_args(argv=None):
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


def text_records(count: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """`count` passages of `tokens` + 1 bytes of the standard library: even modules for seed 0, odd ones for seed 1."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[seed::2]
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    starts = np.random.default_rng(seed).integers(len(text) - tokens - 1, size=count)
    return {"tokens": text[starts[:, None] + np.arange(tokens + 1)].astype(np.int32)}


class Stages:
    """Seconds and memory of each stage; called with a stage's name as it begins.

    Memory is what JAX's arrays hold as the stage begins and what the process grows by at most until it ends: without
    interpreter and compiler, and of a stage that compiles, with its compilation. On an accelerator, whose count does
    not begin anew, it is the most that was allocated up to the end of the stage.
    """

    def __init__(self) -> None:
        """Nothing has begun."""
        self.rows: list[tuple[str, float, int]] = []
        self.name = ""

    def __call__(self, name: str) -> None:
        """Ends the stage before, and begins `name`."""
        if self.name:
            most = self.live + max(0, peak() - self.resident) if jax.default_backend() == "cpu" else peak()
            self.rows.append((self.name, time.perf_counter() - self.began, most))
            print(f"{self.name:>20}  {self.rows[-1][1]:8.1f} s  {self.rows[-1][2] / 2**20:8.0f} MiB", flush=True)
        self.live, self.resident = live_bytes(), resident()
        reset_peak()
        self.name, self.began = name, time.perf_counter()


def sketched(args, loss_fn, params, public, private, stages):
    """The one call in a count-sketch of all parameters, two rounds: the second pass compiles nothing."""
    space = subspace.count_sketch(jax.random.key(1), params, args.dim)
    settings = {"subspace": space, "precision_rank": 8}
    release = qexp_jax.fine_tune(
        qexp_jax.fresh_key(), loss_fn, params, public=public, private=private,
        epsilon=args.epsilon, delta=args.delta,
        plan=qexp_jax.PlanOptions(rounds=2, **settings), run=qexp_jax.RunOptions(progress=stages),
    )  # fmt: skip
    return release.params, settings


def lora(args, loss_fn, params, public, private, stages):
    """One draw in the B factors, with the damped public Fisher matrix factored densely."""
    space = subspace.full(params, where="lora_b")
    stages("public curvature")
    fisher = jax.jit(curvature.projected_fisher, static_argnums=0, static_argnames="microbatch_size")(
        loss_fn, params, space, public, microbatch_size=1
    )
    H = jax.block_until_ready(precision.dense(fisher + 0.1 * jnp.linalg.norm(fisher, 2) * jnp.eye(space.dim)))
    z = privacy.noise_multiplier(privacy.mu_from_budget(args.epsilon, args.delta), RELATION)
    clipped_sum = jax.jit(clipping.clipped_sum, static_argnames=("loss_fn", "microbatch_size"))
    for stage in ("compilation", "private pass"):
        stages(stage)
        total, _ = clipped_sum(loss_fn, params, space, H, private, l2_clip_norm=1.0, microbatch_size=1)
        total.block_until_ready()
    stages("draw")
    quadratic = mechanism.Quadratic(H, total, args.private)
    w = mechanism.draw(qexp_jax.fresh_key(), quadratic, noise_std=z)
    moved = jax.block_until_ready(subspace.displace(space, params, w))
    stages("done")
    print("expected excess per record", accuracy.expected_excess(space.dim, z, args.private))
    return moved, {"subspace": space, "microbatch_size": 1}


def estimated_bytes(args, loss_fn, params, private, settings):
    """What `preflight` expects of a private pass of the one call."""
    record = jax.tree.map(lambda x: x[0], private)
    sizes = {"num_units": args.private, "num_public": args.public}
    return preflight.estimate(loss_fn, params, record, **sizes, **settings).pass_bytes


def main(argv=None):
    args = parse_args(argv)
    model = GPT(args.vocabulary, args.width, layers=args.layers, lora_rank=int(args.tune == "lora"))

    def loss_fn(params: Any, record: Any) -> jax.Array:
        logits = model.apply(params, record["tokens"][:-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, record["tokens"][1:]))

    private, public = (text_records(n, args.tokens, seed) for n, seed in ((args.private, 1), (args.public, 0)))
    params = jax.jit(model.init)(jax.random.key(0), private["tokens"][0, :-1])
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    stages = Stages()
    tune = sketched if args.tune == "count_sketch" else lora
    moved, settings = tune(args, loss_fn, params, public, private, stages)
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(moved)):
        raise ValueError("The released parameters are not finite.")
    estimate = "" if args.tune == "lora" else estimated_bytes(args, loss_fn, params, private, settings)
    space = settings["subspace"]
    common = args.tune, space.layout.num_params, space.dim, args.private, args.public, args.tokens
    rows = [
        dict(zip(COLUMNS, (*common, name, round(seconds, 2), top, parameter_bytes, estimate), strict=True))
        for name, seconds, top in stages.rows
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    write_table(args.out, f"large_{args.tune}", COLUMNS, rows, script="large")
    passes = [row["peak_bytes"] for row in rows if row["stage"] == "private pass"]
    print(
        f"last private pass: {passes[-1] / parameter_bytes:.2f} times the parameters' {parameter_bytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    run_cli(main)
