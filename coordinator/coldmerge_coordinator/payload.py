"""Checking a payload while it streams in: hashes, lengths, no NaN, no Inf, and its norm."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from coldmerge.core import dtypes
from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.core.errors import ConflictError, IntegrityError, ManifestError, TaskVectorError
from coldmerge.core.files import PositionalFile
from coldmerge.core.names import split_key
from coldmerge.core.task_vector import sum_of_squares

REPLAY_BYTES = 4 * 2**20
NORM_BLOCK = 2**18
_POSITIVE = frozenset({"fisher", "trim"})


class PayloadCheck:
    """Follows a payload: the manifest's tensors, end to end. Memory: one chunk.

    After an error it must not be fed again.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._round = manifest.round
        self._entries = manifest.tensors
        self._statistics = manifest.statistics
        self._index = 0
        self._hash = hashlib.sha256()
        self._done_in_tensor = 0
        self._carry = b""
        self._squares = 0.0
        self.total = manifest.payload_bytes
        self.position = 0

    def replay(self, file: PositionalFile, start: int, committed: int) -> None:
        """Feed what is on disk already: `committed` bytes of payload, from `start` on."""
        for offset in range(0, committed, REPLAY_BYTES):
            stop = min(offset + REPLAY_BYTES, committed)
            self.feed(file.read(start + offset, start + stop))

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the payload.

        Raises:
            ManifestError: more bytes than the manifest lists.
            IntegrityError: a tensor's bytes do not have the promised hash.
            TaskVectorError: a NaN or an infinity, or a statistic that cannot be negative is.
        """
        view = memoryview(data)
        self.check_length(len(view))
        while len(view):
            entry = self._entries[self._index]
            part = view[: entry.nbytes - self._done_in_tensor]
            self._take(entry, part)
            view = view[len(part) :]

    def check_length(self, more: int) -> None:
        """Refuse `more` bytes if they would go past the end; nothing is taken.

        Raises:
            ManifestError: more bytes than the manifest lists.
        """
        if self.position + more > self.total:
            raise ManifestError(
                "payload.too_long",
                "More bytes came than the manifest lists.",
                expected=f"{self.total} bytes",
                got=f"at least {self.position + more} bytes",
                hint="Prepare the contribution again with `coldmerge push`.",
                round=self._round,
            )

    def _take(self, entry: TensorEntry, part: memoryview) -> None:
        self._hash.update(part)
        self._check_values(entry, part)
        self.position += len(part)
        self._done_in_tensor += len(part)
        if self._done_in_tensor == entry.nbytes:
            self._finish(entry)

    def _check_values(self, entry: TensorEntry, part: memoryview) -> None:
        kind = dtypes.NUMPY[entry.dtype]
        raw = self._carry + bytes(part) if self._carry else part
        whole = len(raw) - len(raw) % kind.itemsize
        self._carry = bytes(raw[whole:])
        values = np.frombuffer(raw[:whole], kind)
        statistic = split_key(entry.name, self._statistics)[1]
        for start in range(0, len(values), NORM_BLOCK):
            block = dtypes.to_float32(values[start : start + NORM_BLOCK])
            squares = sum_of_squares(block)
            if not math.isfinite(squares):
                raise TaskVectorError(
                    "payload.not_finite",
                    f"Tensor {entry.name} holds a NaN or an infinity.",
                    expected="finite numbers only",
                    got=f"{int((~np.isfinite(block)).sum())} others among {len(block)} elements",
                    hint="The fine-tuning diverged: lower the learning rate and train again.",
                    round=self._round,
                )
            if statistic in _POSITIVE and (block < 0).any():
                raise TaskVectorError(
                    "payload.negative_statistic",
                    f"The statistic {entry.name} holds a negative number.",
                    expected="squares and magnitudes: 0 or more",
                    got=f"{block.min():g}",
                    hint="Measure again with `coldmerge train`, then push.",
                    round=self._round,
                )
            if statistic not in self._statistics:
                self._squares += squares

    def _finish(self, entry: TensorEntry) -> None:
        found = self._hash.hexdigest()
        if found != entry.sha256:
            raise IntegrityError(
                "payload.wrong_hash",
                f"The bytes of tensor {entry.name} are not those the manifest promises.",
                expected=entry.sha256,
                got=found,
                hint="They were changed on the way, or on the sender's disk: push again.",
                round=self._round,
            )
        self._index += 1
        self._hash = hashlib.sha256()
        self._done_in_tensor = 0

    @property
    def norm(self) -> float:
        """L2 norm of the deltas so far, as stored (LoRA factors are not expanded)."""
        return math.sqrt(self._squares)

    def check_complete(self) -> None:
        """Refuse a payload that has not arrived whole.

        Raises:
            ConflictError: bytes are missing.
        """
        if self.position != self.total:
            raise ConflictError(
                "upload.incomplete",
                "Not all bytes of the task vector have arrived.",
                expected=f"{self.total} bytes",
                got=f"{self.position} bytes",
                hint="Send the rest from the committed size on, then commit.",
                round=self._round,
            )
