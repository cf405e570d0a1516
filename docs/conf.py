"""Sphinx: the API reference, one page for the call and one for each submodule that `qexp_jax` exports.

The pages are written from `qexp_jax.__all__`, so that no list of modules has to be kept. Docstrings are Google style
with plain formulas, of which `markup` makes reStructuredText. What stands in single backticks there is a link where it
names something that has a page, and literal text elsewhere; `module.name` with a module of the package that has no such
name fails the build, as does any other broken reference.
"""

import importlib
import inspect
import pathlib
import pkgutil
import re

import chex
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import qexp_jax

project = "qexp_jax"
version = release = qexp_jax.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "py:obj"
html_title = f"{project} {version}"
html_theme_options = {"page_width": "1100px", "description": "Differentially private fine-tuning in JAX"}
html_copy_source = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autosummary_generate = False  # `write_pages` does it
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # its signature has their types
napoleon_use_rtype = False  # what a function returns is described in words
napoleon_use_ivar = True  # a NamedTuple's docstring describes its fields

MODULES = {
    found.name.rpartition(".")[2]: importlib.import_module(found.name)
    for found in pkgutil.walk_packages(qexp_jax.__path__, "qexp_jax.")
}
EXPORTS = {name: getattr(qexp_jax, name) for name in qexp_jax.__all__}
EXPORTED_MODULES = {name: value for name, value in EXPORTS.items() if inspect.ismodule(value)}
PAGES = pathlib.Path(__file__).parent / "api"

# Types in signatures: those of other packages, whose inventories would need a network, and those without a page.
nitpick_ignore_regex = [(r"py:(class|obj)", r"(jax|jaxlib|numpy|chex|dp_accounting|os|pathlib|collections|typing)\..*")]
nitpick_ignore = [
    ("py:class", f"{module.__name__}.{name}")
    for module in MODULES.values()
    for name, value in vars(module).items()
    if inspect.isclass(value) and value.__module__ == module.__name__
    if module not in EXPORTED_MODULES.values() or name.startswith("_")
]

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|References):$")
ARRAY_TREE = stringify_annotation(chex.ArrayTree, "smart")  # a union, which refers to itself
TABLE_ROW = re.compile(r"\| .* \|$")
BACKTICKS = re.compile(r"(:[\w:]+:`[^`]+`|``[^`]+``|`[^`]+`)")
ESCAPED = re.compile(r"\||(?<=\w)_(?!\w)")
DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*")


def write_pages(app, config):
    """The sources in `api/`: all exported functions and classes, and a page for each exported module."""
    texts = {name: _module_page(module) for name, module in EXPORTED_MODULES.items()}
    others = [_directive(name, value) for name, value in EXPORTS.items() if name not in EXPORTED_MODULES]
    functions_first = sorted(others, key=lambda text: "autofunction" not in text)
    texts["call"] = "\n\n".join([".. currentmodule:: qexp_jax", *functions_first])
    PAGES.mkdir(exist_ok=True)
    for stale in set(PAGES.glob("*.rst")) - {PAGES / f"{name}.rst" for name in texts}:
        stale.unlink()
    for name, text in texts.items():
        title = "The call" if name == "call" else name
        (PAGES / f"{name}.rst").write_text(f"{title}\n{'=' * len(title)}\n\n{text}\n")


def _module_page(module):
    """What is exported from the package itself is left to the page of the call."""
    above = [name for name, value in EXPORTS.items() if getattr(value, "__module__", None) == module.__name__]
    page = f".. automodule:: {module.__name__}"
    if not above:
        return page
    links = ", ".join(f"`qexp_jax.{name}`" for name in above)
    return f"{page}\n   :exclude-members: {', '.join(above)}\n\nSee also {links}."


def _directive(name, value):
    if not value.__module__.startswith("qexp_jax"):
        members = ", ".join(f"``{member}``" for member in getattr(value, "__members__", ()))
        return f".. py:class:: {name}\n\n   Of ``{value.__module__.partition('.')[0]}``: {members}."
    return f".. autofunction:: {name}" if inspect.isfunction(value) else f".. autoclass:: {name}"


def markup(app, what, name, obj, options, lines):
    """Makes reStructuredText of a docstring's lines, in place, before napoleon reads its sections.

    Indented paragraphs outside of sections become literal blocks, tables of pipes grids, backticks references or
    literals, and bars and trailing underscores of formulas are escaped.
    """
    home = inspect.getmodule(getattr(obj, "fget", obj)) or qexp_jax
    done, prose = [], []  # prose is held back, for backticks may reach over the end of a line
    block = ""  # what the line at hand is part of
    before = ""  # the line before
    for line in lines:
        if line.startswith(">>>"):
            block = "doctest"
        elif TABLE_ROW.match(line):
            block = "table"
        elif not line.strip():
            block = block if block in ("section", "literal") else ""
        elif line.startswith("    ") and not before.strip() and not block:
            block = "literal"
            prose += ["::", ""]
        elif not line.startswith(" ") and block != "doctest":
            block = "section" if SECTION.match(line) else ""
        if block in ("doctest", "literal", "table"):
            done += _inline(prose, home)
            done += _grid_rows(line, first=not before.strip()) if block == "table" else [line]
            prose = []
        else:
            prose.append(line)
        before = line
    lines[:] = done + _inline(prose, home)


def _grid_rows(row, first):
    rule = re.sub(r"[^|]", "-", row).replace("|", "+")
    if set(row) <= set("|- "):  # the rule under a heading
        return []
    return [rule, row, rule] if first else [row, rule]


def skip_field(app, what, name, obj, skip, options):
    """A NamedTuple's fields have no docstrings of their own."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def short_types(app, what, name, obj, options, signature, returned):
    """Signatures with pytrees of arrays under their name."""
    return tuple(text and text.replace(ARRAY_TREE, "~chex.ArrayTree") for text in (signature, returned))


def _inline(prose, home):
    parts = BACKTICKS.split("\n".join(prose))
    parts[::2] = [ESCAPED.sub(r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [_reference(part, home) for part in parts[1::2]]
    parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]  # `Shape`s: markup ends before a space
    return "".join(parts).split("\n") if prose else []


def _reference(part, home):
    """What stands in single backticks in a docstring of the module `home`: a link to its page, or a literal."""
    if part.startswith((":", "``")):
        return part
    text = part.strip("`")
    target = _target(text, home) if DOTTED.fullmatch(text) else None
    return f":py:obj:`{text} <{target}>`" if target else f"``{text}``"


def _target(text, home):
    """The full name under which what `text` names is documented, or None."""
    first, *rest = text.split(".")
    named = bool(rest) and first in MODULES
    if named:
        value = MODULES[first]
    else:
        value, rest = (home if first in vars(home) else qexp_jax), [first, *rest]
    for name in rest:
        if not hasattr(value, name):
            if named:
                logging.getLogger(__name__).warning("docstring in %s: `%s` names nothing", home.__name__, text)
            return None
        value = getattr(value, name)
    if value in EXPORTED_MODULES.values():
        return value.__name__
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return None
    if EXPORTS.get(value.__name__) is value:
        return f"qexp_jax.{value.__name__}"
    owner = inspect.getmodule(value)
    return f"{owner.__name__}.{value.__qualname__}" if owner in EXPORTED_MODULES.values() else None


def setup(app):
    """Before napoleon, whose priority is 500."""
    app.connect("config-inited", write_pages)
    app.connect("autodoc-process-docstring", markup, priority=400)
    app.connect("autodoc-process-signature", short_types)
    app.connect("autodoc-skip-member", skip_field)
