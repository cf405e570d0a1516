"""Tables and numbers as Markdown that reads as plain text too."""

import math
from collections.abc import Iterable

import pandas as pd

NOTHING = "–"


def table(rows: Iterable[dict[str, str]]) -> list[str]:
    """The lines of an aligned table; `rows` are dicts with the same keys."""
    rows = list(rows)
    if not rows:
        return ["Nothing yet."]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def number(value: float, signed: bool = False) -> str:
    """Four decimals; a dash for NaN."""
    if math.isnan(value):
        return NOTHING
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def with_se(mean: float, se: float, signed: bool = False) -> str:
    """A mean and its standard error; a dash where there is no mean."""
    if math.isnan(mean):
        return NOTHING
    error = "n/a" if math.isnan(se) else f"{se:.4f}"
    return f"{number(mean, signed)} ± {error}"


def span(counts: pd.Series) -> str:
    """The least and the largest of some counts."""
    if counts.empty:
        return "none"
    return " to ".join(f"{value:g}" for value in sorted({counts.min(), counts.max()}))
