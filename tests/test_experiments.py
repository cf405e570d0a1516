import gzip
import json
import os
import pathlib
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from experiments import demo
from experiments.benchmark import models, tasks
from experiments.data import mnist, small, splits
from experiments.examples import tilted_training
from experiments.studies import cluster, large

QEXP_DATA = pathlib.Path(os.environ.get("QEXP_DATA", "absent"))


def test_the_packaged_split_is_disjoint_and_as_described():
    split = mnist.packaged_mnist()
    np.testing.assert_array_equal(np.bincount(split.public["label"]), [380] * 5 + [20] * 5)
    assert len(split.private["label"]) == 2000 and len(split.test["label"]) == 1000


def test_the_demo_writes_what_it_promises(tmp_path, monkeypatch):
    full = mnist.packaged_mnist()
    small = full._replace(
        **{name: splits.select(getattr(full, name), np.arange(0, 2000, 10) % 1000) for name in full._fields[:3]}
    )
    monkeypatch.setattr(mnist, "packaged_mnist", lambda seed: small)
    monkeypatch.setattr(demo, "PRETRAIN", demo.PRETRAIN | {"epochs": 1})
    monkeypatch.setattr(demo, "NON_PRIVATE", demo.NON_PRIVATE | {"epochs": 1})
    with mpl.rc_context():
        demo.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json", "certificate.json", "params.msgpack", "demo.png",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["measured_noise_cost_not_private"] > 0
    assert json.loads((tmp_path / "certificate.json").read_text())["num_units"] == 200


@pytest.mark.skipif(not (QEXP_DATA / "mnist").is_dir(), reason="full MNIST is not present; set QEXP_DATA")
def test_the_writer_split_has_the_published_sizes():
    split = mnist.writers_mnist(QEXP_DATA)
    assert [len(part["label"]) for part in split[:3]] == [30_950, 29_050, 5_001]
    writers = [set(part["writer"].tolist()) for part in split[:3]]
    assert [len(w) for w in writers[:2]] == [289, 250] and not writers[0] & writers[1] and not writers[1] & writers[2]


@pytest.mark.skipif(not (QEXP_DATA / "mnist").is_dir(), reason="full MNIST is not present; set QEXP_DATA")
def test_the_rotated_split_turns_the_students_images_and_nothing_else():
    plain, turned = mnist.writers_mnist(QEXP_DATA), mnist.rotated_mnist(QEXP_DATA)
    np.testing.assert_array_equal(plain.public["x"], turned.public["x"])
    np.testing.assert_array_equal(plain.test["label"], turned.test["label"])
    assert not np.allclose(plain.test["x"][0], turned.test["x"][0], atol=0.1)


@pytest.mark.skipif(not (QEXP_DATA / "mnist").is_dir(), reason="full MNIST is not present; set QEXP_DATA")
def test_longer_pretraining_knows_more_and_more_still_teaches_nothing(tmp_path):
    """The test part is of the private population, of which the briefly pretrained model has .845 right."""
    task = tasks.TASKS["mnist_trained"]
    longer = {"linear": task.pretraining["linear"] | {"epochs": 40}}

    def accuracy(task):
        pretrained = tasks.pretrained_on(task, "linear", QEXP_DATA, tmp_path)
        return models.evaluate(pretrained.model, pretrained.params, pretrained.split.test, "accuracy")

    trained, more = accuracy(task), accuracy(task._replace(pretraining=longer))
    assert trained > 0.865 and abs(more - trained) < 0.004


@pytest.mark.parametrize("kind", ["noisy", "turned", "transposed"])
def test_the_digits_of_a_small_task_are_changed_in_private_and_test_alone(kind):
    images, labels = load_digits(return_X_y=True)
    known = {(x / 16).astype(np.float32).tobytes(): label for x, label in zip(images, labels, strict=True)}
    split = small.changed_digits(kind)
    assert [len(part["label"]) for part in split[:3]] == [500, 700, 597]
    assert [known[x.tobytes()] for x in split.public["x"]] == split.public["label"].tolist()
    assert not any(x.tobytes() in known for part in split[1:3] for x in part["x"])
    if kind == "transposed":
        found = [known.pop(x.tobytes()) for x in split.public["x"]]
        found += [known.pop(np.ascontiguousarray(x.T).tobytes()) for part in split[1:3] for x in part["x"]]
        assert found == np.concatenate([part["label"] for part in split[:3]]).tolist()


