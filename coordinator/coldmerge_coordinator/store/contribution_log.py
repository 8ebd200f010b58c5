"""What the audit log says about contributions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy.orm import Session

from coldmerge.core.documents import Receipt
from coldmerge_coordinator import audit
from coldmerge_coordinator.store.models import Contribution


def received(
    session: Session,
    row: Contribution,
    replaced: Sequence[Contribution],
    actor: str,
    now: datetime,
) -> None:
    """Log what is durable: the receipt as it was signed, and what it takes the place of."""
    audit.append_receipt(session, Receipt.parse(row.receipt))
    for older in replaced:
        about(session, "contribution.replaced", older, actor, now, by=row.id)


def about(
    session: Session,
    kind: str,
    row: Contribution,
    actor: str,
    now: datetime,
    **detail: audit.Scalar,
) -> None:
    """Log that something happened to a contribution."""
    ids = {
        "model": row.model,
        "round": row.round,
        "contributor": row.contributor,
        "contribution": row.id,
        "manifest": row.manifest_digest,
    }
    audit.append(session, kind, actor, now, ids=ids, detail=detail)
