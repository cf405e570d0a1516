"""A budget ledger: one file that composes all releases over one dataset and refuses the one too many.

    create      a new ledger with a fixed budget, neighbouring relation and privacy unit
    open        an existing one
    debit       enters a release *before* its noise is drawn; raises where it is one too many, or its key was used
    enter_draw  enters the draw of a round before anything is made of it; raises where the round had another one
    spent       what has been spent

Composition. Ideal Gaussian releases compose exactly, `mu^2 = sum mu_t^2`. As soon as one release is hardened
(rho-zCDP), all are taken as zCDP, `rho = sum rho_t` with `rho_t = mu_t^2 / 2`, which is sound for both.

**One debit, one release.** A release that goes on from a checkpoint could be drawn several times: by copies of the
checkpoint, by two processes at once, after its steps were deleted. So each draw is entered before anything is made of
it, saved or returned, and a round has one draw. Noise that is a function of the key and of what it protects gives the
same draw again, bit for bit, as long as data, program and machine are the same; with any other, the round is refused.
Noise that is fresh (`hardened`) never does: what is killed between entering a draw and saving it has lost its release,
for nobody can tell who saw it. What is entered is an HMAC under the secret of a noisy sum, which is as public as the
release.

The file is rewritten as a whole under a lock (`ledger_file`): a process that is killed leaves the old one or the new
one, and what is entered is spent, whether or not its release was made. A changed or shortened file is refused. Putting
back an old copy is not detected: keep it where no backup is restored, on a local file system: locks are POSIX's.

Keys are remembered by an HMAC under a secret file beside it (mode 0600): a plain hash of 64 bits is as good as the key.
The ledger reads no private value, and is itself public but for that secret.
"""

import dataclasses
import hmac
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments
from qexp_jax.data.relation import NeighboringRelation, checked_relation
from qexp_jax.privacy import accounting, ledger_file
from qexp_jax.privacy.ledger_file import SCHEMA

