"""Data flows one way: each room imports only rooms above it."""

import ast
import pathlib

import qexp_jax

ROOMS = [
    "arguments", "keys", "rounding", "integers", "records", "operations", "convolutions", "outer_products",
    "sketching", "subspace", "gradients", "curvature", "directions", "precision", "clipping", "privacy", "ledger",
    "mechanism", "hardened", "truncated", "pure", "accuracy", "rule", "flow", "features", "weighting",
    "isolation", "validation", "survey", "plan", "certificate", "verification", "stream", "passes", "checkpoint",
    "rounds", "tilting", "preflight", "door", "tilt", "finetune", "audit", "__init__",
]  # fmt: skip
PACKAGE = pathlib.Path(qexp_jax.__file__).parent


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qexp_jax"):
            room = node.module.partition(".")[2]
            yield from [room] if room else [alias.name for alias in node.names]


def test_every_room_is_listed():
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(ROOMS)


def test_no_room_imports_a_lower_one():
    for path in PACKAGE.glob("*.py"):
        above = ROOMS[: ROOMS.index(path.stem)]
        assert set(imported_rooms(path)) <= set(above), path.stem
