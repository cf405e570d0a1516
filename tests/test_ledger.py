"""The ledger composes, refuses, survives, and lets exactly one of two racers have the last of the budget."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation

import qexp_jax
from qexp_jax import ledger as ledgers
from qexp_jax import privacy

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
    with pytest.raises(qexp_jax.BudgetExceeded, match=r"epsilon=1.0, delta=1e-05.*after 4 others"):
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
    replace, compose, beside = os.replace, ledgers._compose, ledgers._beside
    if folder.name == "locked":
        ledgers._read = die
    elif folder.name == "half written":
        os.fsync = die
    elif folder.name == "written":
        os.replace = die
    elif folder.name == "renamed":
        os.replace = lambda *args: (replace(*args), die())
    else:
        ledgers._compose = lambda body: (time.sleep(1.0), compose(body))[1]  # a wide gap between reading and writing
    if folder.name == "race unlocked":
        ledgers._locked = lambda ledger: contextlib.nullcontext()
        ledgers._beside = lambda ledger, suffix: beside(ledger, suffix + (name if suffix == ".tmp" else ""))


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


def tune(seed, **changes):
    x = jax.random.normal(jax.random.key(1), (60, 3))
    data = {"x": x, "y": x @ jnp.arange(3.0)}
    public, private = jax.tree.map(lambda a: a[:20], data), jax.tree.map(lambda a: a[20:], data)
    arguments = {"public": public, "private": private, "epsilon": 0.7, "delta": 1e-5, "rounds": 2} | changes
    return qexp_jax.fine_tune(jax.random.key(seed), loss, {"w": jnp.ones(3)}, **arguments)


def test_a_release_is_entered_before_the_private_pass_and_refused_before_it(tmp_path, monkeypatch):
    ledger = new(tmp_path)
    release = tune(0, ledger=ledger.path)
    assert ledgers.spent(ledger).mu == pytest.approx(release.certificate["mu"], rel=1e-12)

    def read(*args, **arguments):
        raise RuntimeError("private data was read")

    monkeypatch.setattr(qexp_jax.passes, "device_sum", read)
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