_ROUNDING = 1e-9  # relative, of delta: the parts of a budget add up to it but for rounding


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
      path: a file that does not exist; `~` is the home folder.
      epsilon: the budget of all releases together.
      delta: the same.
      neighboring_relation: of every release.
      privacy_unit: of every release, as in the certificate.

    Raises:
      ValueError: if the file exists or the budget is impossible.
    """
    epsilon, delta = accounting.check_budget(epsilon, delta)
    ledger = _at(path)
    body = {
        "schema": SCHEMA,
        "epsilon": epsilon,
        "delta": delta,
        "neighboring_relation": checked_relation(neighboring_relation).name,
        "privacy_unit": _text("privacy_unit", privacy_unit),
        "entries": [],
    }
    with ledger_file.locked(ledger.path):
        if ledger.path.exists():
            raise ValueError(f"Expected a new file, found the existing {ledger.path}.")
        ledger_file.make_secret(ledger.path)
        ledger_file.write(ledger.path, body)
    return ledger


def open(path: str | os.PathLike[str]) -> Ledger:
    """An existing ledger.

    Raises:
      ValueError: if there is none, it was changed, or others may read its secret.
    """
    ledger = _at(path)
    spent(ledger)  # reads the file, which checks it
    return ledger


def opened(ledger: Ledger | str | os.PathLike[str] | None) -> Ledger | None:
    """A ledger as it was given to a release: itself, or by its path, or none."""
    if isinstance(ledger, str | os.PathLike):
        return open(ledger)
    if ledger is not None:
        check(ledger)
    return ledger


def check(ledger: Any) -> None:
    """Raises unless `ledger` is a `Ledger`, with a path in it."""
    if not isinstance(ledger, Ledger) or not isinstance(ledger.path, pathlib.Path):
        raise ValueError(f"Expected a ledger of ledger.open or its path, found {arguments.described(ledger)}.")


def _at(path: Any) -> Ledger:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"Expected the path of a ledger, found {arguments.described(path)}.")
    try:
        return Ledger(path=pathlib.Path(path).expanduser().resolve())
    except (TypeError, RuntimeError):  # bytes; the home of a user that does not exist
        raise ValueError(f"Expected the path of a ledger, found {path!r}.") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"Expected a text as {name}, found {arguments.described(value)}.")
    return value


def spent(ledger: Ledger) -> Spent:
    """What all entries compose to."""
    with ledger_file.locked(ledger.path):
        return _compose(ledger_file.read(ledger.path))


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
    mu = arguments.positive("mu", mu)
    relation = checked_relation(neighboring_relation).name
    terms = {"neighboring_relation": relation, "privacy_unit": privacy_unit}
    # What is read and what is written are one step: two debits at once might both fit, and not together.
    with ledger_file.locked(ledger.path):
        body = ledger_file.read(ledger.path)
        for field, found in terms.items():
            if found != body[field]:
                raise ValueError(f"The ledger's {field} is {body[field]!r}, found {found!r}.")
        tag = key_tag(ledger, key)
        if _entry(body, tag) is not None:
            raise ValueError("This key was used for an earlier release; draw a new one with fresh_key().")
        body["entries"].append({"mu": mu, "hardened": bool(hardened), "key": tag, "draws": {}})
        total = _compose(body)
        if total.delta > body["delta"] * (1 + _ROUNDING):
            raise BudgetExceeded(
                f"The budget is epsilon={body['epsilon']}, delta={body['delta']}; with this release (mu {mu:.4g}) "
                f"beside those entered before ({total.releases - 1}), delta would be {total.delta:.3g}."
            )
        ledger_file.write(ledger.path, body)
    return total


def holds(ledger: Ledger, key: jax.Array, *, mu: float, hardened: bool) -> bool:
    """Whether a release with this key and these terms was entered, such that it may go on; see `debit`.

    Args:
      ledger: of the dataset.
      key: the release's.
      mu: of all its rounds together.
      hardened: whether it is rho-zCDP only.
    """
    with ledger_file.locked(ledger.path):
        entry = _entry(ledger_file.read(ledger.path), key_tag(ledger, key))
    # An entry of the first schema has no draws, so that nobody can tell which of its rounds were drawn.
    if entry is None or "draws" not in entry:
        return False
    return entry["mu"] == float(mu) and entry["hardened"] == bool(hardened)


def enter_draw(ledger: Ledger, key: jax.Array, number: int, noisy_sum: Any) -> None:
    """Enters the draw of a round; call it before anything is made of the draw, where a release may go on later.

    Args:
      ledger: where the release was entered.
      key: the release's.
      number: of the round, from 0; -1 is the tilt's.
      noisy_sum: the draw, an array: all that the release will know of the data in this round.

    Formal guarantee: of one debit each round has one draw. The same bits may be entered again, unless the release is
    hardened, whose noise is fresh.

    Raises:
      ValueError: if the release was not entered, or the round was drawn before; says nothing of either draw.
    """
    number = arguments.count("number", number, least=-1)
    tag = key_tag(ledger, key)
    with ledger_file.locked(ledger.path):
        body = ledger_file.read(ledger.path)
        entry = _entry(body, tag)
        if entry is None or "draws" not in entry:
            raise ValueError("This release was not entered in the ledger, or by a version that knew no draws.")
        draws = entry["draws"]
        draw = _draw_tag(ledger, tag, number, np.asarray(noisy_sum))
        if str(number) not in draws:
            draws[str(number)] = draw
            ledger_file.write(ledger.path, body)
        # Fresh noise may not even try: how often it misses an earlier draw says how likely that was.
        elif entry["hardened"] or not hmac.compare_digest(draws[str(number)], draw):
            raise ValueError(
                f"Round {number} of this release was drawn before, and this is another draw of it. Start again with a "
                "fresh_key() and a new checkpoint folder: that is a new release, and is entered anew."
            )


def _draw_tag(ledger: Ledger, tag: str, number: int, array: np.ndarray) -> str:
    """The HMAC of a draw, which tells it from any other of its round; bits, not values: -0 is not 0."""
    message = f"{tag} {number} {array.dtype} {array.shape} ".encode() + array.tobytes()
    return ledger_file.mac(ledger_file.secret_of(ledger.path), b"draw", message)


def _entry(body: dict[str, Any], tag: str) -> dict[str, Any] | None:
    """The entry of a release, None where there is none."""
    # By compare_digest, so that the time it takes tells nothing of the tags.
    found = [entry for entry in body["entries"] if hmac.compare_digest(entry["key"], tag)]
    return found[0] if found else None


def _compose(body: dict[str, Any]) -> Spent:
    """What the entries of a ledger's file compose to."""
    entries = body["entries"]
    epsilon = body["epsilon"]
    if not entries:
        return Spent(releases=0, mu=0.0, zcdp_rho=0.0, delta=0.0)
    mu = accounting.compose(entry["mu"] for entry in entries)
    rho = accounting.zcdp_rho(mu)
    # Every Gaussian release is zCDP as well, but no discrete one is mu-GDP: a single one decides for all.
    if any(entry["hardened"] for entry in entries):
        return Spent(len(entries), mu=None, zcdp_rho=rho, delta=accounting.delta_from_rho(rho, epsilon))
    return Spent(len(entries), mu=mu, zcdp_rho=rho, delta=accounting.delta_from_mu(mu, epsilon))


def key_tag(ledger: Ledger, key: jax.Array) -> str:
    """The HMAC by which a ledger remembers a key; says nothing of the key to whoever lacks the ledger's secret."""
    return ledger_file.mac(ledger_file.secret_of(ledger.path), b"key", _key_bytes(key))


def _key_bytes(key: Any) -> bytes:
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape != ():
        raise ValueError(f"Expected one typed key from jax.random.key, found {arguments.described(key)}.")
    # With the generator's name: the same words are another key under another generator.
    return f"{jax.random.key_impl(key)} ".encode() + np.asarray(jax.random.key_data(key)).tobytes()
