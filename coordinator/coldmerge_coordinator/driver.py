"""What moves rounds when nobody calls: deadlines, schedules, notices.

The driver decides nothing itself: it applies `Tick` to the rounds that time may have
moved, opens rounds that are due by cron or follow on one that ended, and delivers what admins
have to hear.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import structlog
from sqlalchemy.orm import Session

from coldmerge.core.clock import Clock
from coldmerge.core.errors import ColdmergeError, ConflictError
from coldmerge.rounds.policy import RoundTemplate, parse_template
from coldmerge.rounds.state import Tick, transition
from coldmerge_coordinator import replica
from coldmerge_coordinator.notices import Notifier
from coldmerge_coordinator.retention import Collected, collect
from coldmerge_coordinator.schedule import next_tick
from coldmerge_coordinator.store import (
    Store,
    continuous,
    leases,
    notices,
    releases,
    rounds,
)
from coldmerge_coordinator.store.leases import Held
from coldmerge_coordinator.store.models import Model, Round

LEASE = "driver"
TERM = timedelta(seconds=15)
BEAT = timedelta(seconds=5)
COLLECT_EVERY = timedelta(hours=1)

log = structlog.get_logger(__name__)


class Driver:
    """Call `step` about once a second; several drivers on one database take turns.

    `holder` names the driver in its lease: a restarted one of the same name goes on at once.
    """

    def __init__(self, store: Store, clock: Clock, *, holder: str | None = None) -> None:
        self._store, self._clock = store, clock
        self._holder = holder or replica.holder(replica.DRIVER, store.folder)
        self._notifier = Notifier(store.database, clock)
        self._held: Held | None = None
        self._renewed_at = clock.now()
        self._collected_at = clock.now()
        self._collection: Iterator[Collected] | None = None

    def step(self) -> bool:
        """Do all that is due now: False while another driver has the lease.

        One round's or model's trouble is logged and does not stop the others.
        """
        if not self._leading():
            return False
        self._tick_rounds()
        self._follow_schedules()
        self._notifier.deliver_due()
        self._collect()
        return True

    def close(self) -> None:
        """Let another driver take over at once."""
        self._notifier.close()
        if self._held is not None:
            with self._store.database.write() as session:
                leases.release(session, self._held, self._clock.now())
            self._held = None

    def _leading(self) -> bool:
        now = self._clock.now()
        if self._held is not None and now - self._renewed_at < BEAT:
            return True
        with self._store.database.write() as session:
            self._held = self._renewed(session, now)
        self._renewed_at = now
        return self._held is not None

    def _renewed(self, session: Session, now: datetime) -> Held | None:
        if self._held is not None:
            try:
                leases.renew(session, self._held, now, TERM)
                return self._held
            except ConflictError:
                log.info("driver.superseded")
        return leases.acquire(session, LEASE, self._holder, now, TERM)

    def _collect(self) -> None:
        """A step of the collection that goes on; a new one begins every hour."""
        now = self._clock.now()
        if self._collection is None:
            if now - self._collected_at < COLLECT_EVERY:
                return
            self._collected_at, self._collection = now, collect(self._store, now)
        try:
            found = next(self._collection, None)
            if found is None:
                self._collection = None
            elif found.count:
                log.info("retention.collected", kind=found.kind, count=found.count)
        except ColdmergeError as error:
            self._collection = None
            log.warning("retention.failed", code=error.code, error=error.message)

    def _tick_rounds(self) -> None:
        now = self._clock.now()
        with self._store.database.read() as session:
            due = [row.id for row in rounds.active_rounds(session) if _moves(session, row, now)]
        for round_id in due:
            try:
                with self._store.database.write() as session:
                    row = rounds.get(session, round_id, lock=True)
                    rounds.apply(session, row, Tick(), now, self._store.signer)
                    log.info("round.ticked", round=round_id, state=row.state, reason=row.reason)
            except ColdmergeError as error:
                log.warning("driver.retry", round=round_id, code=error.code, error=error.message)

    def _follow_schedules(self) -> None:
        now = self._clock.now()
        with self._store.database.read() as session:
            models = releases.list_models(session)
        for model in models:
            try:
                if _is_due(model, now):
                    self._open_scheduled(model.name, now)
                if _template(model).continuous is not None:
                    self._follow_on(model.name, now)
            except ColdmergeError as error:
                log.warning("schedule.failed", model=model.name, error=error.message)

    def _open_scheduled(self, name: str, now: datetime) -> None:
        """Open the model's next round, or say that it is skipped. Missed ticks count as one."""
        with self._store.database.write() as session:
            model = releases.get_model(session, name, lock=True)
            if not _is_due(model, now):
                return
            model.last_scheduled_at = now
            template = _template(model)
            active = rounds.active_round(session, name)
            if active is None:
                row = rounds.open_round(session, name, template.policy(), now)
                log.info("schedule.opened", model=name, round=row.id)
                return
            text = f"the scheduled round of {name} was skipped: {active.id} goes on"
            body = notices.about_round(active, "round.skipped", text, self._store.federation)
            notices.insert(session, template.webhook, body, now)
            log.warning("schedule.skipped", model=name, round=active.id, state=active.state)

    def _follow_on(self, name: str, now: datetime) -> None:
        """Open the model's next continuous round, where the one before has ended."""
        with self._store.database.read() as session:
            if not _follows(session, name, now):
                return
        with self._store.database.write() as session:
            model = releases.get_model(session, name, lock=True)
            if _follows(session, name, now):
                row = rounds.open_round(session, name, _template(model).policy(), now)
                log.info("continuous.opened", model=name, round=row.id)


def _follows(session: Session, name: str, now: datetime) -> bool:
    model = releases.get_model(session, name)
    opens = continuous.next_opening(session, model, _template(model))
    return opens is not None and opens <= now


def _moves(session: Session, row: Round, now: datetime) -> bool:
    before = rounds.view(session, row)
    return transition(before, Tick(), now) != (before, ())


def _template(model: Model) -> RoundTemplate:
    return parse_template(model.template, f"of model {model.name}")


def _is_due(model: Model, now: datetime) -> bool:
    schedule = _template(model).schedule
    if schedule is None:
        return False
    after = model.last_scheduled_at or model.created_at
    return next_tick(schedule.cron, schedule.timezone, after) <= now
