"""Writing a model folder: beside its place first, then moved there whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from coldmerge.core.dtypes import NUMPY, as_bytes, blocks, nbytes
from coldmerge.core.errors import CheckpointError, ConflictError
from coldmerge.core.files import (
    CHUNK_BYTES,
    fsync_path,
    partial_path,
    preallocate,
    raise_if_full,
    read_exactly,
    write_all,
)
from coldmerge.core.header import Described, TensorSpec, layout, render_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


class Slots:
    """Where each declared tensor goes: written by position, from any thread or process.

    Pickled, it opens the files again by their paths.
    """

    def __init__(self, places: dict[str, tuple[Path, int, TensorSpec]]) -> None:
        self.places = places
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[object]]:
        return type(self), (self.places,)

    def write_at(
        self,
        name: str,
        at: int,
        block: bytes | bytearray | memoryview | npt.NDArray[np.generic],
    ) -> int:
        """Write at byte `at` of a tensor; gives the number of bytes.

        Raises:
            CheckpointError: the tensor was not declared, or would become too long.
        """
        view = as_bytes(block) if isinstance(block, np.ndarray) else memoryview(block).cast("B")
        place = self.places.get(name)
        if place is None or at + len(view) > place[2].nbytes:
            raise CheckpointError(
                "checkpoint.undeclared_bytes",
                f"More bytes were written for tensor {name} than declared.",
                expected="no such tensor" if place is None else f"{place[2].nbytes} bytes",
                got=f"{at + len(view)} bytes",
                hint="Declare every tensor with its type and shape before writing.",
            )
        path, offset, _ = place
        write_all(self._fd(path), view, offset + at)
        return len(view)

    def digest(self, name: str) -> str:
        """sha256 (hexadecimal) of a tensor, read back from the file."""
        return self.hashed(name, self.places[name][2].nbytes).hexdigest()

    def hashed(self, name: str, nbytes: int) -> hashlib._Hash:
        """The sha256 of a tensor's first `nbytes`, read back from the file; it can go on."""
        path, offset, _ = self.places[name]
        found = hashlib.sha256()
        buffer = bytearray(min(CHUNK_BYTES, nbytes))
        for start, stop in blocks(nbytes, CHUNK_BYTES):
            view = memoryview(buffer)[: stop - start]
            read_exactly(self._fd(path), view, offset + start, path)
            found.update(view)
        return found

    def read_at(self, name: str, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) of a tensor, read back from the file."""
        path, offset, _ = self.places[name]
        raw = bytearray(stop - start)
        read_exactly(self._fd(path), memoryview(raw), offset + start, path)
        return raw

    def _fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                self._fds[path] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            return self._fds[path]

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        for fd in self._fds.values():
            os.fsync(fd)

    def close(self) -> None:
        """Give the descriptors back."""
        while self._fds:
            os.close(self._fds.popitem()[1])


class CheckpointWriter:
    """Context manager: the folder appears complete and durable on a clean exit, or not at all.

    Declare all tensors first, then append each one's bytes in order; tensors themselves
    may come in any order. `growing` is where the folder grows, on the same file system; after a
    failure, or a kill, it is kept, and whoever names it again with the same tensors finds in the
    slots what was written. Without it, it grows beside its place and a failure removes it.
    """

    def __init__(
        self,
        folder: Path | str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        growing: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._partial = growing or partial_path(self.folder)
        self._kept = growing is not None
        self._max_shard_bytes = max_shard_bytes
        self.slots = Slots({})
        self.files = Slots({})
        self._written: dict[str, int] = {}
        self._headers: dict[Path, bytes] = {}

    def __enter__(self) -> Self:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise self._folder_exists()
        if not self._kept:
            shutil.rmtree(self._partial, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True, exist_ok=self._kept)
        except OSError as error:
            raise_if_full(error)
            raise ConflictError(
                "checkpoint.cannot_create",
                f"The folder to write cannot be made: {error.strerror}.",
                expected="a place where you may write",
                got=self.folder,
                hint="Choose another folder; `ls -ld` of the one around it says who may write.",
            ) from error
        return self

    def declare(self, entries: Sequence[Described]) -> None:
        """Lay out and preallocate the shards. Call once, before any `write`.

        Within a shard, wide element types come first, so that each tensor is aligned.

        Raises:
            ResourceError: the disk is too small.
        """
        shards = self._split(entries)
        for number, shard in enumerate(shards, 1):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._create(file, shard)
        if len(shards) > 1:
            places = sorted(self.slots.places.items())
            total = sum(spec.nbytes for _, (_, _, spec) in places)
            weight_map = {name: path.name for name, (path, _, _) in places}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_file(INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _split(self, entries: Sequence[Described]) -> list[list[Described]]:
        shards: list[list[Described]] = [[]]
        room = self._max_shard_bytes
        for entry in entries:
            size = nbytes(entry.dtype, entry.shape)
            if size > room and shards[-1]:
                shards.append([])
                room = self._max_shard_bytes
            shards[-1].append(entry)
            room -= size
        return shards

    def _create(self, file: str, shard: Sequence[Described]) -> None:
        specs = layout(sorted(shard, key=lambda e: (-NUMPY[e.dtype].itemsize, e.name)))
        header = render_header(specs, {"format": "pt"})
        path = self._partial / file
        self._reserve(path, len(header) + (specs[-1].stop if specs else 0))
        self._headers[path] = header
        for spec in specs:
            self.slots.places[spec.name] = (path, len(header) + spec.start, spec)
            self._written[spec.name] = 0

    def _reserve(self, path: Path, nbytes: int) -> None:
        """A file of that length: a new one, or the one that was kept."""
        made = os.O_CREAT if self._kept else os.O_CREAT | os.O_EXCL
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | made)
        try:
            if os.fstat(fd).st_size > nbytes:
                os.ftruncate(fd, nbytes)
            preallocate(fd, nbytes)
        finally:
            os.close(fd)

    def declare_file(self, relative: str, nbytes: int) -> None:
        """Preallocate a file beside the weights, to be written through `files` by its path.

        Raises:
            ResourceError: the disk is too small.
        """
        path = self._partial / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reserve(path, nbytes)
        self.files.places[relative] = (path, 0, TensorSpec(relative, "U8", (nbytes,), 0, nbytes))

    def write(
        self, name: str, block: bytes | bytearray | memoryview | npt.NDArray[np.generic]
    ) -> None:
        """Append bytes (or an array in the declared type) to a declared tensor.

        Raises:
            CheckpointError: the tensor was not declared, or would become too long.
        """
        at = self._written.get(name, 0)
        self._written[name] = at + self.slots.write_at(name, at, block)

    def written_elsewhere(self, name: str) -> None:
        """Count a tensor that another process wrote whole, through `slots`."""
        self._written[name] = self.slots.places[name][2].nbytes

    def write_file(self, relative: str | Path, data: bytes) -> None:
        """Add a file beside the weights.

        Raises:
            ResourceError: the disk is full.
        """
        path = self._partial / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise_if_full(error)
            raise

    def copy_file(self, source: Path | str, relative: str | Path) -> None:
        """Copy a file beside the weights.

        Raises:
            ResourceError: the disk is full.
        """
        path = self._partial / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, path)
        except OSError as error:
            raise_if_full(error)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self.slots.close()
            self.files.close()
            if not self._kept:
                shutil.rmtree(self._partial, ignore_errors=True)

    def _commit(self) -> None:
        places = self.slots.places
        short = [n for n, (_, _, spec) in places.items() if self._written[n] < spec.nbytes]
        if short:
            raise CheckpointError(
                "checkpoint.incomplete",
                f"Not all bytes of {len(short)} tensors were written, first {min(short)}.",
                expected=f"{places[min(short)][2].nbytes} bytes",
                got=f"{self._written[min(short)]} bytes",
                hint="Write every declared tensor to its end.",
                folder=self.folder,
            )
        self._write_headers()
        for path in sorted(self._partial.rglob("*"), reverse=True):
            fsync_path(path)
        fsync_path(self._partial)
        try:
            self._partial.rename(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise self._folder_exists() from error  # another process was faster
        fsync_path(self.folder.parent)

    def _folder_exists(self) -> ConflictError:
        return ConflictError(
            "checkpoint.folder_exists",
            "The folder to write exists already and is not empty.",
            expected="a new or empty folder",
            got=self.folder,
            hint="Choose another folder, or move this one away.",
        )

    def _write_headers(self) -> None:
        """Last of all: a killed process leaves shards that begin with zeros and do not load."""
        for path, header in self._headers.items():
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                write_all(fd, header, 0)
            finally:
                os.close(fd)
