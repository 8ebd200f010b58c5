"""Task vectors: uploads that grow, and the admitted ones they become.

On disk, `uploads/<id>.part` is renamed to `contributions/<id>.safetensors`, and API
processes that share the folder (one host, or NFS) share the uploads. In S3, the bytes of an
upload are segments `uploads/<id>/<fence>-<offset>`, put before the database says that they
came: any replica goes on from them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coldmerge.core.errors import IntegrityError, NotFoundError
from coldmerge.core.files import fsync_path, write_all
from coldmerge_coordinator.store.bucket import Bucket
from coldmerge_coordinator.store.cache import PAYLOADS, Cache


def _silent() -> None:
    """Nobody waits to hear that it goes on."""


@dataclass(frozen=True)
class StoredPayload:
    """What a listing says of an admitted task vector's file."""

    name: str
    size: int
    written: datetime


class Payloads:
    """Task vectors below a coordinator's folder."""

    shared = True
    """Whether all processes write the same file of an upload."""

    def __init__(self, folder: Path) -> None:
        self.uploads, self.contributions = folder / "uploads", folder / "contributions"

    def local(self, name: str, beat: Callable[[], None] = _silent) -> Path:
        """A local file of an admitted task vector; it may be missing."""
        beat()
        return self.contributions / name

    def exists(self, name: str) -> bool:
        """Whether an admitted task vector is durable."""
        return self.local(name).exists()

    def add(self, name: str, data: bytes) -> None:
        """Store a task vector that is at hand."""
        path = self.contributions / name
        path.write_bytes(data)
        fsync_path(path)
        fsync_path(self.contributions)

    def listed(self) -> Iterator[StoredPayload]:
        """All admitted task vectors that are stored."""
        for path in sorted(self.contributions.iterdir()):
            stat = path.stat()
            written = datetime.fromtimestamp(stat.st_mtime, UTC)
            yield StoredPayload(path.name, stat.st_size, written)

    def remove(self, names: Sequence[str]) -> None:
        """Delete admitted task vectors; those that are not there are no error."""
        for name in names:
            (self.contributions / name).unlink(missing_ok=True)

    def part(self, upload: str) -> Path:
        """The local file that an upload is written to."""
        return self.uploads / f"{upload}.part"

    def keep(self, name: str, part: Path) -> None:
        """Make the file of a complete upload durable under its final name."""
        part.rename(self.contributions / name)
        fsync_path(self.contributions)
        fsync_path(self.uploads)

    def give_back(self, name: str, part: Path) -> None:
        """Undo `keep`, if it was done."""
        final = self.contributions / name
        if not part.exists() and final.exists():
            final.rename(part)
            fsync_path(self.uploads)

    def put_segment(self, upload: str, fence: int, offset: int, data: bytes) -> None:
        """Make bytes of an upload durable beyond its local file."""

    def restore(self, upload: str, fd: int, at: int, committed: int) -> None:
        """Bring the first `committed` bytes of an upload into its local file."""

    def forget(self, upload: str) -> None:
        """Remove what is left of an upload that ended, but its local file."""

    def parts(self) -> Iterator[tuple[str, Path]]:
        """Upload and file of everything below `uploads/`."""
        for path in sorted(self.uploads.glob("*.part")):
            yield path.name.split(".")[0], path


class S3Payloads(Payloads):
    """Task vectors in a bucket. Local files are private to a process, or copies."""

    shared = False

    def __init__(self, folder: Path, bucket: Bucket, cache: Cache) -> None:
        super().__init__(folder)
        self._bucket, self._cache = bucket, cache

    def local(self, name: str, beat: Callable[[], None] = _silent) -> Path:
        """A local copy of an admitted task vector, fetched if need be; it may be missing.

        `beat` is called with each MiB.

        Raises:
            IntegrityError: the object is shorter than it was.
        """
        path = self._cache.folder / PAYLOADS / name
        try:
            os.utime(path)
        except FileNotFoundError:
            self._fetch(name, path, beat)
        return path

    def _fetch(self, name: str, path: Path, beat: Callable[[], None]) -> None:
        partial = path.with_name(f"{name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as file:
                for data in self._bucket.chunks(_payload(name)):
                    file.write(data)
                    beat()
            partial.rename(path)
        except NotFoundError:
            return
        finally:
            partial.unlink(missing_ok=True)
        self._cache.added(path.stat().st_size)

    def exists(self, name: str) -> bool:
        """Whether an admitted task vector is durable."""
        return self._bucket.find(_payload(name)) is not None

    def add(self, name: str, data: bytes) -> None:
        """Store a task vector that is at hand."""
        self._bucket.put(_payload(name), data)

    def listed(self) -> Iterator[StoredPayload]:
        """All admitted task vectors that are stored."""
        for found in self._bucket.list("contributions"):
            yield StoredPayload(found.key.rpartition("/")[2], found.size, found.written)

    def remove(self, names: Sequence[str]) -> None:
        """Delete admitted task vectors; those that are not there are no error."""
        self._bucket.remove([_payload(name) for name in names])
        for name in names:
            (self._cache.folder / PAYLOADS / name).unlink(missing_ok=True)

    def part(self, upload: str) -> Path:
        """A local file that an upload is written to, of this process alone."""
        return self.uploads / f"{upload}.{os.getpid()}-{secrets.token_hex(4)}.part"

    def keep(self, name: str, part: Path) -> None:
        """Make the file of a complete upload durable under its final name."""
        self._bucket.put_file(_payload(name), part)

    def give_back(self, name: str, part: Path) -> None:
        """An object that no row names is an orphan: nothing to undo."""

    def put_segment(self, upload: str, fence: int, offset: int, data: bytes) -> None:
        """Make bytes of an upload durable beyond its local file."""
        self._bucket.put(_segment(upload, fence, offset), data)

    def restore(self, upload: str, fd: int, at: int, committed: int) -> None:
        """Bring the first `committed` bytes of an upload into its local file.

        Of two segments at one offset, the one of the later writer counts: the other's came
        too late to be committed.

        Raises:
            IntegrityError: a segment is missing.
        """
        segments: dict[int, tuple[int, str, int]] = {}
        for found in self._bucket.list(f"uploads/{upload}") if committed else ():
            fence, _, offset = found.key.rpartition("/")[2].partition("-")
            entry = (int(fence), found.key, found.size)
            segments[int(offset)] = max(entry, segments.get(int(offset), entry))
        done = 0
        while done < committed:
            if done not in segments:
                raise _lost(upload, done)
            _, key, size = segments[done]
            for data in self._bucket.chunks(key):
                write_all(fd, data, at + done)
                done += len(data)
            if size == 0:
                raise _lost(upload, done)

    def forget(self, upload: str) -> None:
        """Remove what is left of an upload that ended, but its local file."""
        self._bucket.remove([found.key for found in self._bucket.list(f"uploads/{upload}")])


def _payload(name: str) -> str:
    return f"contributions/{name}"


def _segment(upload: str, fence: int, offset: int) -> str:
    return f"uploads/{upload}/{fence}-{offset}"


def _lost(upload: str, offset: int) -> IntegrityError:
    return IntegrityError(
        "upload.segment_missing",
        "A segment of an upload is not in the bucket any more.",
        expected=f"bytes from offset {offset} on",
        hint="Begin again: `coldmerge push` does so by itself.",
        upload=upload,
    )
