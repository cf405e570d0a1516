"""The file of a ledger: read as a whole, checked, rewritten as a whole under a lock; it knows no rule of composition.

The file is JSON with an HMAC over all of it: a temporary file is synced, renamed over the old one, and the folder
synced. A process that is killed leaves the old file or the new one. A changed or shortened file is refused. Putting
back an old copy is not detected: keep the ledger where its backups are not restored. Locks are POSIX's, on a local file
system.

Beside `<path>` lie `<path>.secret` (mode 0600), the key of all HMACs, `<path>.lock` and, for a moment, `<path>.tmp`.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

SCHEMA = "qexp_jax/ledger/2"
_READABLE = ("qexp_jax/ledger/1", SCHEMA)  # entries of the first know no draws: they count, and cannot go on


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Exclusive between processes and threads; the system frees it when its holder dies, however it dies."""
    import fcntl  # POSIX alone has it, and the rest of the package needs no POSIX

    try:
        descriptor = os.open(_beside(path, ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        raise ValueError(f"Expected a ledger in an existing folder, found {path}.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_secret(path: pathlib.Path) -> None:
    """A new secret beside a ledger, where there is none; an older one may know keys that served before."""
    secret = _beside(path, ".secret")
    if not secret.exists():
        _replace(secret, os.urandom(32).hex().encode(), _beside(path, ".tmp"))


def secret_of(path: pathlib.Path) -> bytes:
    """The secret beside a ledger.

    Raises:
      ValueError: if it is missing, shortened, or others may read it.
    """
    beside = _beside(path, ".secret")
    try:
        mode = beside.stat().st_mode & 0o777
    except FileNotFoundError:
        raise ValueError(f"The ledger's secret {beside} is missing; without it the ledger cannot be checked.") from None
    if mode & 0o077:
        raise ValueError(
            f"Expected a secret that only its owner may read (mode 0600), found mode {mode:04o}: {beside}."
        )
    secret = beside.read_bytes()
    if len(secret) != 64:
        raise ValueError(f"Expected a secret of 64 hexadecimal digits, found {len(secret)} bytes: {beside}.")
    return secret


def mac(secret: bytes, purpose: bytes, message: bytes) -> str:
    """HMAC-SHA256 of a message; those of one purpose are never taken for those of another."""
    return hmac.new(secret, purpose + b"\0" + message, hashlib.sha256).hexdigest()


def canonical(body: dict[str, Any]) -> bytes:
    """The bytes under a file's HMAC: the same for equal contents, however the file was written."""
    return json.dumps(body, sort_keys=True, allow_nan=False).encode()


def read(path: pathlib.Path) -> dict[str, Any]:
    """What a ledger holds.

    Raises:
      ValueError: if there is none, or its HMAC is not that of its contents under its secret.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"Expected a ledger, found no file {path}; make one with ledger.create.") from None
    secret = secret_of(path)
    # Whatever somebody put into the file, of any types and depth, is refused in the same words.
    try:
        document = json.loads(text)
        body = document["body"]
        expected = mac(secret, b"ledger", canonical(body))
        is_authentic = hmac.compare_digest(document["mac"].encode(), expected.encode())
        is_authentic = is_authentic and set(document) == {"body", "mac"} and body["schema"] in _READABLE
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_authentic = False
    if not is_authentic:
        raise ValueError(f"The ledger {path} was changed, shortened or damaged, and is refused.")
    return body


def write(path: pathlib.Path, body: dict[str, Any]) -> None:
    """Replaces what a ledger holds, in the newest schema."""
    body = body | {"schema": SCHEMA}
    document = {"body": body, "mac": mac(secret_of(path), b"ledger", canonical(body))}
    _replace(path, json.dumps(document, indent=1).encode(), _beside(path, ".tmp"))


def _replace(path: pathlib.Path, data: bytes, temporary: pathlib.Path) -> None:
    """Writes a file as a whole, durably: after a crash at any point there is the old one or the new one."""
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
