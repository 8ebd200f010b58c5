"""Cron expressions in a time zone, across the two nights that are not 24 hours long."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from coldmerge.core.errors import ConfigError
from coldmerge_coordinator.schedule import next_tick


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        ("0 6 * * MON", "UTC", "2026-03-02T06:00:00", "2026-03-09T06:00:00"),
        ("0 6 * * MON", "UTC", "2026-03-02T05:59:59.5", "2026-03-02T06:00:00"),
        ("0 6 * * *", "Europe/Berlin", "2026-01-10T00:00:00", "2026-01-10T05:00:00"),
        ("0 6 * * *", "Europe/Berlin", "2026-07-10T00:00:00", "2026-07-10T04:00:00"),
        # 02:30 does not exist on 29 March 2026 in Berlin: right after the gap, at 03:00.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00", "2026-03-29T01:00:00"),
        # 02:30 exists twice on 25 October 2026: only the first counts.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00", "2026-10-25T00:30:00"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30:00", "2026-10-26T01:30:00"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:15:00", "2026-10-26T01:30:00"),
    ],
)
def test_next_tick(cron: str, zone: str, after: str, expected: str) -> None:
    assert next_tick(cron, zone, utc(after)) == utc(expected)


@pytest.mark.parametrize("cron", ["* * * * *", "*/7 1-3 * * *", "30 2 * * *", "15 2 25 10 *"])
@pytest.mark.parametrize("day", ["2026-03-28", "2026-10-24"])
def test_ticks_always_move_forward_across_clock_changes(cron: str, day: str) -> None:
    now = utc(f"{day}T20:00:00")
    for _ in range(200):
        following = next_tick(cron, "Europe/Berlin", now)
        assert following > now
        now = following


def test_every_minute_stays_every_minute_in_the_repeated_hour() -> None:
    start = utc("2026-10-24T23:30:00")
    now = start
    for _ in range(180):
        now = next_tick("* * * * *", "Europe/Berlin", now)
    assert now == start + timedelta(minutes=180)


@pytest.mark.parametrize(
    ("cron", "zone", "code"),
    [
        ("0 6 * *", "UTC", "schedule.bad_cron"),
        ("61 6 * * *", "UTC", "schedule.bad_cron"),
        ("", "UTC", "schedule.bad_cron"),
        ("0 6 * * *", "Mars/Olympus", "schedule.unknown_timezone"),
        ("0 6 * * *", "../etc/passwd", "schedule.unknown_timezone"),
        ("0 6 * * *", "", "schedule.unknown_timezone"),
    ],
)
def test_mistakes_are_named(cron: str, zone: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        next_tick(cron, zone, utc("2026-01-01T00:00:00"))
    assert caught.value.code == code
