"""Private memory of processes while they run, from /proc (Linux only)."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

EVERY_SECONDS = 0.05


def private_bytes(pid: int) -> int:
    """Private_Clean + Private_Dirty of a process; 0 when it has ended."""
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += 1024 * int(line.split()[1])
    return total


def children(pid: int) -> list[int]:
    """Processes that any thread of `pid` has started and that still run."""
    found: list[int] = []
    with suppress(OSError):
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in listed.read_text().split()]
    return sorted(found)


def tree(pid: int) -> list[int]:
    """A process and all that it, or any of them, has started."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


class Sampler:
    """Keeps the largest private memory seen of each watched process, by a name for it.

    A context manager: a thread samples from enter to exit. A sample costs the kernel a walk over
    all pages: where seconds are measured beside gigabytes, take few.
    """

    def __init__(self, every_seconds: float = EVERY_SECONDS) -> None:
        self._every = every_seconds
        self._watched: dict[int, str] = {}
        self._trees: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def watch(self, name: str, pid: int) -> None:
        """Sample `pid` from now on; several processes may share a name."""
        with self._lock:
            self._watched[pid] = name

    def watch_tree(self, name: str, pid: int) -> None:
        """Sample the sum over `pid` and all that it starts, from now on."""
        with self._lock:
            self._trees[name] = pid

    def take(self) -> dict[str, int]:
        """Peaks since the last call, of processes that were alive."""
        with self._lock:
            peaks, self._peaks = self._peaks, {}
        return dict(sorted(peaks.items()))

    def _run(self) -> None:
        while not self._end.wait(self._every):
            with self._lock:
                for pid, name in self._watched.items():
                    self._note(name, private_bytes(pid))
                for name, pid in self._trees.items():
                    self._note(name, sum(map(private_bytes, tree(pid))))

    def _note(self, name: str, used: int) -> None:
        if used:
            self._peaks[name] = max(used, self._peaks.get(name, 0))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
