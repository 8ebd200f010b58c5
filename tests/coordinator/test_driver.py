"""What happens by itself: deadlines, schedules, and telling about it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sqlalchemy import select

from coldmerge.core.errors import ConfigError, NotFoundError
from coldmerge.rounds.policy import RoundTemplate
from coldmerge_coordinator.driver import TERM, Driver
from coldmerge_coordinator.importing import set_template
from coldmerge_coordinator.store import rounds
from coldmerge_coordinator.store.models import Model, Notice
from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.coordinator.conftest import Bench

WEIGHTS = {"w": np.ones(4, np.float32)}
DELTA = {"w": np.full(4, 0.5, np.float32)}
NOWHERE = "http://127.0.0.1:9/hook"


@pytest.fixture
def driver(bench: Bench) -> Iterator[Driver]:
    made = Driver(bench.store, bench.clock)
    yield made
    made.close()


def kinds(bench: Bench) -> list[str]:
    with bench.store.database.read() as session:
        found = session.scalars(select(Notice).order_by(Notice.created_at, Notice.id))
        return [notice.body["kind"] for notice in found]


def states(bench: Bench, model: str = "m") -> list[str]:
    """Oldest first."""
    with bench.store.database.read() as session:
        return [row.state for row in reversed(rounds.list_rounds(session, model))]


def test_a_round_seals_at_its_deadline(bench: Bench, driver: Driver) -> None:
    bench.add_model(WEIGHTS)
    round_id = bench.open_round(duration="1h", min_contributions=2)
    bench.contribute(round_id, "a", DELTA)
    bench.contribute(round_id, "b", DELTA)
    bench.clock.advance(timedelta(minutes=59))
    version = bench.round(round_id).version
    assert driver.step()
    assert (bench.round(round_id).state, bench.round(round_id).version) == ("OPEN", version)
    bench.clock.advance(timedelta(minutes=1))
    assert driver.step()
    row = bench.round(round_id)
    assert row.state == "SEALED"
    assert len(row.sealed_inputs or ()) == 2


def test_a_missed_quorum_abandons_and_tells(bench: Bench, driver: Driver) -> None:
    bench.add_model(WEIGHTS)
    round_id = bench.open_round(duration="1h", min_contributions=2, webhook=NOWHERE)
    bench.contribute(round_id, "a", DELTA)
    bench.clock.advance(timedelta(hours=1))
    driver.step()
    assert bench.round(round_id).state == "ABANDONED"
    assert kinds(bench) == ["round.abandoned"]


def test_all_evaluators_gone_holds_the_candidate_and_tells_once(
    bench: Bench, driver: Driver
) -> None:
    bench.add_model(WEIGHTS)
    round_id = bench.open_round(gate={"window": "1h"}, webhook=NOWHERE)
    bench.contribute(round_id, "a", DELTA)
    run_once(bench.store, bench.clock)
    assert bench.round(round_id).state == "CANDIDATE"
    for _ in range(3):
        bench.clock.advance(timedelta(hours=1))
        driver.step()
    row = bench.round(round_id)
    assert (row.state, row.held) == ("CANDIDATE", True)
    assert kinds(bench) == ["round.stuck"]
    assert bench.release().number == 0


def daily(zone: str = "UTC", **policy: object) -> RoundTemplate:
    """06:00 every day; the clock starts at noon UTC on 2 March 2026."""
    values = {"schedule": {"cron": "0 6 * * *", "timezone": zone}, "min_contributions": 1}
    return RoundTemplate.model_validate({**values, "gate": None, **policy})


def test_a_schedule_opens_the_next_round_from_the_template(bench: Bench, driver: Driver) -> None:
    bench.add_model(WEIGHTS, template=daily("Europe/Berlin", duration="2h"))
    driver.step()
    assert states(bench) == []
    bench.clock.advance(timedelta(hours=16, minutes=59))  # 04:59 UTC, 05:59 in Berlin
    driver.step()
    assert states(bench) == []
    bench.clock.advance(timedelta(minutes=1))
    driver.step()
    driver.step()
    assert states(bench) == ["OPEN"]
    with bench.store.database.read() as session:
        row = rounds.list_rounds(session, "m")[0]
        assert row.closes_at == datetime(2026, 3, 3, 7, 0, tzinfo=UTC)
        assert "schedule" not in row.policy
    bench.contribute(row.id, "a", DELTA)
    bench.clock.advance(timedelta(hours=2))
    driver.step()
    run_once(bench.store, bench.clock)
    bench.clock.advance(timedelta(hours=22))
    driver.step()
    assert states(bench) == ["PUBLISHED", "OPEN"]
    with bench.store.database.read() as session:
        assert rounds.newest_round(session, "m").base_number == 1  # type: ignore[union-attr]


def test_a_tick_during_a_round_skips_and_tells(bench: Bench, driver: Driver) -> None:
    bench.add_model(WEIGHTS, template=daily(webhook=NOWHERE))
    bench.open_round()
    bench.clock.advance(timedelta(hours=18))
    driver.step()
    driver.step()
    assert states(bench) == ["OPEN"]
    assert kinds(bench) == ["round.skipped"]
    bench.clock.advance(timedelta(hours=24))
    driver.step()
    assert kinds(bench) == ["round.skipped", "round.skipped"]


def test_ticks_missed_while_down_open_one_round(bench: Bench) -> None:
    bench.add_model(WEIGHTS, template=daily())
    bench.clock.advance(timedelta(days=10))
    driver = Driver(bench.store, bench.clock)
    for _ in range(3):
        driver.step()
    assert states(bench) == ["OPEN"]
    driver.close()


def test_a_new_schedule_counts_from_the_moment_it_is_set(bench: Bench, driver: Driver) -> None:
    bench.add_model(WEIGHTS)
    bench.clock.advance(timedelta(days=3))
    set_template(bench.store, "m", daily(), clock=bench.clock)
    driver.step()
    assert states(bench) == []
    bench.clock.advance(timedelta(hours=18))
    driver.step()
    assert states(bench) == ["OPEN"]
    with pytest.raises(NotFoundError):
        set_template(bench.store, "none", daily(), clock=bench.clock)
    broken = RoundTemplate.model_validate({"merge": {"method": "nothing"}})
    with pytest.raises(ConfigError):
        set_template(bench.store, "m", broken, clock=bench.clock)


def test_one_broken_model_does_not_stop_the_others(bench: Bench, driver: Driver) -> None:
    bench.add_model(WEIGHTS, "a-broken")
    bench.add_model(WEIGHTS, "b-fine", template=daily())
    with bench.store.database.write() as session:
        broken = session.get_one(Model, "a-broken")
        broken.template = {**broken.template, "schedule": {"cron": "99 9 9 9 9"}}
    bench.clock.advance(timedelta(days=1))
    assert driver.step()
    assert states(bench, "b-fine") == ["OPEN"]


def test_drivers_take_turns(bench: Bench) -> None:
    first = Driver(bench.store, bench.clock, holder="first")
    second = Driver(bench.store, bench.clock, holder="second")
    assert first.step()
    assert not second.step()
    bench.clock.advance(TERM)
    assert second.step(), "the first one's lease has run out"
    assert not first.step()
    second.close()
    assert first.step(), "the second one let go"
    first.close()
    restarted = Driver(bench.store, bench.clock, holder="first")
    assert restarted.step()
    restarted.close()
