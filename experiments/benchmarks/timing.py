"""Calls timed in turns, and the rows of the table."""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COLUMNS = "path case peer ours_seconds peer_seconds ratio goal device".split()
Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]
WORSE = ", a lower metric"
_SHORTEST = 5e-3  # a sample shorter than this is made of several calls


def race(calls: Calls, *, seconds: float, least: int = 3, most: int = 60) -> dict[str, float]:
    """Median wall seconds of each call, in turns of random order: a busy machine slows all of them.

    Args:
      calls: without arguments; what they return is waited for. The first call compiles and is not timed.
      seconds: about how long the race may take.
      least: samples of each in any case.
      most: samples of each.
    """
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    for name, run in calls.items():
        jax.block_until_ready(run())
        first = _sample(run, 1)
        repeats[name] = max(1, int(_SHORTEST / first))
        samples[name] = [first] if repeats[name] == 1 else []
    names = list(calls)
    rng = np.random.default_rng(0)
    stop = time.perf_counter() + seconds
    for turn in range(1, most):
        if turn >= least and time.perf_counter() > stop:
            break
        for name in rng.permutation(names):  # nobody always runs after the same other, who may leave memory to be freed
            samples[name].append(_sample(calls[name], repeats[name]))
    return {name: float(np.median(values)) for name, values in samples.items()}


def _sample(run: Callable[[], Any], repeats: int) -> float:
    """Mean wall seconds of some calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / repeats


def row(path: str, case: str, peer: str, ours: float, theirs: float, goal: float | str = "") -> Row:
    """One line of the table.

    Args:
      path: which hot path.
      case: model and sizes.
      peer: who is compared with.
      ours: our seconds.
      theirs: the peer's seconds.
      goal: the least that the peer's time over ours should be; "" where there is none.
    """
    return {
        "path": path,
        "case": case,
        "peer": peer,
        "ours_seconds": float(f"{ours:.4g}"),
        "peer_seconds": float(f"{theirs:.4g}"),
        "ratio": round(theirs / ours, 3),
        "goal": goal and round(goal, 3),
        "device": device(),
    }


def rows_against(path: str, case: str, times: Mapping[str, float], goals: Mapping[str, float]) -> list[Row]:
    """A line for each peer that ran.

    Args:
      path: which hot path.
      case: model and sizes.
      times: seconds by name; `times["ours"]` is ours.
      goals: goal by peer, see `row`.
    """
    return [row(path, case, peer, times["ours"], times[peer], goal) for peer, goal in goals.items() if peer in times]


def met(line: Row) -> bool:
    """Whether the ratio reaches the goal, if there is one; no speed makes up for a lower metric."""
    return line["goal"] == "" or (line["ratio"] >= line["goal"] and not line["case"].endswith(WORSE))


def device() -> str:
    """The accelerator's name, or the processor's."""
    first = jax.devices()[0]
    info = pathlib.Path("/proc/cpuinfo")
    if first.platform != "cpu" or not info.is_file():
        return first.device_kind
    lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
    return next((line.split(":")[1].strip() for line in lines), first.device_kind)


def ceilings(tiny: bool, seconds: float) -> dict[str, float]:
    """What the device can do at best: GB/s of a copy (read and written), TFLOP/s of a float32 matrix product."""
    if tiny:
        size = 256
        bytes_moved = 2**16
    elif jax.default_backend() == "cpu":
        size = 4096
        bytes_moved = 2**28
    else:
        size = 8192
        bytes_moved = 2**33
    vector = jax.random.normal(jax.random.key(9), (bytes_moved // 8,))
    matrix = jax.random.normal(jax.random.key(10), (size, size))
    copy = jax.jit(lambda x: x + 1)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    times = race({"copy": lambda: copy(vector), "product": lambda: product(matrix)}, seconds=seconds)
    return {
        "copy_gb_per_s": bytes_moved / times["copy"] / 1e9,
        "product_tflop_per_s": 2 * size**3 / times["product"] / 1e12,
    }
