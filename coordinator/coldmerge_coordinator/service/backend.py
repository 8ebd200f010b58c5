"""What every handler needs: the store, the clock, and threads for what blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from coldmerge.core.clock import Clock
from coldmerge_coordinator.auth import Caller, check_machine
from coldmerge_coordinator.service.pulse import Pulse
from coldmerge_coordinator.store import Store

BULK_THREADS = 4

T = TypeVar("T")


class Backend:
    """Shared by the handlers of one coordinator.

    Short database work runs on asyncio's threads; hashing and disk work on a pool of its
    own, so that uploads cannot make a small call wait for a thread.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.pulse = Pulse(store)
        self._pool = ThreadPoolExecutor(BULK_THREADS, thread_name_prefix="coldmerge-bulk")

    async def bulk(self, work: Callable[[], T]) -> T:
        """Run disk or hashing work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def recheck(self, who: Caller) -> None:
        """Look again, within a long call, whether the caller still may.

        Raises:
            ColdmergeError: revoked or expired meanwhile.
        """
        if who.peer is not None:
            await asyncio.to_thread(check_machine, self.store, who.peer, self.clock.now())

    def close(self) -> None:
        """Wait for the threads."""
        self._pool.shutdown(wait=True)
