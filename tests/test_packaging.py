"""What is built is what is installed: every module, the type marker, nothing else."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import qexp_jax

ROOT = pathlib.Path(__file__).parents[1]
QUICK_START = """
import json, pathlib
import jax, jax.numpy as jnp
import qexp_jax

x = jax.random.normal(jax.random.key(1), (150, 3))
data = {"x": x, "y": x @ jnp.array([1.0, 2.0, 3.0])}
public, private = jax.tree.map(lambda a: a[:50], data), jax.tree.map(lambda a: a[50:], data)
release = qexp_jax.fine_tune(
    qexp_jax.fresh_key(), lambda w, record: (record["x"] @ w - record["y"]) ** 2 / 2, jnp.ones(3),
    public=public, private=private, epsilon=1.0, delta=1e-5,
    plan=qexp_jax.PlanOptions(rounds=1, tilt=False),
)
qexp_jax.verify(json.loads(json.dumps(release.certificate)))
assert release.params.shape == (3,) and bool(jnp.isfinite(release.params).all())
print(pathlib.Path(qexp_jax.__file__).parent)
"""


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A source distribution and the wheel made from it, of a copy without what earlier builds left."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "qexp_jax", root / "qexp_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "experiments", "docs"):  # beside the package, as in the repository
        (root / name).mkdir()
        (root / name / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    run("-m", "build", "--no-isolation", root)
    return root / "dist"


def test_wheel_holds_the_package(dist):
    """Every module in any subpackage and the type marker; no tests, no experiments."""
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"qexp_jax-{qexp_jax.__version__}.dist-info/"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qexp_jax").rglob("*.py")}
    assert {name for name in names if not name.startswith(info)} == modules | {"qexp_jax/py.typed"}
    assert info + "licenses/LICENSE" in names


def test_wheel_names_its_dependencies(dist):
    """Whatever the package imports at its top is required without an extra."""
    (wheel,) = dist.glob("*.whl")
    metadata = zipfile.ZipFile(wheel).read(f"qexp_jax-{qexp_jax.__version__}.dist-info/METADATA").decode()
    required = {
        re.match(r"[\w-]+", line)[0]
        for line in re.findall(r"^Requires-Dist: (.*)", metadata, re.M)
        if "extra" not in line
    }
    imported = set()
    for path in (ROOT / "qexp_jax").rglob("*.py"):
        imported |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M))
    names = {"orbax": "orbax-checkpoint", "dp_accounting": "dp-accounting"}
    others = {names.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"qexp_jax"}}
    assert others <= required, others - required


@pytest.mark.parametrize("module", ["dp_accounting", "opendp", "orbax.checkpoint", "scipy.optimize", "scipy.stats"])
def test_what_is_slow_to_import_waits_until_it_is_used(module):
    """The rest is held to a quarter of a second by `make benchmarks`, as seconds are no test."""
    loaded = run("-c", f"import qexp_jax, sys; print({module!r} in sys.modules)", cwd=ROOT)
    assert loaded.strip() == "False"


def test_source_holds_the_package(dist):
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"qexp_jax/__init__.py", "qexp_jax/py.typed", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith("experiments/") for name in names)


def test_installed_package_runs(dist, tmp_path):
    """From another folder, with the wheel before this checkout on the path."""
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "target"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    found = run("-c", QUICK_START, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)})
    assert pathlib.Path(found.strip()) == target / "qexp_jax"
