"""The rules of a round that admission asks the database about."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.documents import Manifest
from coldmerge.core.errors import (
    ConflictError,
    ManifestError,
    NotFoundError,
    PermissionDeniedError,
)
from coldmerge.rounds.state import State
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.store import contributions, rounds
from coldmerge_coordinator.store.models import Contribution, Round, Upload


def own(session: Session, identifier: str, who: Caller) -> Contribution:
    """A contribution, if it is the caller's, or if the caller sees all.

    Raises:
        NotFoundError: it is somebody else's, or there is none: the same answer.
    """
    row = session.get(Contribution, identifier)
    if row is not None and (row.contributor == who.contributor or who.sees_all):
        return row
    raise not_yours(identifier)


def not_yours(identifier: str) -> NotFoundError:
    """The error for a contribution that the caller does not have."""
    return NotFoundError(
        "contribution.not_yours",
        "You have no such contribution.",
        got=identifier[:80],
        hint="List yours with `coldmerge status`.",
    )


def check_open(row: Round) -> None:
    """Refuse what only an OPEN round takes.

    Raises:
        ConflictError: the round has been sealed, or has ended.
    """
    if row.state != State.OPEN:
        raise ConflictError(
            "round.not_open",
            f"Round {row.id} of {row.model} no longer takes contributions.",
            expected=State.OPEN,
            got=row.state,
            hint="Wait for the next round (`coldmerge watch`), pull its release and train again.",
            round=row.id,
            model=row.model,
        )


def check_asked(row: Round, contributor: str) -> None:
    """Refuse whom the round does not ask.

    Raises:
        PermissionDeniedError: its policy names others.
    """
    if not rounds.get_policy(row).asks(contributor):
        raise PermissionDeniedError(
            "round.not_asked",
            f"Round {row.id} of {row.model} is for other contributors.",
            got=contributor,
            hint="Wait for the next round (`coldmerge watch`); nothing was taken.",
            round=row.id,
            model=row.model,
        )


def check_second(session: Session, row: Round, contributor: str) -> list[Contribution]:
    """The contributions that another one of the same contributor would replace.

    Raises:
        ConflictError: the round's policy refuses a second one.
    """
    older = contributions.live_of(session, row.id, contributor)
    if older and rounds.get_policy(row).second_contribution == "refuse":
        raise ConflictError(
            "contribution.second",
            f"{contributor} has contributed to round {row.id} already.",
            expected="one contribution per organization",
            got=f"{older[0].id}, accepted {older[0].accepted_at.isoformat()}",
            hint="Take that one back with `coldmerge withdraw`, or wait for the next round.",
            round=row.id,
        )
    return older


def check_nonce(session: Session, manifest: Manifest) -> None:
    """Refuse a nonce that another manifest of the round has used.

    Raises:
        ManifestError: it was used.
    """
    used = session.scalars(
        select(Contribution.id).where(
            Contribution.contributor == manifest.contributor,
            Contribution.round == manifest.round,
            Contribution.nonce == manifest.nonce,
        )
    ).first()
    begun = session.scalars(
        select(Upload).where(
            Upload.contributor == manifest.contributor, Upload.round == manifest.round
        )
    )
    if used is None and not any(
        Manifest.parse(row.manifest).nonce == manifest.nonce for row in begun
    ):
        return
    raise replayed(manifest, "was used by another manifest")


def replayed(manifest: Manifest, what: str) -> ManifestError:
    """The error for a nonce that may not be used again."""
    return ManifestError(
        "manifest.replayed",
        f"The nonce of this manifest {what}.",
        expected="a nonce that was never used in this round",
        got=manifest.nonce,
        hint="Prepare the contribution again with `coldmerge push`: it draws a new one.",
        round=manifest.round,
    )


def unknown(identifier: str) -> NotFoundError:
    """The error for an upload that the caller does not have."""
    return NotFoundError(
        "upload.unknown",
        "There is no such upload.",
        got=identifier[:80],
        hint="Begin again: `coldmerge push` does so by itself.",
    )
