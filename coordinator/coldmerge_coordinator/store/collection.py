"""Naming blobs, and collecting those that nobody names, never at the same time.

Blobs are written first and named by a row later. Whoever names one takes the collection
lock, and looks whether what had no row is still stored; a collection deletes under the same
lock, and only what has no row. So either the row is first, and the blob stays, or the
deletion is, and the naming fails and is done again.

To look takes long in S3, and the lock is part of a write transaction. So `look` comes before
it, and holds while no collection has begun: one that will delete says so first (`announce`, in
a transaction of its own), by the fence of the lock's row, and deletes only while that fence is
its own. Whoever names compares the fence: unmoved, and nobody at work, it was unmoved and
nobody was at work all the time since `look`; otherwise he looks again, under the lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge.core.errors import UnavailableError
from coldmerge_coordinator.store.blobs import BlobStore, silent
from coldmerge_coordinator.store.database import Database
from coldmerge_coordinator.store.models import Blob, Lease

LOCK = "collection"
AT_ONCE = 500
_NAMED = "coldmerge_named"
_NOBODY, _AT_WORK = "", "collecting"


@dataclass(frozen=True)
class Seen:
    """Blobs that were stored when the collection's fence was `fence`; None: one was at work."""

    fence: int | None
    sha256s: frozenset[str]


def lock(session: Session) -> Lease:
    """Hold the collection lock until the transaction ends: its row as it is now."""
    query = select(Lease).where(Lease.name == LOCK).with_for_update()
    query = query.execution_options(populate_existing=True)
    found = session.scalars(query).one_or_none()
    if found is not None:
        return found
    begun = datetime(2000, 1, 1, tzinfo=UTC)
    row = Lease(name=LOCK, holder=_NOBODY, fence=0, expires_at=begun)
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:  # another made it, this instant
        return session.scalars(query).one()
    return row


def announce(database: Database) -> int:
    """Say that a collection is about to delete blobs: the fence it may do so under."""
    with database.write() as session:
        row = lock(session)
        row.fence, row.holder = row.fence + 1, _AT_WORK
        return row.fence


def may_delete(session: Session, fence: int) -> bool:
    """Whether no other collection was announced since ours; takes the lock.

    From the end of the transaction on, nobody is at work.
    """
    row = lock(session)
    if row.fence != fence:
        return False
    row.holder = _NOBODY
    return True


def look(
    database: Database,
    blobs: BlobStore,
    sha256s: Sequence[str],
    beat: Callable[[], None] = silent,
) -> Seen:
    """Look for blobs that a transaction is about to name, outside of it. `beat`: now and then."""
    with database.read() as session:
        fence = _quiet(session.get(Lease, LOCK))
        wanted = [
            sha256
            for start in range(0, len(sha256s), AT_ONCE)
            for sha256 in unnamed(session, sha256s[start : start + AT_ONCE])
        ]
    found: set[str] = set()
    for start in range(0, len(wanted) if fence is not None else 0, AT_ONCE):
        beat()
        found.update(blobs.stored(wanted[start : start + AT_ONCE]))
    return Seen(fence, frozenset(found))


def _quiet(row: Lease | None) -> int | None:
    if row is None:
        return 0
    return row.fence if row.holder == _NOBODY else None


def named(session: Session, sha256s: Sequence[str]) -> None:
    """Note those of the blobs that have no row: they get one in this transaction."""
    session.info.setdefault(_NAMED, set()).update(unnamed(session, sha256s))


def confirm(session: Session, blobs: BlobStore, seen: Seen) -> None:
    """Make sure that the blobs this transaction names for the first time are stored.

    What was `seen` is not asked for again, unless a collection has begun since.

    Raises:
        UnavailableError: one was collected after it was written: write it again.
    """
    named = session.info.pop(_NAMED, set())
    if seen.fence is not None and seen.fence == _quiet(lock(session)):
        named -= seen.sha256s
    wanted = sorted(named)
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
