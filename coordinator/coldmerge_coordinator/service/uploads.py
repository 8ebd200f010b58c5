"""Uploads on disk: the file that grows, how far it is durable, how it becomes a contribution.

`uploads/<id>.part` is a whole safetensors file from the start: header, then the payload
that streams in. Its rename into `contributions/` and the database row make it one. Ids
are made from the manifest's digest, so that a step that is repeated after a crash finds
what the first attempt left.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

import numpy as np
from sqlalchemy.orm import Session

from coldmerge.core.clock import Clock
from coldmerge.core.documents import Manifest
from coldmerge.core.errors import ConflictError, IntegrityError, TaskVectorError
from coldmerge.core.files import PositionalFile, fsync_path, preallocate, write_all
from coldmerge.core.task_vector import TaskVector, vector_header
from coldmerge_coordinator.payload import PayloadCheck
from coldmerge_coordinator.statistics import check_stored
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.store.models import Contribution, Upload

FLUSH_BYTES = 16 * 2**20
_DIGITS = 48
_WITHOUT_FILE = ("REPLACED", "WITHDRAWN")


def upload_id(manifest_digest: str) -> str:
    """The id of the upload of a manifest."""
    return f"upload-{manifest_digest[:_DIGITS]}"


def contribution_id(manifest_digest: str) -> str:
    """The id of the contribution that a manifest becomes."""
    return f"contribution-{manifest_digest[:_DIGITS]}"


def header_of(manifest: Manifest) -> bytes:
    """The safetensors header that makes a file of the payload."""
    return vector_header(
        manifest.tensors,
        kind=manifest.kind,
        encoding=manifest.encoding,
        base_digest=manifest.base_digest,
        scaling=manifest.scaling,
        statistics=manifest.statistics,
    )


def part_path(store: Store, upload: str) -> Path:
    """Where an upload's bytes are."""
    return store.uploads / f"{upload}.part"


def payload_name(contribution: str) -> str:
    """The file name of an admitted task vector."""
    return f"{contribution}.safetensors"


def create_part(store: Store, upload: str, manifest: Manifest) -> None:
    """Reserve the disk for an upload and write its header.

    Raises:
        ResourceError: the disk is full.
    """
    path, header = part_path(store, upload), header_of(manifest)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        preallocate(fd, len(header) + manifest.payload_bytes)
        write_all(fd, header, 0)
        os.fsync(fd)
    except Exception:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    fsync_path(store.uploads)


def sweep(store: Store) -> None:
    """Bring files and rows into line after a crash. Call before anything is served.

    A file without a row goes; so do the files of contributions that were replaced or
    taken back. A contribution whose file still has its name as an upload gets it: the
    transaction had seemed to fail, the rename was undone, and it was in the log after all.
    """
    with store.database.read() as session:
        uploads = {row.id: row for row in session.query(Upload)}
        rows = session.query(Contribution).filter(Contribution.state.in_(_WITHOUT_FILE))
        dropped = {row.payload for row in rows}
        known = {row.payload for row in session.query(Contribution)}
    resumable = {payload_name(contribution_id(row.manifest_digest)) for row in uploads.values()}
    for path in sorted(store.uploads.glob("*.part")):
        if path.stem in uploads:
            continue
        final = store.contributions / payload_name(path.stem.replace("upload-", "contribution-", 1))
        if final.name in known - dropped and not final.exists():
            path.rename(final)
            fsync_path(store.contributions)
        else:
            path.unlink()
    for path in sorted(store.contributions.iterdir()):
        if path.name in dropped or path.name not in known | resumable:
            path.unlink()


