"""One look at the database for all who watch: wakes them when something changed."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from sqlalchemy import func, select

from coldmerge.core.errors import ColdmergeError, UnavailableError
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Contributor, Machine, Release, Round

log = structlog.get_logger(__name__)

EVERY = 0.1
AT_LEAST_EVERY = 30.0


class Pulse:
    """Polls a few counters that change with every round, release and revocation.

    A watcher takes a ticket, reads what it watches, and waits for the ticket: a change
    between the two is not missed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._beat = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Poll until cancelled. A look that fails is not the last one."""
        last: tuple[Any, ...] = ()
        while True:
            try:
                now = await asyncio.to_thread(self._counters)
            except ColdmergeError as error:
                log.warning("pulse.failed", code=error.code)
            except Exception:
                log.exception("pulse.failed")
            else:
                if now != last:
                    last = now
                    self._wake()
            await asyncio.sleep(EVERY)

    def _counters(self) -> tuple[Any, ...]:
        query = select(
            select(func.coalesce(func.sum(Round.version), 0)).scalar_subquery(),
            select(func.count()).select_from(Release).scalar_subquery(),
            select(func.count(Contributor.revoked_at)).scalar_subquery(),
            select(func.count(Machine.revoked_at)).scalar_subquery(),
        )
        with self._store.database.read() as session:
            return tuple(session.execute(query).one())

    def _wake(self) -> None:
        beat, self._beat = self._beat, asyncio.Event()
        beat.set()

    def stop(self) -> None:
        """Wake everybody for the last time."""
        self._stopping = True
        self._wake()

    def ticket(self) -> asyncio.Event:
        """Take this before reading what is watched."""
        return self._beat

    async def wait(self, ticket: asyncio.Event) -> None:
        """Return at the first change since the ticket, or after half a minute.

        Raises:
            UnavailableError: the coordinator is stopping.
        """
        try:
            await asyncio.wait_for(ticket.wait(), AT_LEAST_EVERY)
        except TimeoutError:
            return
        self.check_running()

    def check_running(self) -> None:
        """End a stream of a coordinator that stops.

        Raises:
            UnavailableError: the coordinator is stopping.
        """
        if self._stopping:
            raise UnavailableError(
                "service.stopping",
                "The coordinator is stopping.",
                hint="Nothing is lost; call again when it is back.",
            )
