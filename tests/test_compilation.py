"""What a release compiles, in a process of its own: programs are kept for as long as a process lives."""

import json
import subprocess
import sys

import pytest

CODE = """
import json
import jax, numpy as np
import qexp_jax

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)

def data(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 10)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) + rng.normal(size=n).astype(np.float32)}

def loss_fn(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2

def programs(n, seed):
    compiled.clear()
    start = {"w": np.zeros(10, np.float32)}
    release = qexp_jax.fine_tune(
        jax.random.key(seed), loss_fn, start, public=data(3000, 0), private=data(n, seed), epsilon=1.0, delta=1e-5
    )
    assert release.certificate["tilt"] is not None  # else half of the programs are not needed
    return len(compiled)

print(json.dumps([programs(1000, 1), programs(1000, 2), programs(1137, 3)]))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(["first", "again", "other length"], json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("release", "most"), [("first", 50), ("again", 0), ("other length", 4)])
def test_a_release_compiles_few_programs(found, release, most):
    """A first one more than a hundred, when each operation on a few public numbers was a program of its own."""
    assert found[release] <= most, found