@pytest.mark.parametrize("kind", ["changed", "inverted"])
def test_a_small_tables_outcome_follows_other_coefficients_in_private(kind):
    split = small.changed_table(kind)
    assert [len(part["label"]) for part in split[:3]] == [2000, 4000, 3000]
    public, private, test = (LogisticRegression().fit(p["x"], p["label"]).coef_[0] for p in split[:3])
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(private, test) > 0.99
    assert cosine(public, private) < -0.9 if kind == "inverted" else abs(cosine(public, private)) < 0.9
    np.testing.assert_array_equal(small.changed_table(kind).test["x"], split.test["x"])


def test_small_clinical_tasks_change_features_or_labels_of_private_and_test(monkeypatch):
    rng = np.random.default_rng(0)
    records = lambda n: {"x": rng.normal(size=(n, 40)).astype(np.float32), "label": rng.integers(0, 2, n)}
    plain = splits.Split(records(5), records(6), records(7), "by ICU")
    monkeypatch.setattr(small.physionet, "by_icu", lambda data_dir, cache_dir: plain)
    for kind, features in {"moved": 20, "flipped": 12, "inverted": 0}.items():
        split = small.changed_physionet(kind, pathlib.Path(), pathlib.Path())
        assert split.public is plain.public
        for before, after in zip(plain[1:3], split[1:3], strict=True):
            changed = np.any(before["x"] != after["x"], axis=0)
            assert np.sum(changed) == features and np.all((before["x"] != after["x"]) == changed)
            np.testing.assert_array_equal(after["label"], 1 - before["label"] if features == 0 else before["label"])


def largest_gap(some, others):
    """Of the means of common columns, in standard errors of their difference."""
    common = np.sum(some != 0, axis=0) >= 50
    some, others = some[:, common].astype(float), others[:, common].astype(float)
    spread = np.concatenate([some, others]).std(0)
    standard_error = spread * np.sqrt(1 / len(some) + 1 / len(others))
    return np.max(np.abs(some.mean(0) - others.mean(0)) / standard_error)


def assert_no_shift(split):
    """Parts agree within sampling error, where records with the outcome alone would not."""
    public, private, test = (np.column_stack([part["x"], part["label"]]) for part in split[:3])
    assert largest_gap(public, private) < 3
    assert largest_gap(public, test) < 4
    positive = split.test["x"][split.test["label"] == 1]
    assert largest_gap(split.public["x"], positive) > 5


def rare_columns(split):
    """Numbers of columns with 1 to 9 public records; with none; and with none but private ones."""
    public, private = (np.sum(part["x"] != 0, axis=0) for part in (split.public, split.private))
    return np.sum((public > 0) & (public < 10)), np.sum(public == 0), np.sum((public == 0) & (private > 0))


def public_linear_auroc(split):
    model = LogisticRegression(max_iter=1000).fit(split.public["x"], split.public["label"])
    return models.auroc(model.decision_function(split.test["x"])[:, None], split.test["label"])


def test_the_rare_table_has_rare_columns_and_no_shift():
    split = small.rare_table()
    assert [part["x"].shape for part in split[:3]] == [(30_000, 90), (2000, 90), (10_000, 90)]
    assert all(np.all(part["x"][:, :85].sum(1) == 10) for part in split[:3])
    assert 0.085 < split.public["label"].mean() < 0.095
    assert rare_columns(split) == (19, 9, 3)
    assert_no_shift(split)
    assert 0.62 < public_linear_auroc(split) < 0.68
    for part, again in zip(split[:3], small.rare_table()[:3], strict=True):
        np.testing.assert_array_equal(part["x"], again["x"])
        np.testing.assert_array_equal(part["label"], again["label"])


@pytest.mark.skipif(not (QEXP_DATA / "physionet2012").is_dir(), reason="PhysioNet 2012 is not present; set QEXP_DATA")
def test_the_rare_stays_have_rare_columns_and_no_shift(tmp_path):
    split = small.rare_physionet(QEXP_DATA, tmp_path)
    assert [part["x"].shape for part in split[:3]] == [(8000, 144), (2000, 144), (2000, 144)]
    assert 0.13 < split.public["label"].mean() < 0.15
    assert rare_columns(split) == (15, 5, 2)
    assert_no_shift(split)
    assert 0.79 < public_linear_auroc(split) < 0.86
    for part, again in zip(split[:3], small.rare_physionet(QEXP_DATA, tmp_path)[:3], strict=True):
        np.testing.assert_array_equal(part["x"], again["x"])
        np.testing.assert_array_equal(part["label"], again["label"])


