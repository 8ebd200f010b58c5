"""The webhook's queue."""

from __future__ import annotations

from datetime import datetime, timedelta

from coldmerge_coordinator.store import Store, notices
from coldmerge_coordinator.store.models import Notice

URL = "https://example.org/hook"


def add(store: Store, now: datetime) -> str:
    with store.database.write() as session:
        notice = notices.insert(session, URL, {"kind": "round.stuck"}, now)
        assert notice is not None
        return notice.id


def due(store: Store, now: datetime) -> list[str]:
    with store.database.read() as session:
        return [notice.id for notice in notices.due(session, now)]


def test_without_a_webhook_nothing_is_queued(store: Store, now: datetime) -> None:
    with store.database.write() as session:
        assert notices.insert(session, None, {}, now) is None
    assert due(store, now) == []


def test_a_delivered_notice_is_not_due(store: Store, now: datetime) -> None:
    first, second = add(store, now), add(store, now + timedelta(seconds=1))
    assert due(store, now) == [first]
    assert due(store, now + timedelta(seconds=1)) == [first, second]
    with store.database.write() as session:
        notices.delivered(session, first, now)
    assert due(store, now + timedelta(days=1)) == [second]


def test_failures_wait_longer_and_end(store: Store, now: datetime) -> None:
    notice_id, waits = add(store, now), []
    for _ in range(notices.MAX_ATTEMPTS):
        assert due(store, now) == [notice_id]
        with store.database.write() as session:
            notices.failed(session, notice_id, now)
            next_at = session.get_one(Notice, notice_id).next_attempt_at
        waits.append(next_at - now)
        assert due(store, next_at - timedelta(seconds=1)) == []
        now = next_at
    assert waits[:4] == [timedelta(seconds=seconds) for seconds in (5, 10, 20, 40)]
    assert waits[-1] == notices.LONGEST_DELAY
    assert due(store, now + timedelta(days=365)) == []
