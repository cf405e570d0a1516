import gzip

import numpy as np
import pytest

from experiments.data import mnist, splits

HEADER = b"\0\0\x08\x01\0\0\0\x02"
GOOD = gzip.compress(HEADER + b"ab")
WORDS = b"\0\0\x0c\x02\0\0\0\x01\0\0\0\x02" + bytes(range(8))


def stream_error():
    """A gzip file whose deflate stream names a block type that does not exist, as a flipped bit may."""
    return GOOD[:10] + b"\x07" + GOOD[11:]


DAMAGED = {
    "empty": (b"", "an empty file"),
    "one byte": (GOOD[:1], "damaged or not gzip"),
    "cut header": (GOOD[:5], "truncated"),
    "cut end": (GOOD[:-3], "truncated"),
    "stream": (stream_error(), "truncated or damaged"),
    "check sum": (GOOD[:-8] + b"\0\0\0\0" + GOOD[-4:], "damaged or not gzip"),
    "trailing garbage": (GOOD + b"more", "damaged or not gzip"),
    "not compressed": (HEADER + b"ab", "damaged or not gzip"),
    "web page": (b"<html>404</html>", "damaged or not gzip"),
    "nothing inside": (gzip.compress(b""), "expected an IDX header"),
    "type": (gzip.compress(b"\0\0\x0d\x01\0\0\0\x02ab"), "expected an IDX header"),
    "magic": (gzip.compress(b"\0\1\x08\x01\0\0\0\x02ab"), "expected an IDX header"),
    "dimensions cut": (gzip.compress(b"\0\0\x08\x05\0\0\0\x02ab"), "expected an IDX header"),
    "no dimensions": (gzip.compress(b"\0\0\x08\0a"), "expected an IDX header with dimensions"),
    "dimension of 0": (gzip.compress(b"\0\0\x08\x01\0\0\0\0"), "expected an IDX header with dimensions"),
    "huge": (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + b"ab"), "expected .* numbers, found 2"),
    "too few": (gzip.compress(HEADER + b"a"), "expected .* numbers, found 1"),
    "too many": (gzip.compress(HEADER + b"abc"), "expected .* numbers, found 3"),
    "half a number": (gzip.compress(WORDS + b"a"), "expected .* numbers, found 2.25"),
    "twice": (GOOD + GOOD, "expected .* numbers, found 12"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(tmp_path, content, message):
    """With the file and where to get it again, and the command line shows that alone."""
    path = tmp_path / "some-idx.gz"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*some-idx.gz: {message}.*get the file again.*mnist"):
        splits.run_cli(lambda: mnist.read_idx(path))


def test_good_files_are_read(tmp_path):
    """gzip lets zeros stand behind its end."""
    path = tmp_path / "some-idx.gz"
    path.write_bytes(GOOD + b"\0\0")
    np.testing.assert_array_equal(mnist.read_idx(path), [97, 98])
    path.write_bytes(gzip.compress(WORDS))
    np.testing.assert_array_equal(mnist.read_idx(path), [[0x00010203, 0x04050607]])


def test_folders_are_no_files(tmp_path):
    (tmp_path / "some-idx.gz").mkdir()
    with pytest.raises(ValueError, match="some-idx.gz: a folder where a file is expected"):
        mnist.read_idx(tmp_path / "some-idx.gz")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        mnist.read_idx(tmp_path / "file" / "some-idx.gz")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file .*some-idx.gz"):
        mnist.read_idx(tmp_path / "some-idx.gz")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "qmnist-test-labels-idx2-int.gz"])
def test_published_sums_are_compared(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(ValueError, match=f"{name}: expected md5 .* get the file again"):
        mnist.read_idx(tmp_path / name)


def test_two_files_for_one(tmp_path):
    """Neither the folder's nor the subfolder's is taken without a word, unless both are one."""
    (tmp_path / "mnist").mkdir()
    for folder in (tmp_path, tmp_path / "mnist"):
        (folder / "file.gz").write_bytes(GOOD)
    with pytest.raises(ValueError, match="Two files for one: .*file.gz and .*file.gz; remove one"):
        splits.find(tmp_path, "mnist", "file.gz", "")
    (tmp_path / "file.gz").unlink()
    (tmp_path / "file.gz").symlink_to(tmp_path / "mnist" / "file.gz")
    assert splits.find(tmp_path, "mnist", "file.gz", "") == tmp_path / "mnist" / "file.gz"
