"""Two operating-system processes make one release, the one that a single process makes; or none, where one dies."""

import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import worker

WORKER = pathlib.Path(worker.__file__)


def run_two(tmp_path, *fault):
    """The exit codes of two processes and the files that they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    outs = [tmp_path / f"{i}.npy" for i in range(2)]
    processes = [
        subprocess.Popen([sys.executable, WORKER, str(i), port, out, *fault], stderr=subprocess.PIPE, text=True)
        for i, out in enumerate(outs)
    ]
    errors = [p.communicate(timeout=240)[1] for p in processes]
    return [p.returncode for p in processes], outs, errors


@pytest.mark.parametrize("fault", [(), ("stream",)])
def test_two_processes_make_the_release_of_one(tmp_path, fault):
    codes, outs, errors = run_two(tmp_path, *fault)
    assert codes == [0, 0], errors
    one, other = map(np.load, outs)
    np.testing.assert_array_equal(one, other)  # parameters too: the same noise, added once
    whole = jax.tree.map(lambda *x: np.concatenate(x), *worker.data()[1:])
    np.testing.assert_allclose(one[1], worker.release(whole)[1], rtol=1e-5)


def test_fresh_noise_is_one_release(tmp_path):
    """Each process has noise of its own, and all take the first one's."""
    pytest.importorskip("opendp")
    codes, outs, errors = run_two(tmp_path, "hardened")
    assert codes == [0, 0], errors
    np.testing.assert_array_equal(*map(np.load, outs))


def test_a_process_that_dies_ends_the_other_with_an_error_and_no_release(tmp_path):
    codes, outs, _ = run_two(tmp_path, "die")
    assert codes[1] == 3 and codes[0] != 0
    assert not any(out.exists() for out in outs)