class LiveUpload:
    """An open upload. Its methods block, and may be called from any thread.

    Every writer takes a ticket with `take`; the last one may write, so that a client
    that lost its connection does not wait for the dead one.
    """

    def __init__(self, store: Store, clock: Clock, row: Upload) -> None:
        self.id = row.id
        self.contributor = row.contributor
        self.machine = row.machine
        self.round = row.round
        self.manifest = Manifest.parse(row.manifest)
        self.manifest_digest = row.manifest_digest
        self.lock = threading.RLock()
        self.closed = False
        self._store = store
        self._clock = clock
        self._tickets = 0
        self.path = part_path(store, row.id)
        self.final = store.contributions / payload_name(contribution_id(row.manifest_digest))
        self._recover_commit()
        self._start = len(header_of(self.manifest))
        self.committed = row.committed_size
        self._check = PayloadCheck(self.manifest)
        self._replay()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)

    def _recover_commit(self) -> None:
        """Undo a rename whose transaction never came."""
        if not self.path.exists() and self.final.exists():
            self.final.rename(self.path)
            fsync_path(self._store.uploads)

    def _replay(self) -> None:
        with PositionalFile(self.path) as file:
            self._check.replay(file, self._start, self.committed)

    @property
    def actor(self) -> str:
        """Who sends it, as the audit log says it."""
        return f"{self.contributor}/{self.machine}"

    @property
    def position(self) -> int:
        """How many bytes of payload have come."""
        return self._check.position

    @property
    def total(self) -> int:
        """How many bytes of payload there will be."""
        return self._check.total

    def take(self) -> int:
        """Become the writer: everybody else's ticket is void. What came is made durable."""
        with self.lock:
            self.flush()
            self._tickets += 1
            return self._tickets

    def write(self, ticket: int, offset: int, data: bytes) -> int:
        """Check and store the next bytes; the new position.

        Raises:
            ConflictError: not where the upload is, with the true offset in `expected`;
                or another stream took over.
            ColdmergeError: the payload is bad: the upload is gone.
        """
        with self.lock:
            self._check_ticket(ticket)
            if offset != self.position:
                raise ConflictError(
                    "upload.wrong_offset",
                    "The bytes do not continue where the upload is.",
                    expected=self.position,
                    got=offset,
                    hint="Go on from the expected offset.",
                    upload=self.id,
                )
            self._check.check_length(len(data))
            try:
                write_all(self._fd, data, self._start + offset)
                self._check.feed(data)
            except (TaskVectorError, IntegrityError):
                self.discard()
                raise
            except Exception:
                self.close()
                raise
            if self.position - self.committed >= FLUSH_BYTES:
                self.flush()
            return self.position

    def _check_ticket(self, ticket: int) -> None:
        if self.closed or ticket != self._tickets:
            raise _ended(self.id)

    def flush(self) -> int:
        """Make what came durable and say so in the database; the committed size."""
        with self.lock:
            if not self.closed and self.position > self.committed:
                try:
                    os.fsync(self._fd)
                except OSError:
                    # What was not written may be forgotten by now: a second fsync would
                    # succeed and prove nothing. Opened again, the upload goes on from
                    # what is durable.
                    self.close()
                    raise
                with self._store.database.write() as session:
                    row = session.get(Upload, self.id)
                    if row is not None:
                        row.committed_size = self.position
                self.committed = self.position
            return self.committed

    def finish(self) -> float:
        """Make a complete upload durable under its final name: the norm of its vector.

        Raises:
            ConflictError: bytes are missing.
            TaskVectorError: the file is not a sound task vector, or a statistic in it is
                wrong; the upload is gone.
        """
        with self.lock:
            if self.closed:
                raise _ended(self.id)
            self._recover_commit()
            self.flush()
            self._check.check_complete()
            try:
                vector = TaskVector.open(self.path)
                norm = self._norm(vector)
                check_stored(vector, self._seed())
            except TaskVectorError:
                self.discard()
                raise
            self.path.rename(self.final)
            fsync_path(self._store.contributions)
            fsync_path(self._store.uploads)
            return norm

    def _seed(self) -> bytes:
        """The same for each attempt to commit this manifest, and known to the coordinator alone."""
        return self._store.signer.key.sign(f"spot check of {self.manifest_digest}".encode())

    def _norm(self, vector: TaskVector) -> float:
        if vector.kind == "full":
            return self._check.norm
        with np.errstate(all="ignore"):
            norm = vector.norm()
        if not math.isfinite(norm):
            raise TaskVectorError(
                "payload.product_not_finite",
                "A product of LoRA factors holds an infinity.",
                expected="finite numbers only",
                got=f"a norm of {norm}",
                hint="The fine-tuning diverged: lower the learning rate and train again.",
                round=self.round,
            )
        return norm

    def unfinish(self) -> None:
        """Take `finish` back."""
        with self.lock:
            self._recover_commit()

    def discard(self) -> None:
        """Forget the upload: row and file."""
        with self.lock:
            self.close()
            with self._store.database.write() as session:
                drop_row(session, self.id)
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the file back. The upload can be opened again."""
        with self.lock:
            if not self.closed:
                self.closed = True
                os.close(self._fd)


def _ended(upload: str) -> ConflictError:
    return ConflictError(
        "upload.superseded",
        "Another stream has taken this upload over, or it has ended.",
        hint="Ask for its status and go on from there.",
        upload=upload,
    )


def drop_row(session: Session, upload: str) -> None:
    """Delete an upload's row, if it is still there."""
    row = session.get(Upload, upload)
    if row is not None:
        session.delete(row)
