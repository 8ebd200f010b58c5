"""A bar on standard error: how much is done, what is under way, how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

WIDTH = 24


class Bar:
    """Work in weights that are about proportional to seconds. Silent where nobody looks."""

    def __init__(self, show: bool | None = None) -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._started = time.monotonic()
        self._total = self._done = 0.0
        self._last = ""

    def expect(self, weight: float) -> None:
        """There is more to do."""
        self._total += weight

    def did(self, weight: float) -> None:
        """Some of it is done."""
        self._done += weight

    def show(self, titles: Sequence[str]) -> None:
        """Draw the line again; without a terminal, a new line where something has changed."""
        share = self._done / self._total if self._total else 0.0
        passed = time.monotonic() - self._started
        left = f"{passed * (1 - share) / share / 60:.0f} min left" if share > 0.02 else ""
        drawn = "#" * round(WIDTH * share)
        said = f"[{drawn:<{WIDTH}}] {share:4.0%} {left:>12}  {'; '.join(titles)}"
        if self._show:
            print(f"\r\x1b[2K{said[:160]}", end="", flush=True, file=sys.stderr)
        elif "; ".join(titles) != self._last:
            print(said, flush=True, file=sys.stderr)
        self._last = "; ".join(titles)

    def end(self) -> None:
        """Leave the line."""
        if self._show:
            print(file=sys.stderr)
