"""Screening at the door: whether a complete contribution counts at once, or waits for an admin."""

from __future__ import annotations

import re
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Manifest
from coldmerge.core.errors import TaskVectorError
from coldmerge.screening.bounds import outside
from coldmerge.screening.duplicates import shared_tensor
from coldmerge_coordinator.store import contribution_log, contributions, notices, rounds
from coldmerge_coordinator.store.models import Contribution, Round

_COPIED = re.compile(r"(has the bytes that )\S+( sent)$")
_SHA256 = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def reason_to_wait(session: Session, row: Round, manifest: Manifest, norm: float) -> str | None:
    """Why a contribution is quarantined; None: it counts.

    Raises:
        TaskVectorError: the round refuses such norms.
    """
    policy = rounds.get_policy(row).screening
    reference: float | None = (row.screening or {}).get("reference_norm")
    why = outside(norm, reference, policy)
    if why is not None and policy.on_outlier == "refuse":
        raise TaskVectorError(
            "contribution.outside_band",
            f"The round does not take this contribution: {why}.",
            expected=f"a norm of {policy.smallest:g} to {policy.largest:g} times {reference:g}",
            got=norm,
            hint="Check learning rate and base release, train again, and push.",
            round=row.id,
        )
    if why is None and policy.duplicates == "quarantine":
        found = shared_tensor(manifest, _possible_twins(session, manifest))
        if found is not None:
            why = f"its tensor {found[0]} has the bytes that {found[1]} sent"
    return why


def told(row: Contribution) -> str:
    """Its reason as its contributor may read it: who else takes part is not told to all."""
    return _COPIED.sub(r"\1another organization\2", row.reason or "")


def _possible_twins(session: Session, manifest: Manifest) -> list[Manifest]:
    """Manifests of others in the round that name one of the same hashes: few are parsed."""
    mine = {entry.sha256.encode() for entry in manifest.tensors}
    others = session.scalars(
        select(Contribution.manifest).where(
            Contribution.round == manifest.round,
            Contribution.contributor != manifest.contributor,
            Contribution.state.in_(contributions.WAITING_OR_ADMITTED),
        )
    )
    return [Manifest.parse(raw) for raw in others if not mine.isdisjoint(_SHA256.findall(raw))]


def quarantine(
    session: Session, round_: Round, row: Contribution, why: str, actor: str, now: datetime
) -> None:
    """Let a contribution wait: say so in the log, and to the admins by the webhook."""
    row.state, row.reason = contributions.QUARANTINED, why
    contribution_log.about(session, "contribution.quarantined", row, actor, now, reason=why)
    text = f"the contribution of {row.contributor} waits for a decision: {why}"
    federation = contributions.get_manifest(row).federation
    body = notices.about_round(round_, "contribution.quarantined", text, federation)
    body |= {"contributor": row.contributor, "contribution": row.id}
    notices.insert(session, rounds.get_policy(round_).webhook, body, now)
