"""Taking a contribution back: before its round seals, and after it has ended."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Session

from coldmerge.core.errors import ConflictError
from coldmerge.rounds.state import State, Withdrawn
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.service.rules import not_yours
from coldmerge_coordinator.store import (
    Store,
    contribution_log,
    contributions,
    releases,
    rounds,
)
from coldmerge_coordinator.store.models import Contribution, Round

_DURABLE = (contributions.ADMITTED, contributions.QUARANTINED, contributions.REFUSED)


def withdraw(store: Store, who: Caller, identifier: str, now: datetime) -> Contribution:
    """Mark the caller's contribution as withdrawn; its bytes are erased by who calls this.

    Before its round seals it is merged nowhere. After the round has ended, releases keep what
    was merged, until an admin merges again without it: `reason` says so.

    Raises:
        NotFoundError: the caller has no such contribution.
        ConflictError: a round that merges it is going on.
    """
    with store.database.write() as session:
        row = session.get(Contribution, identifier)
        if row is None or row.contributor != who.contributor:
            raise not_yours(identifier)
        round_ = rounds.get(session, row.round, lock=True)
        releases.get_model(session, row.model, lock=True)  # no re-merge begins meanwhile
        session.refresh(row)  # nobody replaces it while its round is locked
        if row.state not in _DURABLE:
            return row
        _check_idle(row, rounds.active_round(session, row.model))
        admitted, row.state = row.state == contributions.ADMITTED, contributions.WITHDRAWN
        row.payload_erased_at = now
        if round_.state != State.OPEN:
            row.reason = _where(session, row)
        session.flush()
        said = {"reason": row.reason} if row.reason else {}
        contribution_log.about(session, "contribution.withdrawn", row, who.actor, now, **said)
        if admitted and round_.state == State.OPEN:
            rounds.apply(session, round_, Withdrawn(), now, store.signer, actor=who.actor)
        return row


def _check_idle(row: Contribution, active: Round | None) -> None:
    if active is None or row.manifest_digest not in (active.sealed_inputs or ()):
        return
    raise ConflictError(
        "round.wrong_state",
        f"No contribution can be taken back while round {active.id} merges it.",
        expected="a round that is OPEN, or has ended",
        got=active.state,
        hint="Ask again when the round has ended; until then only an admin can abandon it.",
        contribution=row.id,
        round=active.id,
    )


def _where(session: Session, row: Contribution) -> str:
    """Which releases keep what was merged."""
    numbers = [
        release.number
        for release in releases.list_releases(session, row.model)
        if row.manifest_digest in releases.get_record(release).contributions
    ]
    if not numbers:
        return "withdrawn; it is in no release"
    return (
        f"withdrawn; its update stays in release {numbers[0]} and those made from it "
        "until an admin re-merges without it"
    )
