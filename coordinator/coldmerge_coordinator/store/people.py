"""Organizations, read so that they stay as they are until the transaction ends.

Transactions of several processes that lock more than one row take them in this order:
lease, contributor, machine, invitation, round, contribution or upload, model, audit log.
Nobody then waits for somebody who waits for him.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge_coordinator.store.models import Contributor, Machine

# Populated again: what was read before the lock was ours may have changed since. A row that
# others refer to is locked so that they still may, FOR NO KEY UPDATE.
HOLD: dict[str, Any] = {"with_for_update": {"key_share": True}, "populate_existing": True}
SHARE: dict[str, Any] = {"with_for_update": {"read": True}, "populate_existing": True}


def hold(session: Session, contributor: str) -> Contributor | None:
    """The organization, changed by nobody else until this transaction ends."""
    return session.get(Contributor, contributor, **HOLD)


def hold_machine(session: Session, contributor: str, machine: str) -> Machine | None:
    """The machine, changed by nobody else until this transaction ends."""
    return session.get(Machine, (contributor, machine), **HOLD)


def share(session: Session, contributor: str, machine: str) -> tuple[Contributor, Machine]:
    """Both, revoked by nobody until this transaction ends; many may share them."""
    return (
        session.get_one(Contributor, contributor, **SHARE),
        session.get_one(Machine, (contributor, machine), **SHARE),
    )


def make(session: Session, contributor: str, role: str, now: datetime) -> Contributor:
    """A new organization, or the one that another call has made this instant, held."""
    row = Contributor(name=contributor, role=role, created_at=now)
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        return session.get_one(Contributor, contributor, **HOLD)
    return row
