"""The ledger composes, refuses, survives, and lets exactly one of two racers have the last of the budget."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import fine_tune

import qexp_jax
from qexp_jax import NeighboringRelation, privacy
from qexp_jax import ledger as ledgers
from qexp_jax.data import stream
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.privacy import ledger_file

RELATION = NeighboringRelation.REPLACE_SPECIAL
TERMS = {"neighboring_relation": RELATION, "privacy_unit": "one record"}
MU = privacy.mu_from_budget(1.0, 1e-5)


def new(folder, epsilon=1.0, delta=1e-5):
    return ledgers.create(folder / "ledger.json", epsilon=epsilon, delta=delta)


def debit(ledger, seed, mu, **changes):
    return ledgers.debit(ledger, jax.random.key(seed), mu=mu, **TERMS | changes)


def test_releases_compose_exactly_until_the_budget_is_spent(tmp_path):
    ledger = new(tmp_path)
    for seed in range(4):
        total = debit(ledger, seed, MU / 2)
    assert total.releases == 4 and total == ledgers.spent(ledgers.open(ledger.path))
    np.testing.assert_allclose([total.mu, total.delta], [MU, 1e-5], rtol=1e-9)
    before = ledger.path.read_bytes()
    with pytest.raises(qexp_jax.BudgetExceeded, match=r"epsilon=1.0, delta=1e-05.*beside those entered before \(4\)"):
        debit(ledger, 4, 1e-3)
    assert ledger.path.read_bytes() == before


def test_a_hardened_release_makes_all_of_them_zcdp(tmp_path):
    rho = privacy.rho_from_budget(1.0, 1e-5)
    ledger = new(tmp_path)
    debit(ledger, 0, rho**0.5)  # half of rho
    total = debit(ledger, 1, rho**0.5, hardened=True)
    assert total.mu is None
    np.testing.assert_allclose([total.zcdp_rho, total.delta], [rho, 1e-5], rtol=1e-6)
    with pytest.raises(qexp_jax.BudgetExceeded):
        debit(ledger, 2, 0.01)


def test_the_exact_gaussian_budget_is_too_much_for_a_hardened_release(tmp_path):
    with pytest.raises(qexp_jax.BudgetExceeded):
        debit(new(tmp_path), 0, MU, hardened=True)
    debit(ledgers.open(tmp_path / "ledger.json"), 0, MU)


def test_a_reused_key_is_refused_and_neither_it_nor_its_plain_hash_is_stored(tmp_path):
    ledger = new(tmp_path)
    debit(ledger, 0, 0.1)
    with pytest.raises(ValueError, match="key was used") as error:
        debit(ledger, 0, 0.05)
    assert "[" not in str(error.value)
    debit(ledger, 1, 0.1)
    other = tmp_path / "other"
    other.mkdir()
    debit(new(other), 0, 0.1)  # another secret gives another tag
    tags = [json.loads((p / "ledger.json").read_text())["body"]["entries"][0]["key"] for p in (tmp_path, other)]
    assert tags[0] != tags[1]


def test_another_relation_or_unit_is_refused(tmp_path):
    ledger = new(tmp_path)
    with pytest.raises(ValueError, match="neighboring_relation is 'REPLACE_SPECIAL', found 'REPLACE_ONE'"):
        debit(ledger, 0, 0.1, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(ValueError, match="privacy_unit is 'one record', found 'writers'"):
        debit(ledger, 0, 0.1, privacy_unit="writers")
    for mu in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mu > 0"):
            debit(ledger, 0, mu)
    assert ledgers.spent(ledger).releases == 0


def test_a_missing_or_existing_file_is_neither_made_nor_overwritten(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        ledgers.open(tmp_path / "ledger.json")
    with pytest.raises(ValueError, match="existing folder"):
        ledgers.open(tmp_path / "nowhere" / "ledger.json")
    ledger = new(tmp_path)
    debit(ledger, 0, MU)
    with pytest.raises(ValueError, match="existing"):
        new(tmp_path)
    assert ledgers.spent(ledger).releases == 1


def test_the_secret_is_its_owners_alone_and_needed(tmp_path):
    ledger = new(tmp_path)
    secret = tmp_path / "ledger.json.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    secret.chmod(0o640)
    with pytest.raises(ValueError, match="mode 0640"):
        ledgers.spent(ledger)
    secret.chmod(0o600)
    secret.write_bytes(b"0" * 64)
    with pytest.raises(ValueError, match="refused"):
        ledgers.spent(ledger)
    secret.unlink()
    with pytest.raises(ValueError, match="missing"):
        ledgers.spent(ledger)


def test_every_shortened_or_changed_file_is_refused_or_says_the_same(tmp_path):
    ledger = new(tmp_path)
    debit(ledger, 0, 0.1)
    whole, expected = ledger.path.read_bytes(), ledgers.spent(ledger)
    damaged = [whole[:length] for length in range(0, len(whole), 3)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 2)]
    damaged += [b"\xff" + whole, whole + whole, b"[" * 100_000, b"[]", b"null", b'{"body": {}, "mac": 1}']
    said = []
    for data in damaged:
        ledger.path.write_bytes(data)
        try:
            said.append(ledgers.spent(ledger))
        except ValueError as error:
            said.append("refused" if "is refused" in str(error) else error)
    assert set(said) <= {"refused", expected}  # a blank between values may change
    assert said.count("refused") > 0.8 * len(damaged)
    dropped = json.loads(whole)
    dropped["body"]["entries"].pop()
    ledger.path.write_text(json.dumps(dropped))
    with pytest.raises(ValueError, match="refused"):
        debit(ledger, 1, 0.1)


# One server imports the library and forks the processes, which are otherwise like any others.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["qexp_jax"])


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def break_ledger(folder, name):
    """Each process is its own, and need not be repaired."""
    replace, compose, beside = os.replace, ledgers._compose, ledger_file._beside
    if folder.name == "locked":
        ledger_file.read = die
    elif folder.name == "half written":
        os.fsync = die
    elif folder.name == "written":
        os.replace = die
    elif folder.name == "renamed":
        os.replace = lambda *args: (replace(*args), die())
    else:
        ledgers._compose = lambda body: (time.sleep(1.0), compose(body))[1]  # a wide gap between reading and writing
    if folder.name == "race unlocked":
        ledger_file.locked = lambda path: contextlib.nullcontext()
        ledger_file._beside = lambda path, suffix: beside(path, suffix + (name if suffix == ".tmp" else ""))


def child(name, mu, *folders):
    for folder in folders:
        break_ledger(folder, name)
        key = jax.random.key(int(name))
        (folder / f"ready {name}").touch()
        while not (folder / "go").exists():
            time.sleep(0.002)
        try:
            ledgers.debit(ledgers.Ledger(path=folder / "ledger.json"), key, mu=mu, **TERMS)
            (folder / f"said {name}").write_text("entered")
        except qexp_jax.BudgetExceeded:
            (folder / f"said {name}").write_text("refused")


def start(name, mu, *folders):
    process = PROCESSES.Process(target=child, args=(name, mu, *folders))
    process.start()
    return process


def let_go(folder, num_children):
    """When all of them are about to debit."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready *"))) < num_children:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder / "go").touch()


