"""Content-addressed files: `blobs/ab/<sha256>`, one per tensor or configuration file.

A blob appears under its name only when its bytes are on disk: temporary name → fsync →
rename → fsync of the folder. Whatever a crash leaves behind is a temporary file, which
nothing reads and `sweep` removes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from coldmerge.core import dtypes
from coldmerge.core.errors import NotFoundError
from coldmerge.core.files import CHUNK_BYTES, PositionalFile, fsync_path, raise_if_full, write_all

_SHA256 = re.compile(r"[0-9a-f]{64}")
_INCOMING = "incoming"


def silent() -> None:
    """Nobody waits to hear that it goes on."""


class Readable(Protocol):
    """Bytes at an offset. `size`: how many there are."""

    size: int

    def read(self, start: int, stop: int) -> bytes | bytearray:
        """The bytes [start, stop)."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


@dataclass(frozen=True)
class StoredBlob:
    """What a listing says of a blob."""

    sha256: str
    size: int
    written: datetime


class BlobWriter:
    """One blob on its way in. A context manager: what was not committed is removed."""

    def __init__(self, folder: Path, synced: set[str]) -> None:
        self._folder = folder
        self._synced = synced
        self._temporary = folder / _INCOMING / f"{os.getpid()}-{secrets.token_hex(8)}"
        self._fd = os.open(
            self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        self._open = True
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes.

        Raises:
            ResourceError: the disk is full.
        """
        write_all(self._fd, data, self.nbytes)
        self._hash.update(data)
        self.nbytes += memoryview(data).nbytes

    @property
    def sha256(self) -> str:
        """The digest of what was written so far."""
        return self._hash.hexdigest()

    def commit(self) -> tuple[str, int]:
        """Make the blob durable under its name: (sha256, length).

        Bytes that are there already are kept, and these dropped.

        Raises:
            ResourceError: the disk is full.
        """
        sha256 = self.sha256
        try:
            self._place(_path(self._folder, sha256))
        except OSError as error:
            raise_if_full(error)
            raise
        self.close()
        return sha256, self.nbytes

    def _place(self, final: Path) -> None:
        if not self._is_there(final):
            os.fsync(self._fd)
            final.parent.mkdir(exist_ok=True)
            self._temporary.rename(final)
        fsync_path(final.parent)
        if final.parent.name not in self._synced:
            # Whoever made the folder may have been killed before it was durable.
            fsync_path(self._folder)
            self._synced.add(final.parent.name)

    def _is_there(self, final: Path) -> bool:
        """Whether the bytes are stored; from now on they are as good as new to a collection."""
        try:
            os.utime(final)
            return final.stat().st_size == self.nbytes
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Drop what was not committed."""
        if self._open:
            self._open = False
            os.close(self._fd)
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlobStore:
    """The blobs of a coordinator. Safe to share between threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._synced: set[str] = set()
        (folder / _INCOMING).mkdir(parents=True, exist_ok=True)

    def watched(self, _beat: Callable[[], None]) -> BlobStore:
        """The same blobs; `beat` is called while bytes come from afar, or go there.

        What it raises ends the transfer, and leaves nothing behind.
        """
        return self

    def writer(self) -> BlobWriter:
        """A new blob: write its bytes, then commit."""
        return BlobWriter(self.folder, self._synced)

    def put(self, data: bytes) -> tuple[str, int]:
        """Store `data`: (sha256, length)."""
        with self.writer() as writer:
            writer.write(data)
            return writer.commit()

    def put_file(self, path: Path) -> tuple[str, int]:
        """Store a copy of a file: (sha256, length)."""
        with self.writer() as writer, path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                writer.write(data)
            return writer.commit()

    def path(self, sha256: str) -> Path:
        """Where a blob is, whether or not it exists.

        Raises:
            NotFoundError: `sha256` is not 64 hexadecimal digits.
        """
        return _path(self.folder, sha256)

    def open(self, sha256: str) -> PositionalFile:
        """A blob, to be read at any offset. Close it.

        Raises:
            NotFoundError: it is not on disk.
        """
        path = self.path(sha256)
        if not path.exists():
            raise missing(sha256)
        return PositionalFile(path)

    def stream(self, sha256: str) -> Readable:
        """A blob, to be read once from front to back. Close it.

        Raises:
            NotFoundError: it is not on disk.
        """
        return self.open(sha256)

    def read(self, sha256: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a blob.

        Raises:
            NotFoundError: it is not on disk.
            IntegrityError: it is shorter than that.
        """
        with self.open(sha256) as file:
            return bytes(file.read(start, stop))

    def block(self, sha256: str, dtype: str, start: int, stop: int) -> dtypes.Floats32:
        """Elements [start, stop) of a float tensor's blob, float32, one-dimensional.

        Raises:
            NotFoundError: it is not on disk.
            IntegrityError: it is shorter than that.
        """
        kind = dtypes.NUMPY[dtype]
        with self.open(sha256) as file:
            raw = file.read(start * kind.itemsize, stop * kind.itemsize)
        return dtypes.to_float32(np.frombuffer(raw, kind))

    def chunks(self, sha256: str) -> Iterator[bytes]:
        """A blob's bytes, at most 1 MiB at a time.

        Raises:
            NotFoundError: it is not on disk.
        """
        with self.open(sha256) as file:
            for start, stop in dtypes.blocks(file.size, CHUNK_BYTES):
                yield bytes(file.read(start, stop))

    def stored(self, sha256s: Sequence[str]) -> dict[str, int]:
        """The lengths of those blobs that are durable."""
        paths = ((sha256, self.path(sha256)) for sha256 in sha256s)
        return {sha256: path.stat().st_size for sha256, path in paths if path.exists()}

    def listed(self, shard: str) -> Iterator[StoredBlob]:
        """The blobs whose names begin with the two digits `shard`."""
        folder = self.folder / shard
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            found = path.stat()
            written = datetime.fromtimestamp(found.st_mtime, UTC)
            yield StoredBlob(path.name, found.st_size, written)

    def remove(self, sha256s: Sequence[str]) -> None:
        """Delete blobs; those that are not there are no error."""
        for sha256 in sha256s:
            _path(self.folder, sha256).unlink(missing_ok=True)

    def sweep(self, older_than: float) -> int:
        """Remove temporary files last written before `older_than` (Unix time): how many."""
        removed = 0
        for path in sorted((self.folder / _INCOMING).iterdir()):
            if path.stat().st_mtime < older_than:
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def _path(folder: Path, sha256: str) -> Path:
    if not _SHA256.fullmatch(sha256):
        raise missing(sha256)
    return folder / sha256[:2] / sha256


def missing(sha256: str) -> NotFoundError:
    """The error for a blob that is not here."""
    return NotFoundError(
        "blob.unknown",
        "There is no such blob.",
        got=sha256[:80],
        hint="Take digests from a release's listing.",
    )
