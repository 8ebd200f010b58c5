"""Threads of one merge: whoever waits for work helps with it, so that work may be nested."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from coldmerge.core.memory import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """A context manager with `threads` threads, the caller's included.

    `spread` may be called from inside work that was spread: the calling thread does the
    inner work itself, and idle threads join it. Results do not depend on who did what.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = max(1, threads or processors())
        self._calls: SimpleQueue[_Spread | None] = SimpleQueue()
        self._helpers = [
            threading.Thread(target=self._help, daemon=True, name=f"merge-{number}")
            for number in range(1, self.threads)
        ]

    def __enter__(self) -> Self:
        keep_freed_memory()
        for helper in self._helpers:
            helper.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _helper in self._helpers:
            self._calls.put(None)
        for helper in self._helpers:
            helper.join()

    def spread(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[function(item) for item in items]`, on all threads.

        The first error ends the work and is raised, once no thread is at it any more.
        """
        work = self._begin(function, items, min(len(items), self.threads) - 1)
        work.run()
        return work.results()

    def spread_ahead(
        self, function: Callable[[T], R], groups: Iterable[Sequence[T]]
    ) -> Generator[list[R]]:
        """`spread` of one group after the other, the next one begun when the last is given out.

        So the other threads work while the caller uses what it got. Two groups are in memory.
        """
        under_way: _Spread | None = None
        try:
            for group in groups:
                work, under_way = under_way, self._begin(function, group, self.threads - 1)
                if work is not None:
                    yield work.results()
                under_way.run()
            if under_way is not None:
                yield under_way.results()
        finally:
            if under_way is not None:
                under_way.end()

    def _begin(self, function: Callable[[T], R], items: Sequence[T], helpers: int) -> _Spread:
        work = _Spread(function, items)
        for _ in range(helpers):
            self._calls.put(work)
        return work

    def _help(self) -> None:
        while (work := self._calls.get()) is not None:
            work.run()


class _Spread:
    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._function, self._items = function, items
        self._results: list[Any] = [None] * len(items)
        self._next = self._running = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self) -> None:
        """Take items until there are none left."""
        while (at := self._take()) is not None:
            error: BaseException | None = None
            try:
                self._results[at] = self._function(self._items[at])
            except BaseException as caught:  # noqa: BLE001 - raised again by `results`
                error = caught
            with self._changed:
                self._running -= 1
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> int | None:
        with self._changed:
            if self._error is not None or self._next == len(self._items):
                return None
            self._next += 1
            self._running += 1
            return self._next - 1

    def end(self) -> None:
        """Begin no more items, and wait for those under way."""
        with self._changed:
            self._next = len(self._items)
            self._changed.wait_for(lambda: self._running == 0)

    def results(self) -> list[Any]:
        try:
            self._wait()
        except BaseException as interrupt:
            with self._changed:
                self._error = interrupt
            self._wait()
            raise
        if self._error is not None:
            raise self._error
        return self._results

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
