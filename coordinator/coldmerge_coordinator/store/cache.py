"""Local copies of what is in S3: `cache/ab/<sha256>` and `cache/payloads/<name>`.

Everything in it can be removed at any time. A process that has a copy open keeps reading.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

PAYLOADS = "payloads"
_PAYLOAD_SECONDS = 3600.0
_SHARE = 8


class Cache:
    """Keeps about `limit` bytes, and lets go of what was used longest ago.

    Payloads stay for an hour after they were last asked for: a merge opens them by name
    more than once.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit
        self._added = limit  # the first addition looks at what earlier processes left
        self._lock = threading.Lock()
        (folder / PAYLOADS).mkdir(parents=True, exist_ok=True, mode=0o700)

    def added(self, nbytes: int) -> None:
        """Count a new copy; every eighth of the limit, make room."""
        with self._lock:
            self._added += nbytes
            if self._added < self._limit // _SHARE:
                return
            self._added = 0
        self.trim()

    def trim(self) -> None:
        """Remove what was used longest ago until the rest fits."""
        found, protected = [], time.time() - _PAYLOAD_SECONDS
        for path in (*self.folder.glob("??/*"), *(self.folder / PAYLOADS).iterdir()):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process makes room, too
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if total <= self._limit:
                return
            if path.parent.name != PAYLOADS or used < protected:
                path.unlink(missing_ok=True)
                total -= size
