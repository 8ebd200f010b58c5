"""Leases: who may work on something now, with a fence that only grows.

A holder that was paused past its term must not write over its successor's work. So the
transaction that writes calls `check`, which fails when the fence has moved on.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError
from coldmerge_coordinator.store.models import Lease


@dataclass(frozen=True)
class Held:
    """A lease that `acquire` gave."""

    name: str
    holder: str
    fence: int


def acquire(
    session: Session, name: str, holder: str, now: datetime, term: timedelta
) -> Held | None:
    """Take the lease `name`, or None while another holds it. Needs a write transaction."""
    row = _row(session, name)
    if row is None:
        row = Lease(name=name, holder=holder, fence=1, expires_at=now + term)
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError:  # another took the very first one, this instant
            return None
    elif row.holder != holder and row.expires_at > now:
        return None
    else:
        row.fence += 1
        row.holder, row.expires_at = holder, now + term
    session.flush()
    return Held(name, holder, row.fence)


def renew(session: Session, held: Held, now: datetime, term: timedelta) -> None:
    """Hold on for `term` from now.

    Raises:
        ConflictError: another has taken it.
    """
    check(session, held).expires_at = now + term
    session.flush()


def check(session: Session, held: Held) -> Lease:
    """Make sure, inside a write transaction, that nobody has taken the lease since.

    Raises:
        ConflictError: another has taken it: throw the work away.
    """
    row = _row(session, held.name)
    if row is None or (row.holder, row.fence) != (held.holder, held.fence):
        raise ConflictError(
            "lease.lost",
            f"The lease on {held.name} has passed to another process.",
            expected=f"{held.holder}, fence {held.fence}",
            got="nobody" if row is None else f"{row.holder}, fence {row.fence}",
            hint="Nothing to do: the other process does the work.",
        )
    return row


def release(session: Session, held: Held, now: datetime) -> None:
    """Let go early, if it is still ours. The fence stays, so that it only grows."""
    row = _row(session, held.name)
    if row is not None and (row.holder, row.fence) == (held.holder, held.fence):
        row.expires_at = now
        session.flush()


def _row(session: Session, name: str) -> Lease | None:
    return session.scalars(select(Lease).where(Lease.name == name).with_for_update()).one_or_none()
