"""A bar for people who wait: `RunOptions(progress=True)`."""

import sys
from collections.abc import Callable
from typing import Any

from qexp_jax.quadratic.rule import RULE

_OF_A_ROUND = "private pass"  # as rounds announce themselves


def bar(rounds: int | None = None) -> Callable[[str], None]:
    """A function of stage names that shows the stage and how many rounds there were, on standard error.

    With tqdm, if it is installed, else a line a stage. Under a heavy shift there are more rounds than it first says.

    Args:
      rounds: T, if it was chosen.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return _print_stage
    shown = tqdm(total=rounds or RULE.rounds, unit="round", file=sys.stderr)

    def show(stage: str) -> None:
        shown.set_description(stage, refresh=False)
        if stage == "done":
            shown.total = shown.n
            shown.close()
        elif stage == _OF_A_ROUND:
            _count_one(shown)

    return show


def _count_one(shown: Any) -> None:
    """One more round, of more than were expected if need be."""
    shown.total = max(shown.total, shown.n + 1)
    shown.update()


def _print_stage(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)
