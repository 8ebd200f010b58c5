"""One command as a whole process: its wall time and its peak of memory (Linux only)."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY_SECONDS = 0.005
SHOWN = 4000


@dataclass(frozen=True)
class Measured:
    """Wall seconds from start to end; peaks in bytes, of all memory and of anonymous memory."""

    seconds: float
    rss: int
    anonymous: int


class _Watch:
    """Samples the memory of a process until it is told to end.

    `ru_maxrss` would do for all memory, but it starts from the memory of whoever forked.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.rss = self.anonymous = 0

    def _run(self) -> None:
        while not self._end.wait(EVERY_SECONDS):
            with suppress(OSError):
                for line in self._status.read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self.rss = max(self.rss, 1024 * int(line.split()[1]))
                    elif line.startswith("RssAnon:"):
                        self.anonymous = max(self.anonymous, 1024 * int(line.split()[1]))

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def _end_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def measure(
    command: Sequence[str | Path], *, limit: float, env: Mapping[str, str] | None = None
) -> Measured:
    """Run `command` in a process group of its own, to its end; no process of it is left.

    Raises:
        SystemExit: it failed, or took longer than `limit` seconds; with the end of its output.
    """
    environment = {**os.environ, **(env or {})}
    arguments = [str(part) for part in command]
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(
            arguments, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        clock = threading.Timer(limit, _end_group, [process.pid])
        clock.start()
        try:
            with _Watch(process.pid) as watch:
                process.returncode = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
                seconds = time.monotonic() - started
        finally:
            clock.cancel()
            _end_group(process.pid)
        if process.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace")[-SHOWN:]
            why = f"ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
            late = f" after its limit of {limit:.0f} s" if seconds >= limit else ""
            raise SystemExit(f"{' '.join(arguments)}\n{said}\nThe command {why}{late}.")
    return Measured(seconds, watch.rss, watch.anonymous)
