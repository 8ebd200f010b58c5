"""The audit log as others see it: signed checkpoints, and proofs against them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Signed
from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.core.evidence import AuditCheckpoint, Latest
from coldmerge.core.merkle import Frontier, consistency_proof, inclusion_proof
from coldmerge_coordinator import audit
from coldmerge_coordinator.store import Store, keys, models
from coldmerge_coordinator.store.models import AuditHead, AuditLeaf, AuditNode, Release
from coldmerge_coordinator.store.releases import Signer, get_record

FRESH = timedelta(minutes=1)
"""How old a stored checkpoint may be to be handed out again."""


@dataclass(frozen=True)
class Included:
    """Where a leaf is, and the proof of it."""

    position: int
    proof: list[bytes]


def current(store: Store, now: datetime) -> Signed:
    """A checkpoint of the log as it is now, issued within the last minute."""
    with store.database.read() as session:
        size = session.scalar(select(AuditHead.size)) or 0
        found = _fresh(session, size, now)
    if found is not None:
        return found
    with store.database.write() as session:
        return checkpoint(session, store.signer, now, store.config.audit.checkpoint_lifetime)


def _fresh(session: Session, size: int, now: datetime) -> Signed | None:
    row = session.get(models.AuditCheckpoint, size)
    if row is None or not row.created_at <= now < row.created_at + FRESH:
        return None
    return Signed(row.document, row.signature)


def checkpoint(session: Session, signer: Signer, now: datetime, lifetime: timedelta) -> Signed:
    """Sign the log's head, in a write transaction; one per size is kept, the newest.

    The head is locked first: a release that is not in the log yet is not in it either.
    """
    head = audit.begun_head(session, now)
    signed = signer.sign(
        AuditCheckpoint(
            federation=signer.federation,
            size=head.size,
            root=Frontier.of(head.size, audit.subtree_of(session)).root().hex(),
            releases=_latest(session),
            key=keys.number_of(session, signer),
            issued_at=now,
            expires_at=now + lifetime,
        )
    )
    session.merge(
        models.AuditCheckpoint(
            size=head.size,
            document=signed.document,
            signature=signed.signature,
            created_at=now,
        )
    )
    return signed


def _latest(session: Session) -> dict[str, Latest]:
    newest = select(Release.model, func.max(Release.number)).group_by(Release.model)
    found = {}
    for model, number in session.execute(newest).all():
        record = get_record(session.get_one(Release, (model, number)))
        found[model] = Latest(number=number, record_digest=record.digest())
    return dict(sorted(found.items()))


def consistency(session: Session, first: int, second: int) -> list[bytes]:
    """The proof that the log of `second` entries begins with that of `first`.

    Raises:
        ConflictError: the log has fewer entries than `first`.
    """
    if not 0 <= first <= second:
        raise ConflictError(
            "audit.shorter",
            "The audit log is shorter than the one that the caller knows.",
            expected=f"at least {first} entries",
            got=second,
            hint="The coordinator may have been set back to a backup: ask its admin.",
        )
    return consistency_proof(first, second, audit.subtree_of(session))


def inclusion(session: Session, leaf: bytes, size: int) -> Included:
    """The proof that the log of `size` entries holds the leaf of that hash.

    Raises:
        NotFoundError: it does not.
    """
    held = session.scalar(select(AuditHead.size)) or 0
    at = select(func.min(AuditNode.index)).where(AuditNode.level == 0, AuditNode.hash == leaf)
    position = session.scalar(at)
    if position is None or not position < size <= held:
        raise NotFoundError(
            "audit.not_included",
            "The audit log holds no such entry.",
            expected=f"a leaf of the first {min(max(size, 0), held)}",
            got=leaf.hex()[:64],
            hint="Fetch a newer checkpoint; if it stays so, ask the coordinator's admin why.",
        )
    return Included(position, inclusion_proof(position, size, audit.subtree_of(session)))


def entries(session: Session, start: int = 0, limit: int = 0) -> Iterator[tuple[int, bytes]]:
    """(position, document) of the log's entries from `start` on; `limit` 0: all there are."""
    query = (
        select(AuditLeaf.position, AuditLeaf.document)
        .where(AuditLeaf.position >= start)
        .order_by(AuditLeaf.position)
    )
    rows = session.execute(query.limit(limit) if limit > 0 else query)
    for row in rows.yield_per(500):
        yield row.position, row.document
