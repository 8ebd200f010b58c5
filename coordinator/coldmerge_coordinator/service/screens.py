"""Screening at the door: whether a complete contribution counts at once, or waits for an admin."""

from __future__ import annotations

import re
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Manifest
from coldmerge.core.errors import TaskVectorError
from coldmerge.screening.bounds import outside
from coldmerge.screening.duplicates import repeated_tensor, shared_tensor
from coldmerge_coordinator.store import (
    continuous,
    contribution_log,
    contributions,
    notices,
    rounds,
)
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
        why = _sent_before(session, row, manifest)
    return why


def _sent_before(session: Session, row: Round, manifest: Manifest) -> str | None:
    """Which tensor another contributor has sent, or this one to a round that merged it.

    A continuous round looks at the rounds, too, on the releases that it admits as bases: what
    was trained on those may have been sent there, and would count twice.
    """
    twins = _possible_twins(session, row, manifest)
    found = shared_tensor(manifest, [twin for twin, _ in twins])
    if found is not None:
        return f"its tensor {found[0]} has the bytes that {found[1]} sent"
    again = repeated_tensor(manifest, [twin for twin, merged in twins if merged])
    if again is not None:
        return f"its tensor {again[0]} was merged in round {again[1].round} already"
    return None


def told(row: Contribution) -> str:
    """Its reason as its contributor may read it: who else takes part is not told to all."""
    return _COPIED.sub(r"\1another organization\2", row.reason or "")


def _possible_twins(
    session: Session, row: Round, manifest: Manifest
) -> list[tuple[Manifest, bool]]:
    """Manifests that name one of the same hashes, and whether the base holds them; few are parsed.

    Those of the others in the round; if it is continuous, of everybody in the rounds since the
    oldest release it admits as a base.
    """
    mine = {entry.sha256.encode() for entry in manifest.tensors}
    query = (
        select(Contribution)
        .join(Round, Round.id == Contribution.round)
        .where(Contribution.state.in_(contributions.WAITING_OR_ADMITTED))
    )
    if rounds.get_policy(row).continuous is None:
        query = query.where(Contribution.round == row.id)
    else:
        oldest = min(base.number for base in continuous.bases_of(session, row))
        query = query.where(Contribution.model == row.model, Round.base_number >= oldest)
    merged = continuous.merged_into(session, row)
    return [
        (Manifest.parse(item.manifest), item.manifest_digest in merged)
        for item in session.scalars(query)
        if not mine.isdisjoint(_SHA256.findall(item.manifest))
    ]


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