def said(folder):
    return sorted(path.read_text() for path in folder.glob("said *"))


def folders_with_ledgers(root, names, mu):
    for name in names:
        (root / name).mkdir()
        debit(new(root / name), 99, mu)
    return [root / name for name in names]


def test_of_two_processes_one_gets_the_last_budget_and_without_the_lock_both_would(tmp_path):
    folders = folders_with_ledgers(tmp_path, ["race", "race unlocked"], 0.6 * MU)
    children = [start(name, 0.7 * MU, *folders) for name in ("1", "2")]
    for folder in folders:
        let_go(folder, 2)
    for process in children:
        process.join(120)
    assert said(folders[0]) == ["entered", "refused"]
    assert said(folders[1]) == ["entered", "entered"]
    assert ledgers.spent(ledgers.open(folders[0] / "ledger.json")).releases == 2


def test_a_kill_at_any_point_leaves_the_old_or_the_new_ledger_and_a_free_lock(tmp_path):
    releases = {"locked": 1, "half written": 1, "written": 1, "renamed": 2}
    folders = folders_with_ledgers(tmp_path, releases, 0.3 * MU)
    children = [start("1", 0.6 * MU, folder) for folder in folders]
    for folder, process in zip(folders, children, strict=True):
        let_go(folder, 1)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL and not said(folder)
    assert [(folder / "ledger.json.tmp").exists() for folder in folders] == [False, True, True, False]
    for folder in folders:
        ledger = ledgers.open(folder / "ledger.json")
        assert ledgers.spent(ledger).releases == releases[folder.name]
        assert debit(ledger, 2, 0.1 * MU).releases == releases[folder.name] + 1


