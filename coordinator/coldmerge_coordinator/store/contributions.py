"""Contributions: which are admitted, which a sealed round merges."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Manifest
from coldmerge.core.errors import IntegrityError, NotFoundError
from coldmerge_coordinator.store.models import Contribution, Round

ADMITTED, REPLACED, WITHDRAWN = "ADMITTED", "REPLACED", "WITHDRAWN"
QUARANTINED, REFUSED = "QUARANTINED", "REFUSED"
"""Durable and acknowledged, but not merged: until an admin accepts it, or since one refused it."""
WAITING_OR_ADMITTED = (ADMITTED, QUARANTINED)


def get(session: Session, contribution_id: str) -> Contribution:
    """A contribution.

    Raises:
        NotFoundError: there is none of that id.
    """
    row = session.get(Contribution, contribution_id)
    if row is None:
        raise NotFoundError(
            "contribution.unknown",
            f"There is no contribution {contribution_id}.",
            hint="List yours with `coldmerge status`.",
            contribution=contribution_id,
        )
    return row


def admitted(session: Session, round_id: str) -> list[Contribution]:
    """The round's admitted contributions, by manifest digest."""
    return list(
        session.scalars(
            select(Contribution)
            .where(Contribution.round == round_id, Contribution.state == ADMITTED)
            .order_by(Contribution.manifest_digest)
        )
    )


def admitted_of(session: Session, round_id: str, contributor: str) -> Contribution | None:
    """The contributor's admitted contribution to the round, if there is one."""
    return session.scalars(
        select(Contribution).where(
            Contribution.round == round_id,
            Contribution.contributor == contributor,
            Contribution.state == ADMITTED,
        )
    ).one_or_none()


def live_of(session: Session, round_id: str, contributor: str) -> list[Contribution]:
    """The contributor's contributions to the round that count, or wait, oldest first."""
    return list(
        session.scalars(
            select(Contribution)
            .where(
                Contribution.round == round_id,
                Contribution.contributor == contributor,
                Contribution.state.in_(WAITING_OR_ADMITTED),
            )
            .order_by(Contribution.accepted_at, Contribution.id)
        )
    )


def by_manifest(session: Session, manifest_digest: str) -> Contribution | None:
    """The contribution that this manifest became, if it was committed."""
    return session.scalars(
        select(Contribution).where(Contribution.manifest_digest == manifest_digest)
    ).one_or_none()


def of_round(session: Session, round_id: str) -> list[Contribution]:
    """All contributions to the round, whatever became of them, oldest first."""
    return list(
        session.scalars(
            select(Contribution)
            .where(Contribution.round == round_id)
            .order_by(Contribution.accepted_at, Contribution.id)
        )
    )


def kept(row: Round) -> list[str]:
    """Manifest digests of what a sealed round merges: not what its trial leaves out."""
    return sorted(set(row.sealed_inputs or ()) - set(row.left_out or ()))


def sealed(session: Session, row: Round) -> list[Contribution]:
    """What a sealed round merges: its frozen inputs, sorted by manifest digest.

    Without those that the trial at hand leaves out.

    Raises:
        IntegrityError: one of them is gone.
    """
    return of_digests(session, row, kept(row))


def of_digests(session: Session, row: Round, digests: Sequence[str]) -> list[Contribution]:
    """Contributions to a round by their manifest digests, sorted by them.

    Raises:
        IntegrityError: one of them is gone.
    """
    found = {
        item.manifest_digest: item
        for item in of_round(session, row.id)
        if item.manifest_digest in digests
    }
    missing = [digest for digest in digests if digest not in found]
    if missing:
        raise IntegrityError(
            "round.input_missing",
            f"Round {row.id} froze a contribution that the database no longer has.",
            expected=missing[0],
            hint="Restore the database from a backup, or abandon the round.",
            round=row.id,
        )
    return [found[digest] for digest in sorted(digests)]


def get_manifest(row: Contribution) -> Manifest:
    """The manifest, parsed. Its signature was checked when it was admitted."""
    return Manifest.parse(row.manifest)
