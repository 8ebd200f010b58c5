"""Uploads: how far they are durable, who may write, how they become contributions.

The bytes are in a `Part`, a whole safetensors file from the start. Its place among the
payloads and the database row make it a contribution. Ids are made from the manifest's
digest, so that a step that is repeated after a crash finds what the first attempt left.
Several API processes may have the same upload open: the row's fence says whose it is.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager

import numpy as np
from sqlalchemy import delete, select, update

from coldmerge.core.clock import Clock
from coldmerge.core.documents import Manifest
from coldmerge.core.errors import ConflictError, IntegrityError, TaskVectorError
from coldmerge.core.files import PositionalFile
from coldmerge.core.task_vector import TaskVector, vector_header
from coldmerge_coordinator.payload import PayloadCheck
from coldmerge_coordinator.service.parts import Part, is_left_behind
from coldmerge_coordinator.statistics import check_stored
from coldmerge_coordinator.store import Store, contributions
from coldmerge_coordinator.store.models import Contribution, Upload

FLUSH_BYTES = 16 * 2**20
_DIGITS = 48
_WITHOUT_FILE = ("REPLACED", "WITHDRAWN", "REFUSED")


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


def payload_name(contribution: str) -> str:
    """The file name of an admitted task vector."""
    return f"{contribution}.safetensors"


def sweep(store: Store) -> None:
    """Bring local files and rows into line after a crash. Call before anything is served.

    A file without a row goes; so do the files of contributions that were replaced or
    taken back. A contribution whose file still has its name as an upload gets it: the
    transaction had seemed to fail, the rename was undone, and it was in the log after all.
    Other API processes may be at work: rows are read after the files were listed, and an
    upload's row is there before its file.
    """
    payloads = store.payloads
    parts = list(payloads.parts())
    stored = [found.name for found in payloads.listed()] if payloads.shared else []
    with store.database.read() as session:
        uploads = {row.id: row.manifest_digest for row in session.query(Upload)}
        without = Contribution.state.in_(_WITHOUT_FILE)
        dropped = set(session.scalars(select(Contribution.payload).where(without)))
        known = set(session.scalars(select(Contribution.payload)))
    resumable = {payload_name(contribution_id(digest)) for digest in uploads.values()}
    for upload, path in parts:
        name = payload_name(upload.replace("upload-", "contribution-", 1))
        if is_left_behind(path):
            path.unlink(missing_ok=True)
        elif upload not in uploads and payloads.shared:
            if name in known - dropped and not payloads.exists(name):
                payloads.keep(name, path)
            else:
                path.unlink(missing_ok=True)
    payloads.remove([n for n in stored if n in dropped or n not in known | resumable])


class LiveUpload:
    """An open upload. Its methods block, and may be called from any thread.

    Every writer takes a ticket with `take`; the last one may write, so that a client
    that lost its connection does not wait for the dead one. The ticket is the fence of the
    upload's row: it counts over all API processes, and only its holder moves what is
    committed.
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
        self.committed, self.fence = row.committed_size, row.fence
        self._store, self._payloads, self._clock = store, store.payloads, clock
        self._name = payload_name(contribution_id(row.manifest_digest))
        self._check = PayloadCheck(self.manifest)
        header = header_of(self.manifest)
        self._start = len(header)
        self._part = Part.open(
            self._payloads,
            row.id,
            self._name,
            header,
            self.total,
            self.committed,
            self._is_counted,
        )
        try:
            with PositionalFile(self._part.path) as file:
                self._check.replay(file, self._start, self.committed)
        except BaseException:
            self._part.close()
            raise

    def _is_counted(self) -> bool:
        with self._store.database.read() as session:
            return contributions.by_manifest(session, self.manifest_digest) is not None

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

    def is_current(self) -> bool:
        """Whether the row is still where this process left it: no other has gone on with it."""
        with self.lock:
            if self.closed:
                return False
            with self._store.database.read() as session:
                row = session.get(Upload, self.id)
            return self._is_left(row) and self._part.is_there()

    def _is_left(self, row: Upload | None) -> bool:
        left = (self.fence, self.committed)
        return row is not None and (row.fence, row.committed_size) == left

    def take(self) -> int:
        """Become the writer: everybody else's ticket is void. What came is made durable.

        Raises:
            ConflictError: another process has gone on with the upload.
        """
        with self.lock:
            self.flush()
            self._check_open()
            with self.exclusive(), self._store.database.write() as session:
                row = session.get(Upload, self.id, with_for_update=True)
                if row is None or not self._is_left(row) or not self._part.is_there():
                    self.close()
                    raise _ended(self.id)
                row.fence += 1
                self._part.stamp(row.fence)
                self.fence = row.fence
            return self.fence

    def exclusive(self) -> AbstractContextManager[None]:
        """While this is held no other process writes to the file, or commits it."""
        return self._part.locked()

    def write(self, ticket: int, offset: int, data: bytes) -> int:
        """Check and store the next bytes; the new position.

        Raises:
            ConflictError: not where the upload is, with the true offset in `expected`;
                or another stream took over.
            ColdmergeError: the payload is bad: the upload is gone.
        """
        with self.lock:
            self._check_open()
            if ticket != self.fence:
                raise _ended(self.id)
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
                self._store_bytes(data)
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

    def _store_bytes(self, data: bytes) -> None:
        with self.exclusive():
            if not self._part.is_stamped(self.fence):
                raise _ended(self.id)
            self._part.write(data, self.position)

    def flush(self) -> int:
        """Make what came durable and say so in the database; the committed size.

        Raises:
            ConflictError: another process has gone on with the upload.
        """
        with self.lock:
            while not self.closed and self.position > self.committed:
                stop = min(self.position, self.committed + FLUSH_BYTES)
                try:
                    self._part.flush(self.fence, self.committed, stop)
                except OSError:
                    # What was not written may be forgotten by now: a second fsync would
                    # succeed and prove nothing. Opened again, the upload goes on from
                    # what is durable.
                    self.close()
                    raise
                self._move(stop)
            return self.committed

    def _move(self, committed: int) -> None:
        """Compare and set: a process that was left behind must not say what is durable."""
        ours = (Upload.id == self.id, Upload.fence == self.fence)
        moved = update(Upload).where(*ours, Upload.committed_size == self.committed)
        values = {"committed_size": committed, "updated_at": self._clock.now()}
        with self._store.database.write() as session:
            done = session.connection().execute(moved.values(values)).rowcount
        if not done:
            self.close()
            raise _ended(self.id)
        self.committed = committed

    def finish(self) -> float:
        """Make a complete upload durable under its final name: the norm of its vector.

        Call it, and what follows up to the commit, under `exclusive`.

        Raises:
            ConflictError: bytes are missing, or another process has gone on.
            TaskVectorError: the file is not a sound task vector, or a statistic in it is
                wrong; the upload is gone.
        """
        with self.lock:
            self._check_open()
            self.flush()
            self._payloads.give_back(self._name, self._part.path)
            if not self.is_current():
                self.close()
                raise _ended(self.id)
            self._check.check_complete()
            self._part.complete()
            try:
                vector = TaskVector.open(self._part.path)
                norm = self._norm(vector)
                check_stored(vector, self._seed())
            except TaskVectorError:
                self.discard()
                raise
            self._payloads.keep(self._name, self._part.path)
            return norm

    def _check_open(self) -> None:
        if self.closed:
            raise _ended(self.id)

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
            self._payloads.give_back(self._name, self._part.path)

    def discard(self) -> None:
        """Forget the upload: row and bytes; unless another process has gone on with it."""
        with self.lock:
            self.close()
            ours = (Upload.id == self.id, Upload.fence == self.fence)
            with self._store.database.write() as session:
                gone = session.connection().execute(delete(Upload).where(*ours)).rowcount
            if gone:
                forget(self._store, self.id)

    def close(self) -> None:
        """Give the file back. The upload can be opened again."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self._part.close()


def forget(store: Store, upload: str) -> None:
    """Remove the bytes of an upload whose row is gone."""
    if store.payloads.shared:
        store.payloads.part(upload).unlink(missing_ok=True)
    store.payloads.forget(upload)


def _ended(upload: str) -> ConflictError:
    return ConflictError(
        "upload.superseded",
        "Another stream has taken this upload over, or it has ended.",
        hint="Ask for its status and go on from there.",
        upload=upload,
    )
