"""Each example runs on little data and prints what it promises."""

import importlib
import pathlib

import pytest

from experiments.benchmark import tasks
from experiments.data import mnist
from experiments.data.splits import select
from experiments.examples import flax_nnx, lora, patients, stream_from_files, tilted_training

FOLDER = pathlib.Path(flax_nnx.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def shares(line):
    """The numbers in [0, 1] of a line of output."""
    words = [word.strip(",;") for word in line.split()]
    return [float(word) for word in words if word.replace(".", "", 1).isdigit() and "." in word]


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_name_their_command(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    command = f"\n    python -m experiments.examples.{name}\n"
    assert command in importlib.import_module(f"experiments.examples.{name}").__doc__


def test_an_nnx_model_learns_the_rare_digits(capsys):
    flax_nnx.main(["--steps", "100", "--num-private", "1000"])
    before, after, promise, units = capsys.readouterr().out.splitlines()
    assert shares(after)[0] > shares(before)[0] + 0.02
    assert "epsilon 1, delta 1e-05" in promise and "1000 units" in units and "one record" in units


def test_lora_factors_alone_are_tuned(capsys, monkeypatch):
    monkeypatch.setattr(lora, "LENGTH", 8)
    monkeypatch.setattr(lora, "MODEL", lora.GPT(vocabulary=128, width=64, layers=1, context=8, lora_rank=2))
    lora.main(["--steps", "20", "--records", "200"])
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown and "verified: epsilon 1" in shown
    assert "1 of 18 leaves moved" in shown or "2 of 18 leaves moved" in shown  # B, and A where that pays


def test_a_second_release_of_patients_is_refused_and_so_is_the_next_run(tmp_path, capsys, monkeypatch):
    """Without files, so with the made-up table."""
    monkeypatch.setenv("QEXP_DATA", str(tmp_path / "absent"))
    task = tasks.TASKS["table_changed"]
    briefly = {"mlp": task.pretraining["mlp"] | {"epochs": 2}}
    monkeypatch.setitem(tasks.TASKS, "table_changed", task._replace(pretraining=briefly))
    arguments = ["--num-stays", "400", "--out", str(tmp_path / "out")]
    patients.main(arguments)
    shown = capsys.readouterr().out
    assert "a made-up table" in shown and "made-up patients" in shown
    assert "after private release 1" in shown and "verified: epsilon 1" in shown
    assert "all records with one unit id" in shown
    assert "release 2 refused: The budget is epsilon=1.2" in shown and "ledger: 1 release," in shown
    patients.main(arguments)
    again = capsys.readouterr().out
    assert "release 1 refused" in again and "release 2 refused" in again and "ledger: 1 release," in again


def test_an_interrupted_stream_ends_with_the_same_release(capsys, monkeypatch):
    split = mnist.packaged_mnist()
    few = split._replace(private=select(split.private, slice(400)), public=select(split.public, slice(0, None, 4)))
    few = few._replace(
        **{name: part | {"x": part["x"][:, ::4, ::4]} for name, part in few._asdict().items() if name != "description"}
    )
    monkeypatch.setattr(mnist, "packaged_mnist", lambda: few)
    stream_from_files.main(["--num-files", "2"])
    interrupted, same, accuracies, promise = capsys.readouterr().out.splitlines()
    assert interrupted.startswith("interrupted: part_00")
    assert same == "the same bits as without the interruption: yes"
    before, after = shares(accuracies)
    assert after > before
    assert "N 400, epsilon 1, one record" in promise


def test_tilted_training_runs_on_the_packaged_images(tmp_path, capsys, monkeypatch):
    """Without files; `test_experiments` runs it on full MNIST."""
    monkeypatch.setenv("QEXP_DATA", str(tmp_path / "absent"))
    tilted_training.main(["--num-public", "1000", "--num-private", "1500", "--steps", "100"])
    equal, tilted, size = capsys.readouterr().out.splitlines()
    assert "equal weights" in equal and "tilted" in tilted
    assert "of 1000 public records" in size
