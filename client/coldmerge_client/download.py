"""Fetching tensors and files into their places: several at a time, each resumable, each hashed.

Bytes are hashed as they come and written once, where they stay. A ledger beside them says how
far each piece is, so that a killed process loses nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coldmerge.core.checkpoint_writer import Slots
from coldmerge.core.errors import IntegrityError
from coldmerge.core.progress import Counter
from coldmerge_client.patience import persist
from coldmerge_client.session import Session

PARALLEL = 8
_LINE_BYTES = 8


@dataclass(frozen=True)
class Piece:
    """A tensor or file on its way: its bytes go to `name` of `slots`, `line` is its ledger's."""

    sha256: str
    nbytes: int
    slots: Slots
    name: str
    line: int

    def write(self, at: int, data: bytes | bytearray) -> None:
        """Put bytes in their place.

        Raises:
            ResourceError: the disk is full.
        """
        self.slots.write_at(self.name, at, data)


class Ledger:
    """How many bytes of each piece are in their place. A context manager.

    After a power cut it may say more than the disk has: whoever goes on must hash what is there.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, lines * _LINE_BYTES)

    def done(self, piece: Piece) -> int:
        """Bytes of the piece, from its start on, that were written."""
        raw = os.pread(self._fd, _LINE_BYTES, piece.line * _LINE_BYTES)
        return min(int.from_bytes(raw, "little"), piece.nbytes)

    def note(self, piece: Piece, done: int) -> None:
        """Write down how far the piece is."""
        os.pwrite(self._fd, done.to_bytes(_LINE_BYTES, "little"), piece.line * _LINE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def fetch(session: Session, wanted: Sequence[Piece], ledger: Ledger, counter: Counter) -> None:
    """Bring every piece into its place.

    What an earlier, interrupted call brought is hashed and not fetched again.

    Raises:
        IntegrityError: the coordinator sent other bytes than it promised.
        UnavailableError: the coordinator stayed away for the session's timeout.
        ResourceError: the disk is full.
    """
    largest_first = sorted(wanted, key=lambda piece: (-piece.nbytes, piece.sha256))
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
        tasks = [
            pool.submit(_Arrival(session, piece, ledger, counter).complete)
            for piece in largest_first
        ]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for task in tasks:
        if not task.cancelled():
            task.result()


class _Arrival:
    """One piece: how far it is, and the hash of that."""

    def __init__(self, session: Session, piece: Piece, ledger: Ledger, counter: Counter) -> None:
        self._session, self._piece = session, piece
        self._ledger, self._counter = ledger, counter
        self._done = 0
        self._hash = hashlib.sha256()

    def complete(self) -> None:
        """Fetch what is missing. What was there and is damaged is fetched again."""
        resumed = self._resume()
        self._fetch()
        if self._hash.hexdigest() == self._piece.sha256:
            return
        self._begin_again()
        if not resumed:
            raise _wrong_bytes(self._piece.sha256, "other bytes")
        self._fetch()
        if self._hash.hexdigest() != self._piece.sha256:
            self._begin_again()
            raise _wrong_bytes(self._piece.sha256, "other bytes")

    def _resume(self) -> int:
        piece = self._piece
        self._done = self._ledger.done(piece)
        self._hash = piece.slots.hashed(piece.name, self._done)
        self._counter.add(self._done)
        return self._done

    def _begin_again(self) -> None:
        self._ledger.note(self._piece, 0)
        self._counter.add(-self._done)
        self._done, self._hash = 0, hashlib.sha256()

    def _fetch(self) -> None:
        persist(
            self._continue,
            lambda: self._done,
            patience=self._session.timeout,
            on_retry=self._session.on_retry,
        )

    def _continue(self) -> None:
        """Take what is missing."""
        piece = self._piece
        if self._done == piece.nbytes:
            return
        for chunk in self._session.read_blob(piece.sha256, self._done, piece.nbytes):
            offset, data = chunk.offset, chunk.data  # each look at `data` is a copy
            if offset != self._done or offset + len(data) > piece.nbytes:
                raise _wrong_bytes(piece.sha256, f"{len(data)} bytes at {offset}")
            self._hash.update(data)
            piece.write(offset, data)
            self._done += len(data)
            self._ledger.note(piece, self._done)
            self._counter.add(len(data))
        if self._done < piece.nbytes:
            raise _wrong_bytes(piece.sha256, f"{self._done} of {piece.nbytes} bytes")


def _wrong_bytes(sha256: str, got: str) -> IntegrityError:
    return IntegrityError(
        "pull.wrong_bytes",
        "The coordinator sent other bytes than the release lists.",
        expected=sha256,
        got=got,
        hint="Pull again; if it happens twice, ask the admin to check the coordinator's disk.",
    )
