"""What tells the processes of a coordinator's replicas apart: names in leases, locks on folders.

A replica is a folder with a `config.yaml` of its own. All replicas of a coordinator have the
same database, keys and files. In each folder every part runs once.
"""

from __future__ import annotations

import fcntl
import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coldmerge.core.errors import ConflictError

API, DRIVER, WORKER = PARTS = ("api", "driver", "worker")
_POLL_SECONDS = 0.3
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def holder(part: str, folder: Path) -> str:
    """The name of a folder's driver or worker in leases.

    The same after a restart, so that its lease is taken back at once; another one on every
    other machine and in every other folder, also where machines share a name or a path.
    """
    host = socket.gethostname()
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    where = "\0".join((host, boot, str(folder.resolve())))
    return f"{part}@{host[:32]}-{hashlib.sha256(where.encode()).hexdigest()[:16]}"


@contextmanager
def only_process(folder: Path, part: str) -> Iterator[None]:
    """Be the folder's process for that part; the kernel frees the lock however it ends.

    Raises:
        ConflictError: there is one.
    """
    with (folder / f"{part}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                "serve.already_running",
                f"Another process runs the {part} of {folder}.",
                hint="Stop it with SIGTERM; a replica beside it needs a folder of its own.",
            ) from error
        yield


@contextmanager
def next_process(folder: Path, part: str, stop: threading.Event) -> Iterator[None]:
    """The same, but wait for the one that is there to end, or for `stop`."""
    with (folder / f"{part}.lock").open("a") as file:
        while not stop.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.wait(_POLL_SECONDS)
        yield
