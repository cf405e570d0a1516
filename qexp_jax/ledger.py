"""A budget ledger: one file that composes all releases over one dataset and refuses the one too many.

    create     a new ledger with a fixed budget, neighbouring relation and privacy unit
    open       an existing one
    debit      enters a release *before* its noise is drawn; raises where the budget would be exceeded or the key reused
    spent      what has been spent

Composition. Ideal Gaussian releases compose exactly, `mu^2 = sum mu_t^2`. As soon as one release is hardened
(rho-zCDP), all are taken as zCDP, `rho = sum rho_t` with `rho_t = mu_t^2 / 2`, which is sound for both.

The file is JSON with an HMAC over all of it, rewritten as a whole under a lock: a temporary file is synced, renamed
over the old one, and the folder synced. A process that is killed leaves the old file or the new one, and what is
entered is spent, whether or not its release was made. A changed or shortened file is refused. Putting back an old copy
is not detected: keep the ledger where its backups are not restored. Locks are POSIX's, on a local file system.

Keys are remembered by an HMAC under a secret file beside the ledger (mode 0600): a plain hash of a 64-bit key is as
good as the key. The ledger reads no private value, and is itself public but for that secret.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from dp_accounting import NeighboringRelation

from qexp_jax import privacy

SCHEMA = "qexp_jax/ledger/1"
_ROUNDING = 1e-9


class BudgetExceeded(ValueError):
    """The release would exceed the ledger's budget; nothing was entered and nothing private read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where a ledger lies; its state is in its file alone.

    Attributes:
      path: the file. Beside it lie `<path>.secret`, `<path>.lock` and, for a moment, `<path>.tmp`.
    """

    path: pathlib.Path


class Spent(NamedTuple):
    """The composition of all entries.

    Attributes:
      releases: how many.
      mu: of Gaussian differential privacy; None where a release was hardened.
      zcdp_rho: of zero-concentrated differential privacy.
      delta: at the budget's epsilon.
    """

    releases: int
    mu: float | None
    zcdp_rho: float
    delta: float


def create(
    path: str | os.PathLike[str],
    *,
    epsilon: float,
    delta: float,
    neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL,
    privacy_unit: str = "one record",
) -> Ledger:
    """A new ledger of one dataset.

    Args:
      path: a file that does not exist.
      epsilon: the budget of all releases together.
      delta: the same.
      neighboring_relation: of every release.
      privacy_unit: of every release, as in the certificate.

    Raises:
      ValueError: if the file exists or the budget is impossible.
    """
    privacy.check_budget(epsilon, delta)
    ledger = Ledger(path=pathlib.Path(path).resolve())
    body = {
        "schema": SCHEMA,
        "epsilon": float(epsilon),
        "delta": float(delta),
        "neighboring_relation": neighboring_relation.name,
        "privacy_unit": privacy_unit,
        "entries": [],
    }
    with _locked(ledger):
        if ledger.path.exists():
            raise ValueError(f"Expected a new file, found the existing {ledger.path}.")
        if not _beside(ledger, ".secret").exists():
            _replace(_beside(ledger, ".secret"), os.urandom(32).hex().encode(), ledger)
        _write(ledger, body)
    return ledger


def open(path: str | os.PathLike[str]) -> Ledger:
    """An existing ledger.

    Raises:
      ValueError: if there is none, it was changed, or others may read its secret.
    """
    ledger = Ledger(path=pathlib.Path(path).resolve())
    spent(ledger)
    return ledger


def spent(ledger: Ledger) -> Spent:
    """What all entries compose to."""
    with _locked(ledger):
        return _compose(_read(ledger))


def debit(
    ledger: Ledger,
    key: jax.Array,
    *,
    mu: float,
    hardened: bool = False,
    neighboring_relation: NeighboringRelation,
    privacy_unit: str,
) -> Spent:
    """Enters a release; call it before anything private is read.

    Args:
      ledger: of the dataset.
      key: the release's secret typed key; its HMAC is stored.
      mu: of all rounds of the release together; of a hardened one sqrt(2 rho).
      hardened: whether it is rho-zCDP only.
      neighboring_relation: must be the ledger's.
      privacy_unit: must be the ledger's.

    Returns:
      What is spent, with this release.

    Raises:
      BudgetExceeded: if the budget does not allow it.
      ValueError: if the key was used before, or relation or unit are not the ledger's.
    """
    if not 0 < mu < float("inf"):
        raise ValueError(f"Expected a finite mu > 0, found {mu}.")
    with _locked(ledger):
        body = _read(ledger)
        for field, found in (("neighboring_relation", neighboring_relation.name), ("privacy_unit", privacy_unit)):
            if found != body[field]:
                raise ValueError(f"The ledger's {field} is {body[field]!r}, found {found!r}.")
        tag = key_tag(ledger, key)
        if any(hmac.compare_digest(entry["key"], tag) for entry in body["entries"]):
            raise ValueError("This key was used for an earlier release; draw a new one with fresh_key().")
        body["entries"].append({"mu": float(mu), "hardened": bool(hardened), "key": tag})
        total = _compose(body)
        if total.delta > body["delta"] * (1 + _ROUNDING):
            raise BudgetExceeded(
                f"The budget is epsilon={body['epsilon']}, delta={body['delta']}; with this release of {mu=} after "
                f"{total.releases - 1} others, delta would be {total.delta:.3g}."
            )
        _write(ledger, body)
    return total


def _compose(body):
    entries, epsilon = body["entries"], body["epsilon"]
    if not entries:
        return Spent(0, 0.0, 0.0, 0.0)
    mu = privacy.compose(entry["mu"] for entry in entries)
    rho = privacy.zcdp_rho(mu)
    if any(entry["hardened"] for entry in entries):
        return Spent(len(entries), None, rho, privacy.delta_from_rho(rho, epsilon))
    return Spent(len(entries), mu, rho, privacy.delta_from_mu(mu, epsilon))


def _beside(ledger, suffix):
    return ledger.path.with_name(ledger.path.name + suffix)


@contextlib.contextmanager
def _locked(ledger):
    """Exclusive between processes and threads; the system frees it when its holder dies, however it dies."""
    import fcntl  # POSIX alone has it, and the rest of the package needs no POSIX

    try:
        descriptor = os.open(_beside(ledger, ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        raise ValueError(f"Expected a ledger in an existing folder, found {ledger.path}.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _secret(ledger):
    path = _beside(ledger, ".secret")
    try:
        mode = path.stat().st_mode & 0o777
    except FileNotFoundError:
        raise ValueError(f"The ledger's secret {path} is missing; without it the ledger cannot be checked.") from None
    if mode & 0o077:
        raise ValueError(f"Expected a secret that only its owner may read (mode 0600), found mode {mode:04o}: {path}.")
    secret = path.read_bytes()
    if len(secret) != 64:
        raise ValueError(f"Expected a secret of 64 hexadecimal digits, found {len(secret)} bytes: {path}.")
    return secret


def _mac(secret, purpose, message):
    return hmac.new(secret, purpose + b"\0" + message, hashlib.sha256).hexdigest()


def key_tag(ledger: Ledger, key: jax.Array) -> str:
    """The HMAC by which a ledger remembers a key; says nothing of the key to whoever lacks the ledger's secret."""
    data = np.asarray(jax.random.key_data(key)).tobytes()
    return _mac(_secret(ledger), b"key", f"{jax.random.key_impl(key)} ".encode() + data)


def _canonical(body):
    return json.dumps(body, sort_keys=True, allow_nan=False).encode()


def _read(ledger) -> dict[str, Any]:
    try:
        text = ledger.path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"Expected a ledger, found no file {ledger.path}; make one with ledger.create.") from None
    secret = _secret(ledger)
    try:
        document = json.loads(text)
        body = document["body"]
        authentic = hmac.compare_digest(document["mac"].encode(), _mac(secret, b"ledger", _canonical(body)).encode())
        authentic = authentic and set(document) == {"body", "mac"} and body["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        authentic = False
    if not authentic:
        raise ValueError(f"The ledger {ledger.path} was changed, shortened or damaged, and is refused.")
    return body


def _write(ledger, body):
    document = {"body": body, "mac": _mac(_secret(ledger), b"ledger", _canonical(body))}
    _replace(ledger.path, json.dumps(document, indent=1).encode(), ledger)


def _replace(path, data, ledger):
    """Writes a file as a whole, durably: after a crash at any point there is the old one or the new one."""
    temporary = _beside(ledger, ".tmp")
    temporary.unlink(missing_ok=True)  # left by a process that was killed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
