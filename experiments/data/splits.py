"""What every task's loader shares: splits, public standardisation, finding files, one derived table in a cache.

Records are `{"x": (n, ...) float32, "label": (n,) int32}`. A loader takes a data directory laid out as its publisher
distributes it, and finds what it needs there or says what is missing and where to get it.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
    """Columns of each part in units of the reference's spread, clipped to [-5, 5]; a missing value becomes 0.

    Missing is whatever is not finite, so that no infinity of one row reaches another row through the statistics.

    Args:
      reference: (n, p) **public** rows, the only ones whose statistics are used.
      *parts: (m, p) rows of any population.

    Returns:
      For each part (m, p + q) float32: the columns, then a 0/1 indicator of missingness for each of the q columns that
      miss a value in the reference. A column without spread in the reference becomes 0.
    """
    seen = np.isfinite(reference)
    count = np.maximum(seen.sum(0), 1)
    mean = np.where(seen, reference, 0).sum(0) / count
    spread = np.sqrt(np.where(seen, (reference - mean) ** 2, 0).sum(0) / count)
    scale = np.where(spread > 1e-6 * (1 + abs(mean)), spread, np.inf)
    flagged = ~seen.all(0)
    standardised = []
    for part in parts:
        known = np.isfinite(part)
        columns = np.where(known, (np.where(known, part, 0) - mean) / scale, 0)
        missing = ~known[:, flagged]
        standardised.append(np.concatenate([np.clip(columns, -CLIP, CLIP), missing], axis=1).astype(np.float32))
    return standardised


def find(directory: pathlib.Path, folder: str, names: str | Sequence[str], how_to_get: str) -> pathlib.Path:
    """The one file with one of `names` in the data directory or its subfolder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: there are two, and nothing says which of them is whole.
    """
    names = [names] if isinstance(names, str) else names
    candidates = [place / name for name in names for place in (directory / folder, directory)]
    found: dict[pathlib.Path, pathlib.Path] = {}
    for path in candidates:
        if path.exists():
            found.setdefault(path.resolve(), path)
    if not found:
        raise FileNotFoundError(f"No {' or '.join(names)} in {directory} or {directory / folder}. {how_to_get}")
    if len(found) > 1:
        raise ValueError(f"Two files for one: {' and '.join(map(str, found.values()))}; remove one of them.")
    return next(iter(found.values()))


def read_bytes(path: pathlib.Path) -> bytes:
    """The file's content.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a folder stands in its place, or it cannot be read.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder where a file is expected; put the file itself there.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"No file {path}.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None


def decode(name: str, content: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8; save the file as plain text in UTF-8.") from None


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
    """Runs a script's main; bad input, or a file or folder that refuses, ends it with the message alone."""
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