def made_up_stays(rng, n):
    """Raw features of `n` stays of which one in ten misses any value."""
    raw = rng.normal(size=(n, len(small.physionet.STATIC) + 5 * len(small.physionet.SERIES)))
    raw[rng.random(raw.shape) < 0.1] = np.nan
    raw[:, small.physionet.STATIC.index("Gender")] = rng.choice([0, 1, np.nan], n)
    raw[:, len(small.physionet.STATIC) + 4 :: 5] = rng.integers(0, 20, (n, len(small.physionet.SERIES)))
    return {"x": raw, "label": rng.integers(0, 2, n), "icu": rng.integers(1, 5, n), "stay": np.arange(n)}


def test_a_rare_stay_has_one_level_of_each_variable(monkeypatch):
    """Of thirteen binned ones, ICU type, sex and six counts."""
    rng = np.random.default_rng(0)
    sets = [made_up_stays(rng, n) for n in (100, 110, 90)]
    monkeypatch.setattr(small.physionet, "_tables", lambda data_dir, cache_dir: sets)
    split = small.rare_physionet(pathlib.Path(), pathlib.Path())
    assert [len(part["label"]) for part in split[:3]] == [200, 50, 50]
    assert all(np.all(part["x"].sum(1) == 21) and set(np.unique(part["x"])) == {0, 1} for part in split[:3])


def test_no_bin_of_rare_stays_follows_private_values():
    stays, public = made_up_stays(np.random.default_rng(0), 300), np.arange(200)
    raw, other = stays["x"], stays["x"].copy()
    other[200:] = made_up_stays(np.random.default_rng(1), 100)["x"] * 3
    before, after = (small._stay_columns(x, stays["icu"], public) for x in (raw, other))
    np.testing.assert_array_equal(before[public], after[public])
    bins = before[public, : 13 * 6].reshape(200, 13, 6)
    known = bins[:, :, :5].sum(2)
    np.testing.assert_allclose(bins[:, :, :5].sum(0) / known.sum(0)[:, None], 0.2, atol=0.01)


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images.*QMNIST"):
        mnist.writers_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab")[:-9], "truncated"),
        (b"plain", "not gzip"),
        (gzip.compress(b"PNG!"), "IDX header"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x03ab"), "expected .* numbers, found 2"),
    ],
    ids=["truncated", "plain", "header", "length"],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "some-idx.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        mnist.read_idx(path)


def test_a_known_file_with_a_wrong_checksum_is_refused(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab"))
    with pytest.raises(ValueError, match="md5"):
        mnist.read_idx(path)


@pytest.mark.parametrize("tune", ["count_sketch", "lora"])
def test_the_large_model_runs_small(tmp_path, tune):
    sizes = "--layers 1 --width 64 --vocabulary 300 --private 4 --public 4 --tokens 8 --dim 64"
    large.main([*sizes.split(), "--tune", tune, "--out", str(tmp_path)])
    rows = (tmp_path / f"large_{tune}.csv").read_text().splitlines()
    assert rows[0].startswith("tune,num_params,k") and sum("private pass" in row for row in rows) == 1 + (
        tune != "lora"
    )


def test_the_cluster_script_makes_one_release_with_two_processes(tmp_path):
    cluster.start_locally(2, ["--model", "linear", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "certificate.json", "params.msgpack"}
    assert json.loads((tmp_path / "certificate.json").read_text())["num_units"] == 2000


def test_local_processes_get_the_other_arguments():
    assert cluster._without_local(["--local", "2", "--out", "x"]) == ["--out", "x"]
    assert cluster._without_local(["--epsilon", "2", "--local=3"]) == ["--epsilon", "2"]


def test_a_cache_that_cannot_be_made_is_named_without_a_traceback(tmp_path):
    """A plain file in its place, which importing the scripts must not stumble over."""
    (tmp_path / "cache").touch()
    command = [sys.executable, "-m", "experiments.benchmark.grid", "--tasks", "physionet_icu", "--models", "linear"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    environment = os.environ | {"QEXP_CACHE": str(tmp_path / "cache")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr and "error: " in found.stderr


@pytest.mark.skipif(not (QEXP_DATA / "mnist").is_dir(), reason="full MNIST is not present; set QEXP_DATA")
def test_tilted_training_runs(capsys):
    """The example's own loop, on few images and few steps."""
    sizes = ["--num-public", "1500", "--num-private", "1500", "--steps", "60"]
    tilted_training.main(["--data-dir", str(QEXP_DATA), *sizes])
    shown = capsys.readouterr().out
    assert "equal weights" in shown and "tilted" in shown and "of 1500 public records" in shown
