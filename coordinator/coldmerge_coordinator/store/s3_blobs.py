"""Blobs in S3, under the names they have on disk: `blobs/ab/<sha256>`.

The server's acknowledgement makes a blob durable. A local folder in the format of the disk
store is a cache: what was written or merged here is read here, and what was used longest
ago goes first when it is full.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from coldmerge.core.errors import CheckpointError, IntegrityError, NotFoundError
from coldmerge.core.files import PositionalFile
from coldmerge_coordinator.store.blobs import (
    BlobStore,
    BlobWriter,
    Readable,
    StoredBlob,
    missing,
    silent,
)
from coldmerge_coordinator.store.bucket import Bucket
from coldmerge_coordinator.store.cache import Cache

READ_AHEAD = 8 * 2**20
_FRESH = timedelta(hours=1)
_ATTEMPTS = 3
_SHARDS = 256


class S3Blobs(BlobStore):
    """The blobs of a coordinator, in a bucket. Safe to share between threads and processes."""

    def __init__(self, bucket: Bucket, cache: Cache) -> None:
        super().__init__(cache.folder)
        self._bucket, self._cache = bucket, cache
        self._fetching = tuple(threading.Lock() for _ in range(_SHARDS))
        self._beat: Callable[[], None] = silent

    def watched(self, beat: Callable[[], None]) -> S3Blobs:
        """The same blobs; `beat` is called with each MiB that comes, and while bytes go."""
        found = copy.copy(self)
        found._beat = beat
        return found

    def writer(self) -> BlobWriter:
        """A new blob: write its bytes, then commit."""
        return _S3Writer(self.folder, self._synced, self._bucket, self._cache, self._beat)

    def path(self, sha256: str) -> Path:
        """A local copy of a blob, fetched if need be; where it would be if there is no such blob.

        Raises:
            NotFoundError: `sha256` is not 64 hexadecimal digits.
            IntegrityError: the object is not what its name says.
        """
        local = super().path(sha256)
        try:
            self.open(sha256).close()
        except NotFoundError:
            return local
        return local

    def open(self, sha256: str) -> PositionalFile:
        """A blob, to be read at any offset, from the cache; fetched first if it is not there.

        Raises:
            NotFoundError: it is not stored.
            IntegrityError: the object is not what its name says.
        """
        local = super().path(sha256)
        for _ in range(_ATTEMPTS):
            with self._fetching[int(sha256[:2], 16)]:  # the threads of a merge want the same
                if not local.exists():
                    self._fetch(sha256)
            try:  # another process may make room in this very moment
                os.utime(local)
                return PositionalFile(local)
            except (FileNotFoundError, CheckpointError):
                continue
        return PositionalFile(local)

    def stream(self, sha256: str) -> Readable:
        """A blob, to be read once from front to back: past the cache if it is not there."""
        local = super().path(sha256)
        if local.exists():
            return self.open(sha256)
        found = self._bucket.find(_key(sha256))
        if found is None:
            raise missing(sha256)
        return RemoteBlob(self._bucket, found.key, found.size)

    def _fetch(self, sha256: str) -> None:
        with super().writer() as writer:
            try:
                for data in self._bucket.chunks(_key(sha256)):
                    writer.write(data)
                    self._beat()
            except NotFoundError as error:
                raise missing(sha256) from error
            if writer.sha256 != sha256:
                raise IntegrityError(
                    "blob.corrupt",
                    "A blob in the bucket is not what its name says.",
                    expected=f"sha256 {sha256}",
                    got=f"{writer.sha256}, {writer.nbytes} bytes",
                    hint="Restore the object from a backup of the bucket.",
                )
            writer.commit()
            self._cache.added(writer.nbytes)

    def stored(self, sha256s: Sequence[str]) -> dict[str, int]:
        """The lengths of those blobs that are durable."""
        found = self._bucket.sizes([_key(sha256) for sha256 in sha256s])
        return {key.rpartition("/")[2]: size for key, size in found.items()}

    def listed(self, shard: str) -> Iterator[StoredBlob]:
        """The blobs whose names begin with the two digits `shard`."""
        for found in self._bucket.list(f"blobs/{shard}"):
            sha256 = found.key.rpartition("/")[2]
            yield StoredBlob(sha256, found.size, found.written)

    def remove(self, sha256s: Sequence[str]) -> None:
        """Delete blobs; those that are not there are no error."""
        self._bucket.remove([_key(sha256) for sha256 in sha256s])
        super().remove(sha256s)


class _S3Writer(BlobWriter):
    def __init__(
        self,
        folder: Path,
        synced: set[str],
        bucket: Bucket,
        cache: Cache,
        beat: Callable[[], None],
    ) -> None:
        super().__init__(folder, synced)
        self._bucket, self._cache, self._beat = bucket, cache, beat

    def _place(self, final: Path) -> None:
        key = _key(final.name)
        found = self._bucket.find(key)
        # An object that is old may be collected at any moment: put again, it is new.
        if found is None or found.size != self.nbytes or _old(found.written):
            self._bucket.put_file(key, self._temporary, self._beat)
        super()._place(final)
        self._cache.added(self.nbytes)


class RemoteBlob:
    """An object read in ranges, 8 MiB at a time. For one reader, from front to back."""

    def __init__(self, bucket: Bucket, key: str, size: int) -> None:
        self.size = size
        self._bucket, self._key = bucket, key
        self._start, self._data = 0, b""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop).

        Raises:
            IntegrityError: the object is shorter than that.
        """
        if not self._start <= start <= stop <= self._start + len(self._data):
            ahead = min(self.size, max(stop, start + READ_AHEAD))
            self._data = self._bucket.read(self._key, start, ahead)
            self._start = start
        return self._data[start - self._start : stop - self._start]

    def close(self) -> None:
        """Let the bytes go."""
        self._data = b""


def _key(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _old(written: datetime) -> bool:
    return datetime.now(UTC) - written > _FRESH
