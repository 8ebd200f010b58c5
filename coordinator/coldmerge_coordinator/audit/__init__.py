"""The audit log: what was decided, appended in the transaction that decided it.

`append` takes an entry at any point of a write transaction. All entries of a transaction
are stored as its last act, under the lock of the log's head: that lock is always the last
one taken and held for a moment, so appending can neither deadlock nor hold others up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.audit_log import PUBLISHED, RECEIVED
from coldmerge.core.documents import Document, Receipt, ReleaseRecord
from coldmerge.core.errors import IntegrityError
from coldmerge.core.evidence import MAX_TEXT, AuditEntry
from coldmerge.core.merkle import Frontier, Subtree, leaf_hash
from coldmerge_coordinator.actors import COORDINATOR
from coldmerge_coordinator.store.database import before_commit
from coldmerge_coordinator.store.models import AuditHead, AuditLeaf, AuditNode, Release

Scalar = str | int | float | bool | None
BEGUN = "log.begun"
_HEAD = 1
_PENDING = "coldmerge_audit"


@dataclass(frozen=True)
class _Pending:
    """An entry without its position, or a document that is a leaf itself."""

    kind: str
    actor: str
    at: datetime
    ids: dict[str, str]
    detail: dict[str, Scalar]
    document: bytes | None = None

    def render(self, federation: str, position: int) -> bytes:
        if self.document is not None:
            return self.document
        entry = AuditEntry(
            federation=federation,
            position=position,
            at=self.at,
            kind=self.kind,
            actor=self.actor,
            ids=self.ids,
            detail=self.detail,
        )
        return entry.canonical()


def append(
    session: Session,
    kind: str,
    actor: str,
    now: datetime,
    *,
    ids: Mapping[str, object] | None = None,
    detail: Mapping[str, Scalar] | None = None,
) -> None:
    """Log an event in the transaction of `session`: stored if, and only if, that commits.

    Args:
        session: a write transaction (`Database.write`).
        kind: `<noun>.<event>`, such as `round.sealed`.
        actor: `Caller.actor`, or `actors.COORDINATOR`.
        now: when it was decided.
        ids: what it is about. `contributor` and `round` can be searched for. What is None
            is left out.
        detail: numbers, digests, reasons. Texts are cut at `evidence.MAX_TEXT` characters.
    """
    known = {key: str(value)[:128] for key, value in (ids or {}).items() if value is not None}
    short = {key: _short(value) for key, value in (detail or {}).items()}
    _queue(session).append(_Pending(kind, actor, now, known, short))


def append_record(session: Session, record: ReleaseRecord) -> None:
    """Log a publication: the record itself is the leaf, so that its holder can ask for a proof."""
    ids = {} if record.round is None else {"round": record.round}
    _append_document(session, PUBLISHED, record, record.created_at, ids)


def append_receipt(session: Session, receipt: Receipt) -> None:
    """Log a contribution that is durable: the receipt itself is the leaf, so that its holder can
    ask for a proof. Whether it counts, or waits in quarantine, is not in a receipt.
    """
    ids = {"contributor": receipt.contributor, "round": receipt.round}
    _append_document(session, RECEIVED, receipt, receipt.accepted_at, ids)


def _append_document(
    session: Session, kind: str, document: Document, at: datetime, ids: dict[str, str]
) -> None:
    _queue(session).append(_Pending(kind, COORDINATOR, at, ids, {}, document.canonical()))


def _short(value: Scalar) -> Scalar:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[: MAX_TEXT - 1] + "…"
    return value


def _queue(session: Session) -> list[_Pending]:
    if _PENDING not in session.info:
        session.info[_PENDING] = []
        before_commit(session, _store)
    found: list[_Pending] = session.info[_PENDING]
    return found


def _store(session: Session) -> None:
    """Give the transaction's entries their positions and write them down."""
    pending: list[_Pending] = session.info.pop(_PENDING, [])
    session.flush()
    _write(session, _locked_head(session), pending, pending[0].at)


def _write(session: Session, head: AuditHead, pending: list[_Pending], at: datetime) -> None:
    if head.size == 0:
        pending = [*_beginning(session, pending, at), *pending]
    tree = Frontier.of(head.size, subtree_of(session))
    for item in pending:
        document = item.render(session.info["federation"], tree.size)
        session.add(
            AuditLeaf(
                position=tree.size,
                kind=item.kind,
                contributor=item.ids.get("contributor"),
                round=item.ids.get("round"),
                at=item.at,
                document=document,
            )
        )
        for level, index, node in tree.append(leaf_hash(document)):
            session.add(AuditNode(level=level, index=index, hash=node))
    head.size = tree.size
    session.flush()


def begun_head(session: Session, now: datetime) -> AuditHead:
    """The log's head, locked until this transaction ends; an empty log begins at `now`.

    Raises:
        IntegrityError: the database has lost it.
    """
    head = _locked_head(session)
    if head.size == 0:
        _write(session, head, [], now)
    return head


def _locked_head(session: Session) -> AuditHead:
    """The log's head; nobody else appends until this transaction ends.

    Raises:
        IntegrityError: the database has none: somebody deleted it.
    """
    query = select(AuditHead).where(AuditHead.id == _HEAD).with_for_update()
    head = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if head is None:
        raise IntegrityError(
            "audit.no_head",
            "The audit log of this coordinator has lost its head.",
            hint="Restore the database from a backup; `coldmerge audit verify` looks at it.",
        )
    return head


def subtree_of(session: Session) -> Subtree:
    """Reads the hashes of the log's complete subtrees.

    Raises:
        IntegrityError: one is missing.
    """

    def read(level: int, index: int) -> bytes:
        node = session.get(AuditNode, (level, index))
        if node is None:
            raise IntegrityError(
                "audit.no_node",
                "The audit log of this coordinator has a hole.",
                got=f"no hash of subtree {index} at level {level}",
                hint="Restore the database from a backup; `coldmerge audit verify` looks at it.",
            )
        return node.hash

    return read


def _beginning(session: Session, pending: Sequence[_Pending], at: datetime) -> list[_Pending]:
    """What an empty log starts with: that it begins, and the records of releases before it."""
    fresh = {item.document for item in pending}
    query = select(Release).order_by(Release.published_at, Release.model, Release.number)
    older = [row for row in session.scalars(query) if row.record not in fresh]
    found = [_Pending(BEGUN, COORDINATOR, at, {}, {"releases": len(older)})]
    for row in older:
        record = ReleaseRecord.parse(row.record)
        ids = {} if record.round is None else {"round": record.round}
        found.append(_Pending(PUBLISHED, COORDINATOR, row.published_at, ids, {}, row.record))
    return found
