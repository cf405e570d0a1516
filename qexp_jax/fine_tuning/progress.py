"""Who is told how far a release is: a function of the caller's, a bar, or nobody."""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import jax

from qexp_jax.quadratic.rule import RULE

_OF_A_ROUND = "private pass"  # as rounds announce themselves


class Announce(Protocol):
    """Tells the name of a stage as it begins."""

    def __call__(self, stage: str, finished: Any = None) -> None:
        """Waits for `finished`, the arrays of the stage before, if somebody listens."""
        ...


def announcer(progress: Callable[[str], None] | bool | None, rounds: int | None = None) -> Announce:
    """What stages announce themselves by.

    Args:
      progress: of `RunOptions`.
      rounds: T, if it was chosen.
    """
    if progress is None or progress is False:
        return _to_nobody
    tell = bar(rounds) if progress is True else progress

    def announce(stage: str, finished: Any = None) -> None:
        # JAX runs ahead: without this wait a caller that times stages would time their dispatch.
        jax.block_until_ready([x for x in jax.tree.leaves(finished) if isinstance(x, jax.Array)])
        tell(stage)

    return announce


def _to_nobody(stage: str, finished: Any = None) -> None:
    pass


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