def test_threads_wait_for_each_other(tmp_path):
    ledger, outcomes = new(tmp_path), []

    def spend(seed):
        try:
            outcomes.append(debit(ledger, seed, 0.7 * MU).releases)
        except qexp_jax.BudgetExceeded:
            outcomes.append("refused")

    threads = [threading.Thread(target=spend, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["1", "2", "refused", "refused"]


def loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def tune(seed, loss_fn=loss, **changes):
    x = jax.random.normal(jax.random.key(1), (60, 3))
    data = {"x": x, "y": x @ jnp.arange(3.0)}
    public, private = jax.tree.map(lambda a: a[:20], data), jax.tree.map(lambda a: a[20:], data)
    arguments = {"public": public, "private": private, "epsilon": 0.7, "delta": 1e-5, "rounds": 2} | changes
    return fine_tune(jax.random.key(seed), loss_fn, {"w": jnp.ones(3)}, **arguments)


def test_a_release_is_entered_before_the_private_pass_and_refused_before_it(tmp_path, monkeypatch):
    ledger = new(tmp_path)
    release = tune(0, ledger=ledger.path)
    assert ledgers.spent(ledger).mu == pytest.approx(release.certificate["mu"], rel=1e-12)

    def read(*args, **arguments):
        raise RuntimeError("private data was read")

    monkeypatch.setattr("qexp_jax.fine_tuning.one_pass.exact_sum", read)
    with pytest.raises(qexp_jax.BudgetExceeded):
        tune(1, ledger=ledger, epsilon=0.9)
    with pytest.raises(ValueError, match="key was used"):
        tune(0, ledger=ledger, epsilon=0.1)
    with pytest.raises(ValueError, match="privacy_unit"):
        tune(1, ledger=ledger, unit_ids=np.arange(40) // 2)
    assert ledgers.spent(ledger).releases == 1
    with pytest.raises(RuntimeError, match="was read"):
        tune(1, ledger=ledger, epsilon=0.1)
    assert ledgers.spent(ledger).releases == 2  # spent, though the release was interrupted


# --- one debit, one release ---


class Stopped(Exception):
    """A preemption."""


def stop_at(stage, count):
    """A `progress` that stops the release where it reaches a stage for the `count`th time."""
    stages = []

    def progress(found):
        stages.append(found)
        if stages.count(stage) == count:
            raise Stopped

    return progress


def interrupted(folder, **changes):
    """A ledger, and the arguments of a release of two rounds that stopped in its second pass."""
    ledger = new(folder)
    arguments = {"ledger": ledger, "checkpoint": qexp_jax.Checkpoint(directory=folder / "run")} | changes
    with pytest.raises(Stopped):
        tune(0, progress=stop_at("private pass", 2), **arguments)
    return ledger, arguments


def copy_of(folder, name):
    shutil.copytree(folder / "run", folder / name)
    return {"checkpoint": qexp_jax.Checkpoint(directory=folder / name)}


def private_data():
    x = jax.random.normal(jax.random.key(1), (60, 3))[20:]
    return {"x": x, "y": x @ jnp.arange(3.0)}


def params_of(release):
    return np.asarray(release.params["w"])


def enter_draw(ledger, seed, number, draw):
    ledgers.enter_draw(ledger, jax.random.key(seed), number, np.asarray(draw, np.float32))


def test_a_round_has_one_draw(tmp_path):
    """Its bits may come again; of a hardened release not even these, and of no release nothing."""
    ledger = new(tmp_path)
    debit(ledger, 0, 0.1)
    debit(ledger, 1, 0.1, hardened=True)
    for seed in range(2):
        enter_draw(ledger, seed, 0, [1, 2])
        enter_draw(ledger, seed, 1, [1, 3])
    enter_draw(ledger, 0, 0, [1, 2])
    before = ledger.path.read_bytes()
    for seed, draw in ((0, [1, 3]), (0, [1]), (1, [1, 2])):
        with pytest.raises(ValueError, match="Round 0 .* drawn before, .*fresh_key"):
            enter_draw(ledger, seed, 0, draw)
    with pytest.raises(ValueError, match="not entered"):
        enter_draw(ledger, 2, 0, [1, 2])
    enter_draw(ledger, 0, -1, [4])  # the tilt's, before the rounds
    before = ledger.path.read_bytes()
    with pytest.raises(ValueError, match="drawn before"):
        enter_draw(ledger, 0, -1, [5])
    with pytest.raises(ValueError, match="integer number >= -1"):
        enter_draw(ledger, 0, -2, [1, 2])
    assert ledger.path.read_bytes() == before and ledgers.spent(ledger).releases == 2


def test_one_of_many_draws_is_entered(tmp_path):
    """Threads that draw the same hardened round at once."""
    ledger, outcomes = new(tmp_path), []
    debit(ledger, 0, 0.1, hardened=True)

    def draw(number):
        try:
            outcomes.append(enter_draw(ledger, 0, 0, [number]))
        except ValueError:
            outcomes.append("refused")

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["None"] + ["refused"] * 5


def test_an_older_ledger_still_counts(tmp_path):
    """Its entries know no draws, so that they cannot go on."""
    ledger = new(tmp_path)
    debit(ledger, 0, 0.6 * MU)
    body = json.loads(ledger.path.read_text())["body"]
    body["schema"] = "qexp_jax/ledger/1"
    del body["entries"][0]["draws"]
    mac = ledger_file.mac(ledger_file.secret_of(ledger.path), b"ledger", ledger_file.canonical(body))
    ledger.path.write_text(json.dumps({"body": body, "mac": mac}))
    assert ledgers.spent(ledgers.open(ledger.path)).mu == pytest.approx(0.6 * MU)
    assert not ledgers.holds(ledger, jax.random.key(0), mu=0.6 * MU, hardened=False)
    with pytest.raises(ValueError, match="knew no draws"):
        enter_draw(ledger, 0, 0, [1])
    with pytest.raises(qexp_jax.BudgetExceeded):
        debit(ledger, 1, 0.9 * MU)
    assert debit(ledger, 1, 0.1 * MU).releases == 2


def test_copies_draw_a_hardened_round_once(tmp_path):
    """A copy of an interrupted checkpoint goes on instead of the original, or after it; never both."""
    pytest.importorskip("opendp")
    ledger, arguments = interrupted(tmp_path, hardened=True)
    copy = copy_of(tmp_path, "copy")
    whole = tune(0, **arguments)
    with pytest.raises(ValueError, match="Round 1 .* drawn before"):
        tune(0, **arguments | copy)
    np.testing.assert_array_equal(params_of(tune(0, **arguments)), params_of(whole))  # it ended, and says the same
    assert ledgers.spent(ledger).releases == 1


def test_copies_end_with_the_same_bits(tmp_path):
    ledger, arguments = interrupted(tmp_path)
    copy = copy_of(tmp_path, "copy")
    np.testing.assert_array_equal(params_of(tune(0, **arguments)), params_of(tune(0, **arguments | copy)))
    assert ledgers.spent(ledger).releases == 1


@pytest.mark.parametrize("hardened", [False, True])
def test_deleted_steps_draw_nothing_new(tmp_path, hardened):
    """The same release again where that is possible, and none where noise is fresh."""
    if hardened:
        pytest.importorskip("opendp")
    ledger = new(tmp_path)
    arguments = {"ledger": ledger, "checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "run"), "hardened": hardened}
    whole = tune(0, **arguments)
    shutil.rmtree(tmp_path / "run" / "process_0" / "steps")
    if hardened:
        with pytest.raises(ValueError, match="Round 0 .* drawn before"):
            tune(0, **arguments)
    else:
        np.testing.assert_array_equal(params_of(tune(0, **arguments)), params_of(whole))
    assert ledgers.spent(ledger).releases == 1


def permuted(data):
    return jax.tree.map(lambda x: x[::-1], data)


def changed(data):
    return data | {"y": data["y"].at[3].add(1.0)}


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("other", [permuted, changed])
def test_other_data_in_memory_are_refused(tmp_path, other, hardened):
    """Without a word of them, without a debit, and after the end of the release too."""
    if hardened:
        pytest.importorskip("opendp")
    _, arguments = interrupted(tmp_path, hardened=hardened)
    (tmp_path / "ledger.json").unlink()
    arguments["ledger"] = ledger = new(tmp_path)
    with pytest.raises(ValueError, match=r"^The private data are not those, in their order, [^\d]*$"):
        tune(0, private=other(private_data()), **arguments)
    assert ledgers.spent(ledger).releases == 0
    tune(0, **arguments)  # the refusal has spoilt nothing
    with pytest.raises(ValueError, match="private data are not those"):
        tune(0, private=other(private_data()), **arguments)


def test_without_its_digest_the_ledger_refuses(tmp_path):
    """Steps and digest are gone, and what the noise protects is another sum."""
    ledger, arguments = interrupted(tmp_path)
    digest = tmp_path / "run" / "process_0" / "data_digest.txt"
    digest.unlink()
    with pytest.raises(ValueError, match="does not say of which data"):
        tune(0, **arguments)
    shutil.rmtree(tmp_path / "run" / "process_0" / "steps")
    with pytest.raises(ValueError, match="Round 0 .* drawn before"):
        tune(0, private=changed(private_data()), **arguments)
    digest.unlink()
    tune(0, **arguments)
    assert ledgers.spent(ledger).releases == 1


def test_another_loss_draws_no_second_time(tmp_path):
    """It differs on private records alone, so that plan, data and settings are the same."""
    _, arguments = interrupted(tmp_path)
    copy = copy_of(tmp_path, "copy")
    limit = float(jnp.max(jnp.abs(public_data()["x"])))

    def other_loss(params, record):
        is_private = jnp.max(jnp.abs(record["x"])) > limit
        return loss(params, record) + jnp.where(is_private, 10 * params["w"][0], 0)

    assert np.sum(np.max(np.abs(private_data()["x"]), axis=1) > limit) > 0
    tune(0, **arguments)
    with pytest.raises(ValueError, match="Round 1 .* drawn before"):
        tune(0, loss_fn=other_loss, **arguments | copy)


def public_data():
    x = jax.random.normal(jax.random.key(1), (60, 3))[:20]
    return {"x": x, "y": x @ jnp.arange(3.0)}


def test_a_paid_folder_needs_its_ledger(tmp_path):
    """A folder that says it was entered is believed if its ledger says so; with no ledger it does not go on."""
    _, arguments = interrupted(tmp_path)
    with pytest.raises(ValueError, match="ledger, which has to be given"):
        tune(0, **arguments | {"ledger": None})
    (tmp_path / "ledger.json").unlink()  # the secret stays, and with it the tags
    arguments["ledger"] = ledger = new(tmp_path)
    tune(0, **arguments)
    assert ledgers.spent(ledger).releases == 1


def test_a_paid_note_pays_for_no_other_terms(tmp_path):
    """A cheap release's note is copied into the folder of a dear one."""
    ledger, arguments = interrupted(tmp_path, epsilon=0.01)
    (tmp_path / "dear" / "process_0").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "process_0" / "paid.txt", tmp_path / "dear" / "process_0")
    dear = {"checkpoint": qexp_jax.Checkpoint(directory=tmp_path / "dear"), "epsilon": 0.5}
    with pytest.raises(ValueError, match="key was used"):
        tune(0, **arguments | dear)
    assert ledgers.spent(ledger).releases == 1


def fail(*args, **kwargs):
    raise OSError("no space left")


@pytest.mark.parametrize("hardened", [False, True])
def test_a_draw_that_was_not_saved_is_not_drawn_anew(tmp_path, monkeypatch, hardened):
    if hardened:
        pytest.importorskip("opendp")
    ledger, arguments = interrupted(tmp_path, hardened=hardened)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", fail)
        with pytest.raises(OSError, match="no space"):
            tune(0, **arguments)
    if hardened:
        with pytest.raises(ValueError, match="Round 1 .* drawn before"):
            tune(0, **arguments)
    else:
        tune(0, **arguments)
    assert ledgers.spent(ledger).releases == 1


def test_a_new_release_is_entered_before_its_digest(tmp_path, monkeypatch):
    ledger, entered, digest = new(tmp_path), [], stream.digest

    def watched(*args):
        entered.append(ledgers.spent(ledger).releases)
        return digest(*args)

    monkeypatch.setattr(stream, "digest", watched)
    tune(0, ledger=ledger, checkpoint=qexp_jax.Checkpoint(directory=tmp_path / "run"))
    assert entered == [1]


def test_digests_hold_any_leaf(tmp_path):
    """Typed keys, float64, bfloat16, booleans and no record at all."""
    checkpoint = qexp_jax.Checkpoint(directory=tmp_path)
    store = checkpoints.open_store(checkpoint, {})
    units = {
        "key": jax.random.split(jax.random.key(0), 4), "wide": np.arange(4.0), "half": jnp.ones(4, jnp.bfloat16),
        "mask": np.array([True, False, True, True]),
    }  # fmt: skip
    checkpoints.bind_units(store, units)
    checkpoints.check_units(store, units)
    for name, value in (
        ("key", jax.random.split(jax.random.key(1), 4)), ("wide", np.nextafter(np.arange(4.0), 9)),
        ("half", jnp.zeros(4, jnp.bfloat16)), ("mask", np.ones(4, bool)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="private data are not those"):
            checkpoints.check_units(store, units | {name: value})
    with pytest.raises(ValueError, match="private data are not those"):
        checkpoints.check_units(store, jax.tree.map(lambda x: x[:0], units))


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    """And no folder with the name ~ is made."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    ledgers.create("~/ledger.json", epsilon=1.0, delta=1e-5)
    tune(0, ledger="~/ledger.json", checkpoint=qexp_jax.Checkpoint(directory="~/run"))
    assert sorted(path.name for path in (tmp_path / "home").iterdir() if path.suffix != ".lock") == [
        "ledger.json", "ledger.json.secret", "run",
    ]  # fmt: skip
    assert not list((tmp_path / "here").iterdir())
    with pytest.raises(ValueError, match="Expected a path"):
        tune(1, checkpoint=qexp_jax.Checkpoint(directory="~no_such_user_here/run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "run"}, r"Expected a Checkpoint\(directory=...\), found str"),
        ({"directory": 3}, "directory, found int"),
        ({"directory": b"run"}, "directory, found bytes"),
        ({"every": True}, "integer every >= 1"),
        ({"every": 2.0}, "integer every >= 1"),
        ({"every": "2"}, "integer every >= 1"),
        ({"directory": __file__}, "found a file on the way"),
        ({"ledger": 5}, "Expected a ledger .*found int"),
    ],
)
def test_wrong_types_are_refused_before_the_debit(tmp_path, changes, message):
    ledger = new(tmp_path)
    settings = {"directory": tmp_path / "run", "every": 1} | changes
    checkpoint = qexp_jax.Checkpoint(directory=settings["directory"], every=settings["every"])
    with pytest.raises(ValueError, match=message):
        tune(
            0,
            **{"ledger": ledger, "checkpoint": checkpoint}
            | {k: changes[k] for k in changes if k in ("checkpoint", "ledger")},
        )
    assert ledgers.spent(ledger).releases == 0


def test_integers_of_numpy_are_integers(tmp_path):
    assert checkpoints.check(qexp_jax.Checkpoint(directory=tmp_path, every=np.int64(3))) == (tmp_path, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": 5}, "path of a ledger, found int"),
        ({"neighboring_relation": "REPLACE_ONE"}, "neighboring_relation"),
        ({"privacy_unit": 1}, "text as privacy_unit"),
    ],
)
def test_wrong_types_make_no_ledger(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ledgers.create(**{"path": tmp_path / "ledger.json", "epsilon": 1.0, "delta": 1e-5} | changes)
    assert not list(tmp_path.iterdir())
