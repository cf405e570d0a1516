"""Data flows one way: folders by what they may see, each importing only from those above it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import qexp_jax

PACKAGE = pathlib.Path(qexp_jax.__file__).parent
FOLDERS = [
    "numerics", "data", "privacy", "model", "quadratic", "mechanism", "private_pass", "fine_tuning",
    "audit", "__init__",
]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def folder_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The modules of the package that a file imports, as `folder.module` or `folder`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qexp_jax"):
            inside = node.module.partition(".")[2]
            for alias in node.names:
                yield f"{inside}.{alias.name}" if inside else alias.name


def test_folders_are_listed():
    assert {folder_of(path) for path in FILES} == set(FOLDERS)


def test_imports_go_up():
    for path in FILES:
        allowed = FOLDERS[: FOLDERS.index(folder_of(path)) + 1]
        assert {name.split(".")[0] for name in imported(path)} <= set(allowed), path


def test_imports_have_no_cycles():
    """Within a folder too."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): set(imported(path)) for path in FILES}
    edges = {
        name: {other for other in modules if any(f"{x}.".startswith(f"{other}.") for x in found)}
        for name, found in modules.items()
    }
    while edges:
        leaves = {name for name, found in edges.items() if not found & set(edges)}
        assert leaves, sorted(edges)
        edges = {name: found for name, found in edges.items() if name not in leaves}


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("quadratic", "private_pass"), ("privacy", "model"), ("private_pass", "fine_tuning")]
)
def test_what_a_folder_never_sees(folder, forbidden):
    for path in FILES:
        if folder_of(path) == folder:
            assert not any(name.startswith(forbidden) for name in imported(path)), path


def test_privacy_loads_no_model_code():
    """Neither directly nor by what it imports: a certificate can be verified where no model is."""
    code = "import sys, qexp_jax.privacy.verification; print([m for m in sys.modules if m.startswith('qexp_jax.')])"
    stub = f"import types, sys; p = types.ModuleType('qexp_jax'); p.__path__ = [{str(PACKAGE)!r}]; "
    found = subprocess.run([sys.executable, "-c", f"{stub}sys.modules['qexp_jax'] = p; {code}"], capture_output=True)
    assert found.returncode == 0, found.stderr.decode()
    loaded = {name.split(".")[1] for name in ast.literal_eval(found.stdout.decode())}
    assert loaded == {"privacy", "data"}
