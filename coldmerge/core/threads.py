"""How many threads linear algebra may use: one, so that results do not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Keeper(threading.Thread):
    """Limits BLAS to one thread from `begin` to `end`.

    Most builds of OpenBLAS have one count for the process, and threadpoolctl lets only the
    thread that changed it change it back: a merge's workers come and go, this one stays.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="blas-limit")
        self._limited, self._over = threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            from threadpoolctl import threadpool_limits

            with threadpool_limits(1, "blas"):
                self._limited.set()
                self._over.wait()
        finally:
            self._limited.set()

    def begin(self) -> None:
        self.start()
        self._limited.wait()

    def end(self) -> None:
        self._over.set()
        self.join()


class _Single:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._keeper = _Keeper()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from threadpoolctl import threadpool_limits

        with self._lock:
            if self._inside == 0:
                self._keeper = _Keeper()
                self._keeper.begin()
            self._inside += 1
        try:
            with threadpool_limits(1, "blas"):  # the other builds count for each thread
                yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._keeper.end()


one_blas_thread = _Single()
"""A context, for any number of threads at once: every product in it runs on its own thread.

Two threads that spin for one another made an SVD of 0.2 s take 13 s; and the last bits of a
product may depend on how many there are.
"""
