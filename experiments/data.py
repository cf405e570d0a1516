"""What every task's loader shares: splits, public standardisation, finding files, one derived table in a cache.

Records are `{"x": (n, ...) float32, "label": (n,) int32}`. A loader takes a data directory laid out as its publisher
distributes it, and finds what it needs there or says what is missing and where to get it.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Records = dict[str, np.ndarray]

CLIP = 5.0


class Split(NamedTuple):
    """A public -> private task.

    Attributes:
      public: what the model is pretrained on.
      private: what it is fine-tuned on.
      test: from the private population, disjoint from both.
      description: the split in words.
    """

    public: Records
    private: Records
    test: Records
    description: str


def select(records: Records, index: np.ndarray) -> Records:
    """The records at `index`."""
    return {name: values[index] for name, values in records.items()}


def standardise(reference: np.ndarray, *parts: np.ndarray) -> list[np.ndarray]:
    """Columns of each part in units of the reference's spread, clipped to [-5, 5]; missing (NaN) becomes 0.

    Args:
      reference: (n, p) **public** rows, the only ones whose statistics are used.
      *parts: (m, p) rows of any population.

    Returns:
      For each part (m, p + q) float32: the columns, then a 0/1 indicator of missingness for each of the q columns that
      miss a value in the reference. A column without spread in the reference becomes 0.
    """
    seen = ~np.isnan(reference)
    count = np.maximum(seen.sum(0), 1)
    mean = np.where(seen, reference, 0).sum(0) / count
    spread = np.sqrt(np.where(seen, (reference - mean) ** 2, 0).sum(0) / count)
    scale = np.where(spread > 1e-6 * (1 + abs(mean)), spread, np.inf)
    flagged = ~seen.all(0)
    return [
        np.concatenate(
            [np.clip(np.nan_to_num((part - mean) / scale), -CLIP, CLIP), np.isnan(part[:, flagged])], axis=1
        ).astype(np.float32)
        for part in parts
    ]


def find(directory: pathlib.Path, folder: str, name: str, how_to_get: str) -> pathlib.Path:
    """The file `name` in the data directory or its subfolder."""
    for path in (directory / folder / name, directory / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"No {name} in {directory} or {directory / folder}. {how_to_get}")


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, which takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def run_cli(main: Callable[[], object]) -> None:
    """Runs a script's main; bad input ends it with the message alone."""
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
