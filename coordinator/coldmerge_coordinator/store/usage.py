"""What each contributor announced today: the bytes of its uploads. Days are UTC."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge.core.errors import ResourceError
from coldmerge_coordinator.store.models import Usage


def of_day(session: Session, contributor: str, now: datetime) -> Usage:
    """The contributor's row of the day, locked. Needs a write transaction."""
    day = now.date().isoformat()
    query = select(Usage).where(Usage.contributor == contributor, Usage.day == day)
    row = session.scalars(query.with_for_update()).one_or_none()
    if row is not None:
        return row
    try:
        with session.begin_nested():
            session.add(Usage(contributor=contributor, day=day, received_bytes=0))
    except IntegrityError:  # another call made it, this instant
        session.expire_all()
    return session.scalars(query.with_for_update()).one()


def charge(session: Session, contributor: str, nbytes: int, most: int, now: datetime) -> None:
    """Count an upload of `nbytes` against the day's quota of `most`, however it ends.

    Raises:
        ResourceError: it does not fit.
    """
    row = of_day(session, contributor, now)
    if row.received_bytes + nbytes > most:
        raise ResourceError(
            "upload.quota",
            f"{contributor} has used up its bytes of today.",
            expected=f"at most {most} bytes a day",
            got=f"{row.received_bytes} bytes and {nbytes} more",
            hint="The quota starts again at 00:00 UTC; the admin may raise limits.bytes_per_day.",
            contributor=contributor,
        )
    row.received_bytes += nbytes
