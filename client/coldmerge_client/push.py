"""Sending: ask, log, upload from where it broke off, keep the signed receipt.

Nothing is sent before the allow-list, the owner's policy and (when asked for) a person
have agreed, and a line in the sent log is durable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from coldmerge.core.documents import Receipt, Signed
from coldmerge.core.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from coldmerge.core.files import PositionalFile
from coldmerge.core.progress import Progress, silent
from coldmerge.core.task_vector import TaskVector
from coldmerge.wire.channel import CHUNK_BYTES
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import common_pb2, contributions_pb2
from coldmerge_client import sent_log
from coldmerge_client.bases import open_round
from coldmerge_client.files import exclusive
from coldmerge_client.outbox import Outbox, OutboxEntry
from coldmerge_client.policy import SendPolicy
from coldmerge_client.prepare import Facts, Leaving, check_policy, describe, prepare
from coldmerge_client.session import Session

_MAX_STALLED = 5
_MOVED = frozenset({"upload.lost", "upload.superseded", "upload.unknown", "upload.wrong_offset"})

Approve = Callable[[Leaving], bool]
"""Shown exactly what would leave; False keeps it home."""


def send(
    session: Session,
    entry: OutboxEntry,
    *,
    policy: SendPolicy | None = None,
    approve: Approve | None = None,
    progress: Progress = silent,
) -> OutboxEntry:
    """Upload an entry, from where an earlier attempt broke off, and keep the receipt.

    Raises:
        PermissionDeniedError: the policy asks for approval and it was not given.
        ConflictError: the round does not take it any more.
        UnavailableError: nothing moved for the session's timeout; send again later.
        IntegrityError: the receipt is not for this contribution.
    """
    outbox = Outbox(session.home)
    policy = policy or SendPolicy.load(session.home.policy)
    with exclusive(session.home.lock(f"send-{entry.id}"), "sending", wait=False):
        entry = outbox.get(entry.id)
        if entry.state == "sent":
            return entry
        _check_pending(entry)
        check_policy(entry.manifest, policy)
        entry = _approved(outbox, entry, policy, approve)
        entry = _logged(session, outbox, entry)
        signed = _upload(session, entry, progress)
        receipt = _checked_receipt(session, entry, signed)
        entry = outbox.acknowledge(entry, signed, receipt)
        sent_log.record(
            session.home,
            "receipt",
            {"manifest": receipt.manifest_digest, "contribution": receipt.contribution},
            session.clock.now(),
        )
        return entry


def _check_pending(entry: OutboxEntry) -> None:
    if not entry.pending or not entry.payload.exists():
        raise ConflictError(
            "push.nothing_to_send",
            "The contribution is not in the outbox any more.",
            got=entry.reason or entry.state,
            hint="Push the fine-tune again.",
            entry=entry.id,
        )


def _approved(
    outbox: Outbox, entry: OutboxEntry, policy: SendPolicy, approve: Approve | None
) -> OutboxEntry:
    if not policy.require_approval or entry.approved:
        return entry
    if approve is None or not approve(describe(entry)):
        raise PermissionDeniedError(
            "push.not_approved",
            "The contribution was not approved: nothing left this machine.",
            hint="Look at it with `coldmerge push --dry-run`; it stays in the outbox.",
            entry=entry.id,
            round=entry.manifest.round,
        )
    return outbox.mark(entry, approved=True)


def _logged(session: Session, outbox: Outbox, entry: OutboxEntry) -> OutboxEntry:
    """The line that says it left, before it leaves; once, however often it is resumed."""
    if entry.logged:
        return entry
    manifest = entry.manifest
    sent_log.record(
        session.home,
        "contribution",
        {
            "manifest": manifest.digest(),
            "model": manifest.model,
            "round": manifest.round,
            "base_digest": manifest.base_digest,
            "tensors": len(manifest.tensors),
            "payload_bytes": manifest.payload_bytes,
            "norm": manifest.norm,
            "statistics": manifest.statistics,
            "examples": manifest.examples,
            "metrics": manifest.metrics,
            "training": manifest.training,
        },
        session.clock.now(),
    )
    return outbox.mark(entry, logged=True, state="sending")


def _upload(session: Session, entry: OutboxEntry, progress: Progress) -> Signed:
    """Until the receipt is there. The coordinator says where to go on.

    `begin` waits for a coordinator that is away; a link that breaks again and again
    without a byte becoming durable in between ends it too.
    """
    furthest, stalled = -1, 0
    while True:
        begun = session.begin(entry.signed)
        if begun.receipt.document:
            return signed_from_proto(begun.receipt)
        stalled = 0 if begun.committed_size > furthest else stalled + 1
        furthest = max(furthest, begun.committed_size)
        try:
            left = begun.total_size - begun.committed_size
            if left:
                session.write(_chunks(entry, begun, progress), left)
            return signed_from_proto(session.commit(begun.upload_id))
        except (UnavailableError, ConflictError, NotFoundError) as error:
            moved = isinstance(error, UnavailableError) or error.code in _MOVED
            if not moved or stalled >= _MAX_STALLED:
                raise
            time.sleep(0.2 * 2**stalled)


def _chunks(
    entry: OutboxEntry, begun: contributions_pb2.BeginResponse, progress: Progress
) -> Iterator[contributions_pb2.WriteRequest]:
    vector = TaskVector.open(entry.payload)
    file = PositionalFile(entry.payload)
    total = begun.total_size
    progress("upload", begun.committed_size, total)
    for offset in range(begun.committed_size, total, CHUNK_BYTES):
        stop = min(offset + CHUNK_BYTES, total)
        data = bytes(file.read(vector.payload_start + offset, vector.payload_start + stop))
        yield contributions_pb2.WriteRequest(
            upload_id=begun.upload_id, chunk=common_pb2.Chunk(offset=offset, data=data)
        )
        progress("upload", stop, total)


def _checked_receipt(session: Session, entry: OutboxEntry, signed: Signed) -> Receipt:
    receipt = session.verify(signed, Receipt)
    manifest = entry.manifest
    said = (receipt.federation, receipt.round, receipt.contributor, receipt.manifest_digest)
    sent = (manifest.federation, manifest.round, manifest.contributor, manifest.digest())
    if said != sent or receipt.payload_bytes != manifest.payload_bytes:
        raise IntegrityError(
            "push.wrong_receipt",
            "The coordinator's receipt is for another contribution.",
            expected=f"manifest {manifest.digest()}, {manifest.payload_bytes} bytes",
            got=f"manifest {receipt.manifest_digest}, {receipt.payload_bytes} bytes",
            hint="Ask the coordinator's admin; the contribution stays in the outbox.",
            entry=entry.id,
        )
    return receipt


def push(
    session: Session,
    model: str,
    tuned: Path,
    facts: Facts,
    *,
    base: int | None = None,
    policy: SendPolicy | None = None,
    approve: Approve | None = None,
    progress: Progress = silent,
) -> OutboxEntry:
    """Ship a fine-tune that exists to the open round: `prepare`, then `send`.

    `base` is the release that it was trained on; by default the round's.
    """
    round_ = open_round(session, model, base)
    entry = prepare(session, round_, tuned, facts, base=base, policy=policy, progress=progress)
    return send(session, entry, policy=policy, approve=approve, progress=progress)
