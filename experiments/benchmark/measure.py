"""What a run costs: wall seconds, with compilation apart, and peak memory."""

import contextlib
import ctypes
import gc
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax

_COMPILE_EVENTS = "/jax/core/compile/"
_compile_seconds = 0.0


def _listen(event: str, duration: float, **kwargs: Any) -> None:
    global _compile_seconds
    if event.startswith(_COMPILE_EVENTS):
        _compile_seconds += duration


jax.monitoring.register_event_duration_secs_listener(_listen)


class Cost:
    """Filled when the block of `measured` ends.

    Attributes:
      seconds: wall time without compilation.
      compile_seconds: tracing, lowering and compilation.
      peak_bytes: most memory that the process held, data and runtime included; on an accelerator, what its arrays and
        programs held since the process began.
    """

    seconds = compile_seconds = 0.0
    peak_bytes = 0


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Measures its block; the block must wait for its own results."""
    cost = Cost()
    compiled = _compile_seconds
    start = time.perf_counter()
    reset_peak()
    yield cost
    elapsed = time.perf_counter() - start
    cost.compile_seconds = min(_compile_seconds - compiled, elapsed)
    cost.seconds = elapsed - cost.compile_seconds
    cost.peak_bytes = peak()


def live_bytes() -> int:
    """Bytes of all arrays that JAX holds, each buffer once."""
    shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


def resident() -> int:
    """Bytes resident now, freed memory given back first; 0 where the system does not say."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def reset_peak() -> None:
    """From here on `peak` counts anew, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes resident since `reset_peak`; on an accelerator, most bytes allocated there since the process began."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
