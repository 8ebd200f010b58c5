"""Kills a coordinator as it enters its n-th durable step, whichever thread or process it is in.

strace holds every such call for a moment before it is carried out and says so through a pipe;
the trap counts across all threads (strace's own `when=` counts each thread for itself) and
kills the group while the call is held: it never happens.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STEPS = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir"
HELD = 10_000
"""Microseconds."""

_ENTERED = re.compile(
    rb'\b(?P<call>fsync|fdatasync|rename\w*|link\w*|unlink\w*|rmdir)\((?:\d+<|AT_FDCWD<[^>]*>, )?"?'
    rb'(?P<path>/[^">]+)[">]'
)
_NAMES = re.compile(r"[0-9a-f]{32,}|\d+-[0-9a-f]{16}|run\.json\.\d+")


class Trap:
    """Reads what strace says; `command` goes in front of the program."""

    def __init__(self, folder: Path, pipe: Path) -> None:
        os.mkfifo(pipe)
        self.command = (
            *("strace", "-f", "-y", "-s", "400", "--seccomp-bpf", "-o", str(pipe)),
            *("-e", f"trace={STEPS}", "-e", f"inject={STEPS}:delay_enter={HELD}"),
        )
        self._folder = os.fsencode(folder)
        self._fd = os.open(pipe, os.O_RDWR)
        self._group: Callable[[], int | None] = lambda: None
        self._at: int | None = None
        self._lock = threading.Lock()
        self.hit = threading.Event()
        self.entered: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def arm(self, at: int | None, group: Callable[[], int | None]) -> None:
        """Count from here on; kill the group at step `at` (the first is 1), or only count."""
        with self._lock:
            self._at, self._group, self.entered = at, group, []
            self.hit.clear()

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._fd, 65536):
            rest, used = rest + chunk, 0
            for found in _ENTERED.finditer(rest):
                used = found.end()
                if found["path"].startswith(self._folder):
                    self._enter(f"{found['call'].decode()} {self._place(found['path'])}")
            rest = rest[used:][-4096:]

    def _place(self, path: bytes) -> str:
        """The path below the folder, without the parts that differ each time."""
        found = os.fsdecode(path.removeprefix(self._folder)) or "/"
        return re.sub(r"/blobs/[0-9a-f]{2}\b", "/blobs/??", _NAMES.sub("…", found))

    def _enter(self, step: str) -> None:
        with self._lock:
            self.entered.append(step)
            if len(self.entered) == self._at and (group := self._group()) is not None:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
                self.hit.set()

    def close(self) -> None:
        """Give the pipe back."""
        self._at = None
        os.close(self._fd)
