"""Writing a task vector in one pass, though which tensors it holds is known only at the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from coldmerge.core.documents import Statistic
from coldmerge.core.dtypes import (
    ENCODINGS,
    NUMPY,
    Floats32,
    as_bytes,
    from_float32,
    nbytes,
    to_float32,
)
from coldmerge.core.files import PositionalFile, fsync_path, partial_path, preallocate, write_all
from coldmerge.core.names import split_key
from coldmerge.core.statistics import DTYPE
from coldmerge.core.task_vector import TaskVector, vector_header

AHEAD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Planned:
    """A tensor that may be written: key, type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class VectorWriter:
    """Context manager: appends tensors in sorted order; the file appears whole, or not at all.

    Room for the header of all planned tensors is reserved, and what is left of it padded.
    """

    def __init__(
        self,
        path: Path,
        planned: Iterable[tuple[str, tuple[int, ...]]],
        *,
        kind: str,
        encoding: str,
        base_digest: str,
        scaling: Mapping[str, float],
        statistics: Mapping[Statistic, float] | None = None,
    ) -> None:
        self.path = path
        self.dtype = ENCODINGS[encoding]
        self._partial = partial_path(path)
        self._statistics = dict(statistics or {})
        self._planned = [self._plan(key, shape) for key, shape in sorted(planned)]
        self._facts = {"kind": kind, "encoding": encoding, "base_digest": base_digest}
        self._scaling = dict(scaling)
        self._reserved = len(self._header(self._planned))
        self._kept: list[Planned] = []
        self._hash, self._hashes = hashlib.sha256(), dict[str, str]()
        self._end = self._at = self._allocated = self._reserved
        self._most = self._reserved + sum(nbytes(e.dtype, e.shape) for e in self._planned)

    def _plan(self, key: str, shape: tuple[int, ...]) -> Planned:
        part = split_key(key, self._statistics)[1]
        return Planned(key, DTYPE if part in self._statistics else self.dtype, shape)

    def _header(self, entries: list[Planned], pad_to: int = 0) -> bytes:
        present = {entry.name for entry in entries}
        scaling = {k: v for k, v in self._scaling.items() if f"{k}.lora_A" in present}
        return vector_header(
            entries, **self._facts, scaling=scaling, statistics=self._statistics, pad_to=pad_to
        )

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(self._partial, flags, 0o600)
        self._reader = PositionalFile(self._partial)
        return self

    def as_stored(self, values: Floats32) -> Floats32:
        """What a reader of the file will see of `values`, of the same shape."""
        return to_float32(from_float32(values, self.dtype))

    def append(self, values: Floats32) -> None:
        """Append elements to the current tensor, encoded."""
        self._append(as_bytes(from_float32(values, self.dtype)))

    def append_statistic(self, values: Floats32) -> None:
        """Append elements to the current tensor, which is a statistic, as they are."""
        self._append(as_bytes(from_float32(values, DTYPE)))

    def _append(self, data: memoryview) -> None:
        if self._at + len(data) > self._allocated < self._most:
            ahead = min(self._at + len(data) + AHEAD_BYTES, self._most)
            preallocate(self._fd, ahead - self._allocated, self._allocated)
            self._allocated = ahead
        write_all(self._fd, data, self._at)
        self._hash.update(data)
        self._at += len(data)

    def keep(self, key: str, shape: tuple[int, ...]) -> None:
        """End the current tensor: what was appended since the last one is tensor `key`."""
        self._kept.append(self._plan(key, shape))
        self._hashes[key] = self._hash.hexdigest()
        self._hash, self._end = hashlib.sha256(), self._at

    def current(self, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the current tensor of deltas, as they were stored."""
        kind = NUMPY[self.dtype]
        out = np.empty(stop - start, kind)
        self._reader.read_into(as_bytes(out), self._end + start * kind.itemsize)
        return to_float32(out)

    def drop(self) -> None:
        """Forget what was appended since the last tensor ended."""
        self._hash, self._at = hashlib.sha256(), self._end

    @property
    def kept(self) -> int:
        """How many tensors were kept so far."""
        return len(self._kept)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.ftruncate(self._fd, self._end)
                write_all(self._fd, self._header(self._kept, self._reserved), 0)
                os.fsync(self._fd)
                self._partial.rename(self.path)
                fsync_path(self.path.parent)
        finally:
            os.close(self._fd)
            self._reader.close()
            self._partial.unlink(missing_ok=True)

    def open(self) -> TaskVector:
        """The finished file."""
        return TaskVector.open(self.path, self._hashes)
