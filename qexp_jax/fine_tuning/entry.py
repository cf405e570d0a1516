"""A release's entry in its ledger: paid before a private value is read, and once for a release that goes on."""

from typing import Any

import jax

from qexp_jax.data.source import InMemory, Source
from qexp_jax.fine_tuning import checkpoint as checkpoints
from qexp_jax.fine_tuning.checkpoint import Store
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.privacy.ledger import Ledger
from qexp_jax.private_pass import devices


def enter(
    ledger: Ledger | None,
    key: jax.Array,
    store: Store | None,
    units: Source,
    mesh: jax.sharding.Mesh | None,
    **terms: Any,
) -> Store | None:
    """Debits a new release, and binds its checkpoint to its data and its ledger; returns the store, so bound.

    A checkpoint of other data is refused before anything is entered. A new release is entered before its data is read,
    and digested after that.

    Args:
      ledger: of the dataset, if any.
      key: of the release.
      store: an open checkpoint, if any.
      units: in memory or a stream.
      mesh: devices, or None.
      **terms: of `ledger.debit`.
    """
    if store is None:
        devices.in_first(mesh, lambda: _debit(ledger, key, None, **terms))
        return None
    # A stream is digested as its first pass reads it.
    held = units.records if isinstance(units, InMemory) else None
    if held is not None:
        devices.in_step(mesh, lambda: checkpoints.check_units(store, held))
    devices.in_first(mesh, lambda: _debit(ledger, key, store, **terms))
    if held is not None:
        devices.in_step(mesh, lambda: checkpoints.bind_units(store, held))
    return store._replace(ledger=ledger)


def _debit(
    ledger: Ledger | None, key: jax.Array, store: Store | None, *, mu: float, hardened: bool, **terms: Any
) -> None:
    """Debits the release, unless checkpoint and ledger agree that it was debited before it was interrupted.

    Args:
      ledger: as given.
      key: of the release.
      store: an open checkpoint, if any.
      mu: of `ledger.debit`.
      hardened: of `ledger.debit`.
      **terms: of `ledger.debit`.
    """
    paid = None if store is None else checkpoints.paid_tag(store)
    if ledger is None and paid is not None:
        raise ValueError("The checkpoint's release was entered in a ledger, which has to be given for it to go on.")
    if ledger is None:
        return
    tag = ledgers.key_tag(ledger, key)
    if paid == tag and ledgers.holds(ledger, key, mu=mu, hardened=hardened):
        return
    ledgers.debit(ledger, key, mu=mu, hardened=hardened, **terms)
    if store is not None:
        checkpoints.mark_paid(store, tag)
