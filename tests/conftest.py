import itertools
import os
import pathlib
import shutil
import tempfile

import pytest

# Eight virtual CPU devices, before jax is imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":  # there the tests' own oracles need to be told
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# Most of the tests' time is compilation: what one worker or subprocess compiled, the others load.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qexp_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


# Each compiled program is a few mappings of the process, of which Linux allows 65,530: beyond, XLA crashes.
_MAPPINGS, _MANY = pathlib.Path("/proc/self/maps"), 25_000
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    yield
    if next(_tests) % 5 == 0 and _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        import jax

        jax.clear_caches()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
