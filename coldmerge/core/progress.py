"""How the library tells a program how far it is; drawing it is the program's affair."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], None]
"""Told how much was done since the last call."""


class Progress(Protocol):
    """Called as work proceeds, from any thread, one call at a time."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """`done` of `total` (bytes, unless the step counts something else) are finished."""
        ...


def silent(step: str, done: int, total: int) -> None:
    """Tell nobody."""


class Counter:
    """Adds up the progress of several threads and reports the sum."""

    def __init__(self, step: str, total: int, progress: Progress) -> None:
        self._step = step
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        """Count `amount` more."""
        with self._lock:
            self._done += amount
            self._progress(self._step, self._done, self._total)
