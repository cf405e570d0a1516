import collections
import gzip
import io
import itertools
import os
import pathlib
import tarfile

import numpy as np
import pytest

from experiments.data import clinical, physionet, splits

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
            "Outcomes-c.txt, line 2: expected an In-hospital_death of 0 or 1",
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
    found, alone = splits.standardise(reference, part), splits.standardise(reference, part[:1])
    np.testing.assert_allclose(found[0], [[0, 0, 0, 1], [5, 0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(found[0][:1], alone[0])


def test_infinity_counts_as_missing():
    """One row's infinity changes no other row and leaves no column without spread."""
    reference = np.array([[1.0], [3.0], [np.inf], [-np.inf]])
    found = splits.standardise(reference, reference, np.array([[np.nan], [np.inf]]))
    np.testing.assert_allclose(found[0], [[-1, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(found[1], [[0, 1], [0, 1]])


def write_folders(folder):
    """The sets of `write_sets`, unpacked."""
    write_sets(folder)
    for letter in "abc":
        archive = folder / f"set-{letter}.tar.gz"
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        archive.unlink()


def read(folder):
    """The control split of a folder, whose set a is public, from an empty cache."""
    return physionet.no_shift(folder, folder / "cache")


def assert_same(found, expected):
    for part, other in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(part["x"], other["x"])
        np.testing.assert_array_equal(part["label"], other["label"])


def replace(path, old, new):
    """Changes one passage of a text file."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def append(name, content):
    """A change to a folder: the file with more at its end."""

    def change(folder):
        with (folder / name).open("ab") as file:
            file.write(content.encode() if isinstance(content, str) else content)

    return change


def rewrite(name, function):
    """A change to a folder: the file's bytes as the function makes them."""

    def change(folder):
        path = folder / name
        path.write_bytes(function(path.read_bytes()))

    return change


def add(name, content=b"Mac OS X\0\xff"):
    """A change to a folder: one more file."""

    def change(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return change


def nest(folder):
    """The stays one folder deeper, as unpacking by hand may leave them."""
    (folder / "set-a").rename(folder / "moved")
    (folder / "set-a").mkdir()
    (folder / "moved").rename(folder / "set-a" / "set-a")


STAY, OUTCOMES = "set-a/3.txt", "Outcomes-a.txt"
LINE = 10  # the first line that a test appends to a stay


def crlf(content):
    return content.replace(b"\n", b"\r\n")


def mark(content):
    return b"\xef\xbb\xbf" + content


HARMLESS = {
    "blank line": append(STAY, "\n  \n"),
    "blank first line": rewrite(STAY, lambda content: b"\n" + content),
    "empty spreadsheet row": append(STAY, ",,\n"),
    "line ends": rewrite(STAY, crlf),
    "byte order mark": rewrite(STAY, mark),
    "spaces": rewrite(STAY, lambda content: content.replace(b",", b" , ")),
    "outcomes' blank line": append(OUTCOMES, "\n,,,,,\n"),
    "outcomes' line ends": rewrite(OUTCOMES, crlf),
    "outcomes' byte order mark": rewrite(OUTCOMES, mark),
    "outcomes as 1.0": rewrite(OUTCOMES, lambda content: content.replace(b",1\n", b",1.0\n")),
    "dot underscore": add("set-a/._3.txt"),
    "desktop store": add("set-a/.DS_Store"),
    "macosx": add("set-a/__MACOSX/set-a/._3.txt"),
    "hidden folder": add("set-a/.trash/3.txt"),
    "nested": nest,
    "after 48 hours": append(STAY, "48:01,HR,200\n72:00,HR,201\n100:00,Lactate,3\n"),
    **{
        f"{parameter} {value}": append(STAY, f"10:00,{parameter},{value}\n")
        for parameter in ("HR", "Lactate", "Weight")
        for value in ("NaN", "nan", "inf", "-inf", "1e999", "1e300", "-5", "-1", "-1.0", "1e4")
    },
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_harmless_changes_change_nothing(tmp_path, change):
    """Neither in the stay that has them, nor through the public statistics in any other."""
    write_folders(tmp_path / "good")
    write_folders(tmp_path / "changed")
    change(tmp_path / "changed")
    assert_same(read(tmp_path / "changed"), read(tmp_path / "good"))


def refused_row(row, message):
    return append(STAY, row + "\n"), f"3.txt, line {LINE}: {message}"


def refused_entry(old, new, message):
    return lambda folder: replace(folder / STAY, old, new), f"3.txt, line.* {message}"


def refused_outcome(row, message):
    return append(OUTCOMES, row + "\n"), f"Outcomes-a.txt, line 10: {message}"


def in_place(name):
    """A folder with the file's name, and the file within."""

    def change(folder):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        (path / path.name).write_bytes(content)

    return change


def in_both_sets(folder):
    (folder / "set-b" / "3.txt").write_bytes((folder / STAY).read_bytes())
    append("Outcomes-b.txt", "3,6,1,5,-1,1\n")(folder)


REFUSED = {
    "two fields": refused_row("10:00,HR", "expected the 3 fields .* found 2"),
    "four fields": refused_row("10:00,HR,80,bpm", "expected the 3 fields .* found 4"),
    "empty value": refused_row("10:00,HR,", "expected a number as the value of HR"),
    "operator": refused_row("10:00,HR,> 5", "expected a number"),
    "null": refused_row("10:00,HR,NULL", "expected a number"),
    "underscore": refused_row("10:00,HR,8_0", "expected a number"),
    "nul byte": refused_row("10:00,HR,80\0", "expected a number"),
    "minute 60": refused_row("24:60,HR,80", "expected a time hh:mm"),
    "short time": refused_row("7:5,HR,80", "expected a time"),
    "negative time": refused_row("-01:00,HR,80", "expected a time"),
    "no time": refused_row(",HR,80", "expected a time"),
    "second header": refused_row("Time,Parameter,Value", "expected a time"),
    "unknown parameter": refused_row("10:00,Pulse,80", "expected a parameter of the Challenge"),
    "no parameter": refused_row("10:00,,80", "expected a parameter"),
    "not utf-8": (append(STAY, b"10:00,HR,80\xb5\n"), f"3.txt, line {LINE}: not UTF-8"),
    "utf-16": (rewrite(STAY, lambda content: content.decode().encode("utf-16")), "3.txt, line 1: not UTF-8"),
    "utf-16, no mark": (rewrite(STAY, lambda text: text.decode().encode("utf-16-le")), "3.txt, line 1: .* header"),
    "no header": refused_entry("Time,Parameter,Value\n", "", "expected the header"),
    "other header": refused_entry("Time,Parameter,Value\n", "Time,Value,Parameter\n", "expected the header"),
    "empty file": (rewrite(STAY, lambda content: b""), "3.txt, line 1: expected the header"),
    "no stay number": (lambda folder: replace(folder / STAY, "00:00,RecordID,3\n", ""), "3.txt: .* no RecordID"),
    "stay nan": refused_entry("RecordID,3", "RecordID,NaN", "expected a RecordID, a whole number"),
    "stay inf": refused_entry("RecordID,3", "RecordID,1e999", "expected a RecordID"),
    "stay -1": refused_entry("RecordID,3", "RecordID,-1", "expected a RecordID"),
    "stay 3.5": refused_entry("RecordID,3", "RecordID,3.5", "expected a RecordID"),
    "stay huge": refused_entry("RecordID,3", "RecordID,1e300", "expected a RecordID"),
    "another's name": refused_entry("RecordID,3", "RecordID,4", "RecordID 4 in a file of another number"),
    "two numbers": (append(STAY, "00:00,RecordID,4\n"), "3.txt, lines 2 and 10: RecordID twice"),
    "two units": (append(STAY, "00:00,ICUType,4\n"), "3.txt, lines 6 and 10: ICUType twice"),
    "two ages": (append(STAY, "00:00,Age,61\n"), "3.txt, lines 3 and 10: Age twice"),
    "late age": refused_entry("00:00,Age", "00:10,Age", "expected Age at 00:00"),
    "no unit": (lambda folder: replace(folder / STAY, "00:00,ICUType,2\n", ""), "3.txt: .* found no ICUType"),
    "unit nan": refused_entry("ICUType,2", "ICUType,NaN", "expected an ICUType of 1 to 4"),
    "unit inf": refused_entry("ICUType,2", "ICUType,inf", "expected an ICUType"),
    "unit 5": refused_entry("ICUType,2", "ICUType,5", "expected an ICUType"),
    "unit 2.5": refused_entry("ICUType,2", "ICUType,2.5", "expected an ICUType"),
    "copied stay": (add("set-a/3b.txt", stay(3, 2).encode()), "RecordID 3 is in two files"),
    "stay in two sets": (in_both_sets, "RecordID 3 is in two sets"),
    "stay as folder": (in_place(STAY), "3.txt: a folder where a file is expected"),
    "outcomes as folder": (in_place(OUTCOMES), "Outcomes-a.txt: a folder where a file is expected"),
    "folder and archive": (add("set-a.tar.gz", b"x"), "set-a.tar.gz and .*set-a; remove one"),
    "outcomes twice": (add("physionet2012/Outcomes-a.txt", b"x"), "Outcomes-a.txt and .*Outcomes-a.txt; remove one"),
    "outcome repeated": refused_outcome("3,6,1,5,-1,1", "a second outcome of RecordID 3"),
    "outcome contradicted": refused_outcome("3,6,1,5,-1,0", "a second outcome of RecordID 3"),
    "outcome 2": refused_outcome("99,6,1,5,-1,2", "expected an In-hospital_death of 0 or 1"),
    "outcome nan": refused_outcome("99,6,1,5,-1,NaN", "expected an In-hospital_death"),
    "outcome empty": refused_outcome("99,6,1,5,-1,", "expected an In-hospital_death"),
    "outcome's five fields": refused_outcome("99,6,1,5,1", "expected 6 fields, found 5"),
    "outcome's seven fields": refused_outcome("99,6,1,5,-1,1,", "expected 6 fields, found 7"),
    "outcome's number": refused_outcome("x,6,1,5,-1,1", "expected a RecordID"),
    "outcome alone": (append(OUTCOMES, "99,6,1,5,-1,1\n"), r"8 stays for 9 outcomes .* without a stay \[99\]"),
    "stay alone": (add("set-a/99.txt", stay(99, 1).encode()), r"9 stays for 8 outcomes .* an outcome \[99\]"),
    "outcomes' index": (rewrite(OUTCOMES, lambda content: b"," + content), "Outcomes-a.txt, line 1: .* the header"),
    "outcomes' header alone": (rewrite(OUTCOMES, lambda content: HEADER.encode()), "Outcomes-a.txt: no outcome"),
    "outcomes empty": (rewrite(OUTCOMES, lambda content: b""), "Outcomes-a.txt, line 1: expected the header"),
    "outcomes utf-16": (rewrite(OUTCOMES, lambda text: text.decode().encode("utf-16")), "Outcomes-a.txt.* not UTF-8"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_other_changes_are_refused(tmp_path, change, message):
    """By name and line, as the command line shows it, and no cache is left."""
    write_folders(tmp_path)
    change(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        splits.run_cli(lambda: read(tmp_path))
    assert not list(tmp_path.glob("cache/*"))


def test_errors_quote_no_values(tmp_path):
    write_folders(tmp_path)
    append(STAY, "10:00,HR,98765 bpm\n")(tmp_path)
    with pytest.raises(ValueError, match="expected a number") as caught:
        read(tmp_path)
    assert "98765" not in str(caught.value)


def test_last_is_by_time():
    """Rows of one time keep the file's order."""
    at = len(physionet.STATIC) + 5 * physionet.SERIES.index("HR")
    _, _, features = physionet._stay("x", stay(7, 3, "48:00,HR,70\n09:00,HR,80\n10:00,HR,90\n"))
    np.testing.assert_allclose(features[at : at + 5], [70, 80, 70, 90, 3])
    _, _, tied = physionet._stay("x", stay(7, 3, "10:00,HR,90\n09:00,HR,80\n10:00,HR,85\n"))
    assert tied[at] == 85


def test_unknown_units_are_left_out(tmp_path, capsys):
    """A stay with ICUType -1 is in no population of either split, and both say so."""
    write_folders(tmp_path)
    replace(tmp_path / STAY, "ICUType,2", "ICUType,-1")
    for load, sizes in ((physionet.by_icu, [11, 8, 4]), (physionet.no_shift, [7, 8, 8])):
        split = load(tmp_path, tmp_path / "cache")
        assert [len(part["label"]) for part in split[:3]] == sizes
        assert "1 stay of unknown ICU" in split.description and "1 stay of unknown ICU" in capsys.readouterr().out


@pytest.mark.parametrize("parameter", sorted({*physionet.STATIC, *physionet.SERIES}))
def test_bounds_hold_for_all(parameter):
    """Of each parameter the values at the bounds count, and those beyond are as good as absent, and counted."""
    bounds = physionet.PHYSIONET_BOUNDS[parameter]
    entry = parameter in ("Age", "Gender", "Height")
    text = stay(7, 3)

    def features(*values):
        lines = [line for line in text.splitlines() if not (entry and parameter in line)]
        lines += [f"{'00' if entry else '10'}:00,{parameter},{value!r}" for value in values]
        dropped = collections.Counter()
        return physionet._stay("x", "\n".join(lines), dropped)[2], dropped.total()

    absent, _ = features()
    beyond = [float(np.nextafter(bounds.low, -np.inf)), float(np.nextafter(bounds.high, np.inf)), float("inf")]
    for value in beyond:
        found, removed = features(value)
        np.testing.assert_array_equal(found, absent)
        assert removed == (value != physionet.MISSING)
    for value in (bounds.low, bounds.high):
        found, removed = features(float(value))
        assert removed == 0
        assert not np.array_equal(found, absent, equal_nan=True)


def archive_of(members, level=9):
    """A gzipped tar of names and contents; a content of None is a folder."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            info.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(content or b""))
    return gzip.compress(raw.getvalue(), level)


def packed(folder, extra=(), level=9):
    """Set a of the folder as an archive, with more members."""
    files = sorted((folder / "set-a").glob("*.txt"))
    return archive_of([*((f"./set-a/{file.name}", file.read_bytes()) for file in files), *extra], level)


def pack(folder, content):
    for file in (folder / "set-a").glob("*"):
        file.unlink()
    (folder / "set-a").rmdir()
    (folder / "set-a.tar.gz").write_bytes(content)


def test_archives_of_macos_read(tmp_path):
    write_folders(tmp_path / "good")
    write_folders(tmp_path / "mac")
    rubbish = [(name, b"Mac OS X\0\xff") for name in ("._set-a", "./set-a/._3.txt", "__MACOSX/3.txt", ".DS_Store")]
    pack(tmp_path / "mac", packed(tmp_path / "mac", rubbish))
    assert_same(read(tmp_path / "mac"), read(tmp_path / "good"))


def cut_tar(size):
    """Whole gzip around a tar that ends after so many bytes."""
    return lambda content: gzip.compress(gzip.decompress(content)[:size])


def flip(content):
    """Bytes within the stream, far from its ends."""
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 4]) + content[middle + 4 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "truncated or not a gzipped tar"),
        (lambda content: gzip.decompress(content), "truncated or not a gzipped tar"),
        (lambda content: gzip.compress(b"no tar"), "truncated or not a gzipped tar"),
        (lambda content: content[: len(content) // 2], "truncated or not a gzipped tar"),
        (lambda content: content[:-4], "truncated or not a gzipped tar"),
        (flip, ""),
        (cut_tar(600), "truncated or not a gzipped tar"),
        (cut_tar(1500), "1 stays for 8 outcomes"),
        (lambda content: content + b"more", "truncated or not a gzipped tar"),
    ],
    ids=["empty", "plain tar", "no tar", "half", "cut end", "flipped", "cut stay", "cut header", "trailing"],
)
def test_damaged_archives_are_refused(tmp_path, damage, message):
    write_folders(tmp_path)
    pack(tmp_path, damage(packed(tmp_path)))
    with pytest.raises(ValueError, match=f"set-a.tar.gz.*{message}"):
        read(tmp_path)


def test_check_sums_are_compared(tmp_path):
    """A digit that flips in an uncompressed stream still reads as a number."""
    write_folders(tmp_path)
    pack(tmp_path, packed(tmp_path, level=0).replace(b"02:00,HR,73", b"02:00,HR,93"))
    with pytest.raises(ValueError, match="set-a.tar.gz: truncated or not a gzipped tar"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("set-a/99.txt", None), "set-a.tar.gz: set-a/99.txt is no file"),
        (("set-a/99.txt", stay(3, 2).encode()), "set-a.tar.gz: set-a/99.txt, line 2: RecordID 3 in a file of another"),
        (("set-a/3.txt", stay(3, 2).encode()), "RecordID 3 is in two files, .*set-a.tar.gz: ./set-a/3.txt and"),
        (("set-a/99.txt", stay(99, 2, "10:00,HR\n").encode()), "set-a.tar.gz: set-a/99.txt, line 8: .*found 2"),
    ],
    ids=["folder", "other name", "same name", "two fields"],
)
def test_members_are_named(tmp_path, member, message):
    write_folders(tmp_path)
    pack(tmp_path, packed(tmp_path, [member]))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_edited_stays_are_reread(tmp_path):
    """A folder's own time does not tell that a file in it was edited."""
    write_folders(tmp_path)
    before = read(tmp_path)
    replace(tmp_path / STAY, "02:00,HR,73", "02:00,HR,173")
    after = read(tmp_path)
    assert not np.array_equal(before.public["x"], after.public["x"])


def test_damaged_caches_are_named(tmp_path):
    write_folders(tmp_path)
    read(tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    os.truncate(cache, cache.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{cache.name}: a damaged cache .* remove it"):
        read(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with splits.atomic(tmp_path / "table.npz") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


needs_public_files = pytest.mark.skipif(
    not (QEXP_DATA / "physionet2012").is_dir(), reason="PhysioNet 2012 is not present; set QEXP_DATA"
)


@needs_public_files
def test_the_published_sizes_and_rates(tmp_path, capsys):
    split = physionet.by_icu(QEXP_DATA, tmp_path)
    assert [len(part["label"]) for part in split[:3]] == [5938, 4084, 1978]
    assert split.public["label"].mean() == pytest.approx(0.106, abs=5e-4)
    both = np.concatenate([split.private["label"], split.test["label"]])
    assert both.mean() == pytest.approx(0.178, abs=1e-3)
    (report,) = [line for line in capsys.readouterr().out.splitlines() if "values left out" in line]
    removed = sum(int(entry.split()[-1]) for entry in report.split(": ")[-1].split(", "))
    assert f"bounds remove {removed:,} " in physionet.__doc__


@needs_public_files
def test_bounds_alone_change_features(tmp_path, monkeypatch):
    """Of the public files: a feature changes only where one of its own values lies outside the bounds."""
    archive = QEXP_DATA / "physionet2012" / "set-a.tar.gz"
    texts = list(itertools.islice(physionet.read_texts(archive), 400))
    bounded = [physionet._stay(*text, collections.Counter())[2] for text in texts]
    bounds = physionet.PHYSIONET_BOUNDS
    everything = dict.fromkeys(bounds, clinical.Bounds(-np.inf, np.inf, ""))
    monkeypatch.setattr(physionet, "PHYSIONET_BOUNDS", everything)
    changed_stays = 0
    for text, found in zip(texts, bounded, strict=True):
        rows = physionet.read_rows(*text)
        outside = {
            row.parameter
            for row in rows
            if row.parameter in bounds and row.value != physionet.MISSING
            and not bounds[row.parameter].low <= row.value <= bounds[row.parameter].high
        }  # fmt: skip
        before = physionet._stay(*text)[2]
        differs = ~((before == found) | (np.isnan(before) & np.isnan(found)))
        names = [*physionet.STATIC, *np.repeat(physionet.SERIES, 5)]
        assert set(np.array(names)[differs]) == outside
        changed_stays += bool(outside)
    assert 20 < changed_stays < 200
