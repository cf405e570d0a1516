"""What a release compiles, in a process of its own, as one keeps its programs for life; and with what options."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax.numerics import compilation

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


@pytest.fixture
def asked(monkeypatch):
    """For which programs options are looked up: whether each is small."""
    found = []
    monkeypatch.setattr(compilation, "_options", lambda is_small: found.append(is_small) or {})
    return found


def test_a_program_on_few_numbers_is_compiled_as_a_small_one(asked):
    program = compilation.compiled(lambda x, y: x + y, few=8)
    for x, y in ((jnp.ones(4), jnp.ones(4)), (jnp.ones(5), jnp.ones(5)), (jnp.zeros(3), 1.0)):
        np.testing.assert_array_equal(program(x, y), x + y)
    assert asked == [True, False]


def test_a_part_of_another_program_has_no_options(asked):
    program = compilation.compiled(lambda x, power: x**power, static_argnums=1)
    np.testing.assert_array_equal(jax.jit(lambda x: program(x, 3))(2.0), 8.0)
    np.testing.assert_array_equal(jax.vmap(lambda x: program(x, 2))(jnp.arange(3.0)), [0, 1, 4])
    np.testing.assert_array_equal(jax.grad(lambda x: program(x, 2))(3.0), 6.0)
    assert program.eval_shape(jnp.ones(2), 2).shape == (2,)
    assert not asked
    assert program(2.0, 3) == 8 and asked == [False]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are those of CPUs")
def test_options_are_those_that_this_xla_knows(monkeypatch):
    assert compilation._options(False) == {"xla_cpu_use_fusion_emitters": False}
    assert compilation._options(True) == {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 0}
    monkeypatch.setattr(compilation, "_OLDER_EMITTERS", {"xla_no_such_option": 1})
    assert compilation._options(False) == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation._options(True) == {}
