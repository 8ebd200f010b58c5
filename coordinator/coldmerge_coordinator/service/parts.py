"""The local file of an upload: header, the payload that grows, and behind it who may write.

Processes that share the folder share the file. What its last eight bytes say, the fence of
the last writer, is looked at under a file lock before each write: a process that was left
behind cannot touch what its successor has checked. (flock works over NFS, too.) A file that
is private to its process needs no such stamp.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from coldmerge.core.errors import CheckpointError
from coldmerge.core.files import fsync_path, preallocate, write_all
from coldmerge_coordinator.store.payloads import Payloads

_STAMP_BYTES = 8


class Part:
    """One open file. `start`: where the payload begins in it; `total`: how long it will be."""

    def __init__(self, payloads: Payloads, upload: str, path: Path, start: int, total: int) -> None:
        self.path = path
        self._payloads, self._upload = payloads, upload
        self._start, self._end = start, start + total
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._depth, self._turn = 0, threading.RLock()

    @classmethod
    def open(
        cls,
        payloads: Payloads,
        upload: str,
        name: str,
        header: bytes,
        total: int,
        committed: int,
        is_counted: Callable[[], bool],
    ) -> Self:
        """Open, make or restore the file of an upload, `committed` bytes of it durable.

        `name` is what the file is called once it is admitted: a rename whose transaction
        never came is undone. `is_counted` says whether it came, and is asked when no other
        process is in the middle of it.

        Raises:
            CheckpointError: bytes were committed, and the file is gone.
            IntegrityError: the same, in S3.
            ResourceError: the disk is full.
        """
        path = payloads.part(upload)
        if payloads.shared and not path.exists():
            with _alone_with(payloads.contributions / name):
                if not is_counted():
                    payloads.give_back(name, path)
        if not path.exists():
            if payloads.shared and committed:
                raise _gone(path)
            _create(path, header, len(header) + total + _STAMP_BYTES)
        part = cls(payloads, upload, path, len(header), total)
        try:
            payloads.restore(upload, part._fd, part._start, committed)
        except BaseException:
            part.close()
            raise
        return part

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing, and from taking over."""
        with self._turn:
            self._depth += 1
            if self._depth == 1:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0 and self._fd >= 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def is_there(self) -> bool:
        """Whether the file still has its name: an upload can be dropped and begun again."""
        try:
            return self.path.stat().st_ino == os.fstat(self._fd).st_ino
        except FileNotFoundError:
            return False

    def stamp(self, fence: int) -> None:
        """Write down who may write. Under `locked`."""
        write_all(self._fd, fence.to_bytes(_STAMP_BYTES, "big"), self._end)

    def is_stamped(self, fence: int) -> bool:
        """Whether the writer of that fence may write. Under `locked`."""
        if not self._payloads.shared:
            return True
        return os.pread(self._fd, _STAMP_BYTES, self._end) == fence.to_bytes(_STAMP_BYTES, "big")

    def write(self, data: bytes, offset: int) -> None:
        """Store bytes of the payload. Under `locked`.

        Raises:
            ResourceError: the disk is full.
        """
        write_all(self._fd, data, self._start + offset)

    def flush(self, fence: int, start: int, stop: int) -> None:
        """Make the bytes [start, stop) of the payload durable."""
        if self._payloads.shared:
            os.fsync(self._fd)
        else:
            data = os.pread(self._fd, stop - start, self._start + start)
            self._payloads.put_segment(self._upload, fence, start, data)

    def complete(self) -> None:
        """Cut the stamp off: the rest is a safetensors file, and nobody may write to it."""
        os.ftruncate(self._fd, self._end)
        os.fsync(self._fd)

    def close(self) -> None:
        """Give the file back; a private one is removed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self._payloads.shared:
                self.path.unlink(missing_ok=True)


@contextmanager
def _alone_with(final: Path) -> Iterator[None]:
    """Wait until nobody commits the file any more, who holds it locked from before its rename."""
    try:
        file = final.open("r+b")
    except FileNotFoundError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create(path: Path, header: bytes, nbytes: int) -> None:
    """Make the file, unless another process is faster."""
    new = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        preallocate(fd, nbytes)
        write_all(fd, header, 0)
        os.fsync(fd)
        with suppress(FileExistsError):
            path.hardlink_to(new)
    finally:
        os.close(fd)
        new.unlink()
    fsync_path(path.parent)


def _gone(path: Path) -> CheckpointError:
    return CheckpointError(
        "upload.file_missing",
        "The file of an upload is gone.",
        hint="Begin again: `coldmerge push` does so by itself.",
        path=path,
    )


def is_left_behind(path: Path) -> bool:
    """Whether this file is private to a process, and that has ended."""
    _, _, owner = path.stem.partition(".")
    if not owner:
        return False
    process = int(owner.split(".")[-1].partition("-")[0])
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
