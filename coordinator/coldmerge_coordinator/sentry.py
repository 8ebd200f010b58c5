"""Open calls, looked at again twice a second: whoever is shut out is hung up on.

One look at the database serves all calls of a process, so that hundreds of idle streams cost
no more than one; and a call is ended from outside, wherever it waits: for the next message,
for a change, or for a reader that has stopped reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from coldmerge.core.clock import Clock
from coldmerge.core.errors import ColdmergeError
from coldmerge_coordinator.auth import Caller, check_machines, check_role
from coldmerge_coordinator.store import Store

log = structlog.get_logger(__name__)

EVERY = 0.5


@dataclass(eq=False)
class _Open:
    """An open call: who, which method, the task to end, and why it was ended."""

    who: Caller
    method: str
    task: asyncio.Task[object]
    error: ColdmergeError | None = None


class Sentry:
    """Knows the open calls of one process. `run` it beside the servers."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._open: set[_Open] = set()

    async def run(self) -> None:
        """Look until cancelled. A look that fails shuts nobody out, and is not the last one."""
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self._look()
            except ColdmergeError as error:
                log.warning("sentry.blind", code=error.code)
            except Exception:
                log.exception("sentry.blind")

    async def _look(self) -> None:
        calls = list(self._open)
        peers = {call.who.peer for call in calls if call.who.peer is not None}
        if not peers:
            return
        found = await asyncio.to_thread(check_machines, self._store, peers, self._clock.now())
        for call in calls:
            if call.who.peer is not None and call in self._open:
                self._judge(call, found[call.who.peer])

    def _judge(self, call: _Open, found: Caller | ColdmergeError) -> None:
        try:
            if isinstance(found, ColdmergeError):
                raise found
            check_role(found, call.method)
        except ColdmergeError as error:
            if call.error is None:
                call.error = error
                call.task.cancel()

    @contextmanager
    def watching(self, who: Caller, method: str) -> Iterator[None]:
        """While entered, the current task is ended when the caller may no longer call `method`.

        Raises:
            ColdmergeError: why it was ended.
        """
        task = asyncio.current_task()
        if task is None:  # pragma: no cover - gRPC runs every handler in a task
            raise RuntimeError("calls are handled in tasks")
        call = _Open(who, method, task)
        self._open.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.error is None or task.uncancel() > 0:
                raise
            raise call.error from None
        finally:
            self._open.discard(call)
