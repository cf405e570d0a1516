"""One of two processes that fine-tune together: `python worker.py PROCESS PORT OUT [die]`; run by test_processes."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from problems import fine_tune

from qexp_jax.data import stream


def loss_fn(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 3)).astype(np.float32)
    records = {"x": x, "y": x @ np.array([1, 2, 3], np.float32)}
    return [jax.tree.map(lambda a, i=i: a[i::3], records) for i in range(3)]


def release(private, seed=3, **changes):
    """The private parameters and the first round's sum."""
    public = data()[0]
    arguments = {"epsilon": 1.0, "delta": 1e-5, "rounds": 2, "microbatch_size": 8, "public_count": 200} | changes
    params = {"w": np.ones(3, np.float32)}
    made, infos = fine_tune(
        jax.random.key(seed), loss_fn, params, public=public, private=private, diagnostics=True, **arguments
    )
    return np.stack([made.params["w"], infos[0].quadratic.whitened_sum])


def dying(records):
    """A stream whose process is gone in its second reading by a pass."""
    readings = iter(range(99))

    def begin():
        if next(readings) == 2:
            os._exit(3)
        yield records

    return stream.Stream(begin)


def main(process, port, out, fault=""):
    jax.distributed.initialize(f"localhost:{port}", 2, int(process), heartbeat_timeout_seconds=10)
    mesh = jax.make_mesh((4,), ("data",))
    mine = data()[1 + int(process)]
    if fault == "die" and process == "1":
        mine = dying(mine)
    if fault == "stream":
        mine = stream.Stream(lambda records=mine: iter([records]))
    changes = {"hardened": True} if fault == "hardened" else {}
    # A key of its own in each process: the first one's is taken by all.
    np.save(f"{out}.tmp.npy", release(mine, seed=3 + int(process), mesh=mesh, **changes))
    os.replace(f"{out}.tmp.npy", out)


if __name__ == "__main__":
    main(*sys.argv[1:])
