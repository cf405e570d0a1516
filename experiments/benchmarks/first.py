"""A cold process: the first release, which compiles everything, and a second one of other length, which should not.

Each side runs in a process of its own without a compilation cache, on one thread, imports excluded. The peer is
jax_privacy's DP-SGD of 45 steps with every fourth record in each.

    python -m experiments.benchmarks.first --side ours --model mlp --n 1000    # the seconds of one process, as JSON
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import qexp_jax
from experiments.baselines import dp_sgd
from experiments.benchmark import models
from experiments.benchmarks.timing import Row, row

PATH = "first release"
SIDES = ("ours", "peer")
NUM_PUBLIC = 3000
MORE = 137  # private records of the second release
# Few records or many: at most twice the peer's time, or as long.
GOAL = 0.5
GOAL_OF_MANY = 1.0
MANY = 10_000
GOAL_OF_SECOND = 5.0
IMPORT_SECONDS = 0.25  # of this library, beside jax, flax and optax
EPSILON = 1.0
DELTA = 1e-5
_TOY = "toy"
_DESCENT = dp_sgd.Settings(sampling_prob=0.25, steps=45, length=8.0, l2_clip_norm=1.0)


def rows(model: str, n: int) -> Iterator[Row]:
    """Of one model and number of records."""
    case = f"{model}, n={n}, cold process"
    ours, peer = (_in_process("--side", side, "--model", model, "--n", str(n)) for side in SIDES)
    goal = GOAL if n < MANY else GOAL_OF_MANY
    yield row(PATH, case, "jax_privacy, DP-SGD of 45 steps", ours["first"], peer["first"], goal)
    second = f"{model}, n={n + MORE}, the same process"
    yield row(PATH, second, "the first release", ours["second"], ours["first"], GOAL_OF_SECOND)


def import_rows() -> Iterator[Row]:
    """What importing this library adds to jax, flax and optax, against the quarter of a second that it may."""
    code = (
        "import time, jax, flax.linen, optax; t = time.perf_counter(); import qexp_jax; print(time.perf_counter() - t)"
    )
    found = [float(_run("-c", code)) for _ in range(5)]
    yield row(PATH, "import qexp_jax, beside jax, flax and optax", "what it may take", min(found), IMPORT_SECONDS, 1.0)


def _in_process(*args: str) -> dict[str, float]:
    return json.loads(_run("-m", "experiments.benchmarks.first", *args).splitlines()[-1])


def _run(*args: str) -> str:
    """What a new process prints; nothing that was compiled before is found."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True, env=environment).stdout


# --- in the process ---


def _toy_loss(params: Any, record: Any) -> jax.Array:
    """Linear regression in ten numbers."""
    return (record["x"] @ params["w"] - record["label"]) ** 2 / 2


def _records(model: str, n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if model == _TOY:
        x = rng.normal(size=(n, 10)).astype(np.float32)
        return {"x": x, "label": x.sum(axis=1)}
    return {"x": rng.random((n, 28, 28), np.float32), "label": rng.integers(0, 10, n)}


def _start(model: str) -> tuple[Callable[..., jax.Array], Any]:
    """A loss and its parameters."""
    if model == _TOY:
        return _toy_loss, {"w": np.zeros(10, np.float32)}
    made = models.make_model(model, 10)
    return made.loss_fn, models.init(made, jax.random.key(0), _records(model, 2, seed=0))


def _ours(loss_fn: Callable[..., jax.Array], params: Any, public: Any, private: Any) -> Any:
    key = jax.random.key(0)
    return qexp_jax.fine_tune(key, loss_fn, params, public=public, private=private, epsilon=EPSILON, delta=DELTA).params


def _peer(loss_fn: Callable[..., jax.Array], params: Any, public: Any, private: Any) -> Any:
    return dp_sgd.train(0, loss_fn, params, private, settings=_DESCENT, epsilon=EPSILON, delta=DELTA)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the seconds of a first and of a second release."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--model", choices=[_TOY, *models.MODELS], required=True)
    parser.add_argument("--n", type=int, required=True)
    args = parser.parse_args(argv)
    loss_fn, params = jax.block_until_ready(_start(args.model))
    run = {"ours": _ours, "peer": _peer}[args.side]
    release = functools.partial(run, loss_fn, params, _records(args.model, NUM_PUBLIC, seed=1))
    seconds = {}
    for name, n in (("first", args.n), ("second", args.n + MORE)):
        private = _records(args.model, n, seed=2)
        start = time.perf_counter()
        jax.block_until_ready(release(private))
        seconds[name] = time.perf_counter() - start
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
