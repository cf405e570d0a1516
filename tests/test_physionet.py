import io
import os
import pathlib
import tarfile

import numpy as np
import pytest

from experiments import data, physionet

QEXP_DATA = pathlib.Path(os.environ.get("QEXP_DATA", "absent"))
ENTRY = "00:00,RecordID,{id}\n00:00,Age,60\n00:00,Gender,1\n00:00,Height,-1\n00:00,ICUType,{icu}\n00:00,Weight,80\n"
HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n"


def stay(number, icu, lines=""):
    return "Time,Parameter,Value\n" + ENTRY.format(id=number, icu=icu) + lines


def write_sets(folder, stays=None, outcomes=None):
    """Three sets of eight stays each, two of each ICU type, the odd ones with a fatal outcome."""
    folder.mkdir(exist_ok=True)
    for s, letter in enumerate("abc"):
        ids = [100 * s + i for i in range(8)]
        texts = {i: stay(i, 1 + i % 8 // 2, f"01:00,HR,{60 + i % 100}\n02:00,HR,{70 + i}\n") for i in ids} | (
            stays or {}
        )
        with tarfile.open(folder / f"set-{letter}.tar.gz", "w:gz") as archive:
            for i in ids:
                info = tarfile.TarInfo(f"set-{letter}/{i}.txt")
                info.size = len(texts[i])
                archive.addfile(info, io.BytesIO(texts[i].encode()))
        rows = [f"{i},6,1,5,-1,{i % 2}" for i in ids]
        (folder / f"Outcomes-{letter}.txt").write_text((outcomes or {}).get(letter, HEADER + "\n".join(rows) + "\n"))


def test_features_are_last_mean_min_max_and_count():
    lines = "00:10,HR,80\n05:00,HR,100\n06:00,HR,-1\n47:00,HR,60\n"
    number, icu, features = physionet._stay("x", stay(7, 3, lines))
    assert (number, icu) == (7, 3)
    at = len(physionet.STATIC) + 5 * physionet.SERIES.index("HR")
    np.testing.assert_allclose(features[at : at + 5], [60, 80, 60, 100, 3])
    np.testing.assert_array_equal(features[:4], [60, 1, np.nan, 80])
    empty = len(physionet.STATIC) + 5 * physionet.SERIES.index("Lactate")
    np.testing.assert_array_equal(features[empty : empty + 5], [np.nan] * 4 + [0])


def test_the_split_follows_the_icu_and_the_cache_is_reused(tmp_path):
    write_sets(tmp_path / "in")
    split = physionet.by_icu(tmp_path / "in", tmp_path / "cache")
    assert [len(part["label"]) for part in split[:3]] == [12, 8, 4]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = physionet.no_shift(tmp_path / "in", tmp_path / "cache")
    assert [len(part["label"]) for part in again[:3]] == [8, 8, 8]


def test_an_unpacked_folder_reads_like_the_archive(tmp_path):
    write_sets(tmp_path / "in")
    packed = physionet.no_shift(tmp_path / "in", tmp_path / "cache")
    for letter in "abc":
        with tarfile.open(tmp_path / "in" / f"set-{letter}.tar.gz") as archive:
            archive.extractall(tmp_path / "in", filter="data")
        (tmp_path / "in" / f"set-{letter}.tar.gz").unlink()
    unpacked = physionet.no_shift(tmp_path / "in", tmp_path / "cache2")
    np.testing.assert_array_equal(packed.private["x"], unpacked.private["x"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "set-b.tar.gz").unlink(), "No set-b.tar.gz .*physionet.org"),
        (lambda folder: os.truncate(folder / "set-b.tar.gz", 300), "set-b.tar.gz: truncated"),
        (lambda folder: (folder / "Outcomes-c.txt").write_text("a,b\n"), "expected the header"),
        (
            lambda folder: (folder / "Outcomes-c.txt").write_text(HEADER + "1,2,3,4,5,7\n"),
            "0 or 1, found '1,2,3,4,5,7'",
        ),
        (lambda folder: (folder / "Outcomes-c.txt").write_text(HEADER + "1,2,3,4,5,1\n"), "8 stays for 1 outcomes"),
        (lambda folder: write_sets(folder, stays={100: "Time,Value\n"}), "expected the header 'Time,Parameter,Value'"),
        (lambda folder: write_sets(folder, stays={100: "Time,Parameter,Value\n"}), "expected RecordID and ICUType"),
    ],
)
def test_damaged_files_are_refused_and_leave_no_cache(tmp_path, damage, message):
    write_sets(tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        physionet.no_shift(tmp_path / "in", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_a_part_with_one_class_is_refused(tmp_path):
    alive = HEADER + "".join(f"{100 + i},6,1,5,-1,0\n" for i in range(8))
    write_sets(tmp_path / "in", outcomes={"b": alive})
    with pytest.raises(ValueError, match=r"private part: expected both outcomes, found counts \[8, 0\]"):
        physionet.no_shift(tmp_path / "in", tmp_path / "cache")


def test_standardisation_sees_the_reference_alone():
    reference = np.array([[1.0, 5.0, np.nan], [3.0, 5.0, 2.0], [5.0, 5.0, 4.0]])
    part = np.array([[3.0, 9.0, np.nan], [1e9, 5.0, 3.0]])
    found, alone = data.standardise(reference, part), data.standardise(reference, part[:1])
    np.testing.assert_allclose(found[0], [[0, 0, 0, 1], [5, 0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(found[0][:1], alone[0])


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with data.atomic(tmp_path / "table.npz") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (QEXP_DATA / "physionet2012").is_dir(), reason="PhysioNet 2012 is not present; set QEXP_DATA")
def test_the_published_sizes_and_rates(tmp_path):
    split = physionet.by_icu(QEXP_DATA, tmp_path)
    assert [len(part["label"]) for part in split[:3]] == [5938, 4084, 1978]
    assert split.public["label"].mean() == pytest.approx(0.106, abs=5e-4)
    both = np.concatenate([split.private["label"], split.test["label"]])
    assert both.mean() == pytest.approx(0.178, abs=1e-3)
