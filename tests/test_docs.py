"""The README's snippets and every docstring example run."""

import doctest
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import PACKAGE

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("room", [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"])
def test_docstring_examples_run(room):
    module = importlib.import_module(f"qexp_jax.{room}")
    names = {"jax": jax, "jnp": jnp, "np": np}
    assert doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_readme_snippets_run_in_order():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(snippets) >= 3
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
