"""The webhook's queue: what admins still have to hear."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.ids import new_id
from coldmerge_coordinator.store.models import Notice, Round

FIRST_DELAY = timedelta(seconds=5)
LONGEST_DELAY = timedelta(hours=1)
MAX_ATTEMPTS = 50


def insert(session: Session, url: str | None, body: dict[str, Any], now: datetime) -> Notice | None:
    """Queue `body` for `url`; nothing when no webhook is configured."""
    if url is None:
        return None
    notice = Notice(
        id=new_id("notice"),
        url=url,
        body={**body, "at": now.isoformat()},
        created_at=now,
        attempts=0,
        next_attempt_at=now,
        delivered_at=None,
    )
    session.add(notice)
    session.flush()
    return notice


def about_round(row: Round, kind: str, text: str, federation: str) -> dict[str, Any]:
    """The body of a notice about a round."""
    return {
        "kind": kind,
        "text": text,
        "federation": federation,
        "model": row.model,
        "round": row.id,
        "state": row.state,
        "release": row.release_number,
    }


def due(session: Session, now: datetime, limit: int = 20) -> list[Notice]:
    """Notices to try now, oldest first. After `MAX_ATTEMPTS` they are left alone."""
    return list(
        session.scalars(
            select(Notice)
            .where(
                Notice.delivered_at.is_(None),
                Notice.next_attempt_at <= now,
                Notice.attempts < MAX_ATTEMPTS,
            )
            .order_by(Notice.created_at, Notice.id)
            .limit(limit)
        )
    )


def delivered(session: Session, notice_id: str, now: datetime) -> None:
    """The receiver has answered with success."""
    notice = session.get_one(Notice, notice_id)
    notice.attempts += 1
    notice.delivered_at = now


def failed(session: Session, notice_id: str, now: datetime) -> None:
    """Try again later: after 5 s, 10 s, 20 s … and then every hour."""
    notice = session.get_one(Notice, notice_id)
    notice.next_attempt_at = now + min(FIRST_DELAY * 2 ** min(notice.attempts, 20), LONGEST_DELAY)
    notice.attempts += 1
