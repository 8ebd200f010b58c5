"""Naming blobs, and collecting those that nobody names, never at the same time.

Blobs are written first and named by a row later. Whoever names one takes the collection
lock, and looks whether what had no row is still stored; a collection deletes under the same
lock, and only what has no row. So either the row is first, and the blob stays, or the
deletion is, and the naming fails and is done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge.core.errors import UnavailableError
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.models import Blob, Lease

LOCK = "collection"
_NAMED = "coldmerge_named"


def lock(session: Session) -> None:
    """Hold the collection lock until the transaction ends."""
    query = select(Lease).where(Lease.name == LOCK).with_for_update()
    if session.scalars(query).one_or_none() is None:
        row = Lease(name=LOCK, holder="", fence=0, expires_at=datetime(2000, 1, 1, tzinfo=UTC))
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError:  # another made it, this instant
            session.scalars(query).one()


def named(session: Session, sha256s: Sequence[str]) -> None:
    """Note those of the blobs that have no row: they get one in this transaction."""
    session.info.setdefault(_NAMED, set()).update(unnamed(session, sha256s))


def confirm(session: Session, blobs: BlobStore) -> None:
    """Make sure that the blobs this transaction names for the first time are stored.

    Raises:
        UnavailableError: one was collected after it was written: write it again.
    """
    wanted = sorted(session.info.pop(_NAMED, set()))
    missing = sorted(set(wanted) - set(blobs.stored(wanted)))
    if missing:
        raise UnavailableError(
            "blob.collected",
            "A tensor was collected as garbage before it was named.",
            got=f"{len(missing)} of {len(wanted)} are missing, such as {missing[0]}",
            hint="Nothing to do: it is written again.",
        )


def unnamed(session: Session, sha256s: Sequence[str]) -> list[str]:
    """Those of the blobs that have no row. Under the lock."""
    known = set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_(sha256s))))
    return [sha256 for sha256 in sha256s if sha256 not in known]
