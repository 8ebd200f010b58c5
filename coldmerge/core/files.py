"""Reading at an offset without a page of residue, and writing that survives a crash."""

from __future__ import annotations

import errno
import os
import re
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

from coldmerge.core.errors import CheckpointError, IntegrityError, ResourceError

CHUNK_BYTES = 2**20
"""Bytes of a file that are in memory at a time."""


class PositionalFile:
    """A file read with pread: safe to share between threads, and nothing stays mapped.

    A context manager; garbage collection gives the descriptor back, too.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                "file.unreadable",
                f"A file cannot be opened: {error.strerror}.",
                hint="Check that the path exists and that you may read it.",
                path=path,
            ) from error
        self.path = path
        self.size = os.fstat(self._fd).st_size
        self._close = weakref.finalize(self, os.close, self._fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (bytes) from `offset`.

        Raises:
            IntegrityError: the file ends before the buffer is full.
        """
        read_exactly(self._fd, buffer, offset, self.path)

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop)."""
        raw = bytearray(stop - start)
        self.read_into(memoryview(raw), start)
        return raw

    def close(self) -> None:
        """Give the descriptor back."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_exactly(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` (bytes) from `offset` of `fd`, which is open on `path`.

    Raises:
        IntegrityError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise IntegrityError(
                "file.truncated",
                "A file became shorter while it was read.",
                expected=f"{len(buffer)} bytes from offset {offset}",
                got=f"{done} bytes",
                hint="Do not change model folders in use; run the command again.",
                path=path,
            )
        done += count


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write `data` at `offset` of `fd`, completely.

    Raises:
        ResourceError: the disk is full.
    """
    view = memoryview(data)
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
    except OSError as error:
        raise_if_full(error)
        raise


def preallocate(fd: int, nbytes: int, offset: int = 0) -> None:
    """Reserve the disk before the work: the file grows to `offset + nbytes` if it is shorter.

    Raises:
        ResourceError: the disk is full.
    """
    if nbytes == 0:
        return
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as error:
        raise_if_full(error)
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, max(offset + nbytes, os.fstat(fd).st_size))


def raise_if_full(error: OSError) -> None:
    """Turn "no space left" and "quota exceeded" into our own error; leave others alone.

    Raises:
        ResourceError: `error` says that the disk is full.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError(
            "disk.full",
            f"The disk is full: {error.strerror}.",
            hint="Free some space (`df -h`) and run the command again; nothing was lost.",
            path=error.filename,
        ) from error


def existing(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that exists, absolute."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def partial_path(path: Path) -> Path:
    """Where this process writes what becomes `path` when it is whole."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def remove_leftovers(path: Path) -> None:
    """Remove the folders that killed processes of this machine left of writing `path`."""
    pattern = re.compile(re.escape(path.name) + r"\.partial-(\d+)")
    if path.absolute().parent.is_dir():
        for left in sorted(path.absolute().parent.iterdir()):
            found = pattern.fullmatch(left.name)
            if found and not _alive(int(found[1])):
                shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def make_folder(path: Path, mode: int = 0o700) -> None:
    """A folder, with those above it, that survives a power cut; one that is there may stay."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing:
        fsync_path(made.parent)


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
