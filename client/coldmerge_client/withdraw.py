"""Taking a contribution back: before its round seals, or after the round has ended."""

from __future__ import annotations

from coldmerge.core.errors import NotFoundError
from coldmerge.wire.v1 import contributions_pb2
from coldmerge_client import sent_log
from coldmerge_client.bases import open_round
from coldmerge_client.session import Session


def withdraw(
    session: Session, model: str, contribution: str | None = None
) -> contributions_pb2.Contribution:
    """Take a contribution of our organization back; the log says so.

    Without its id: the one to the open round. With it also one whose round has ended: its bytes
    are erased at the coordinator, and releases keep its update until an admin re-merges.

    Raises:
        ConflictError: no round of the model is open, or a round merges the contribution now.
        NotFoundError: we have none in the open round, or none of that id.
    """
    if contribution is not None:
        return _noted(session, session.withdraw(contribution))
    found = open_round(session, model)
    ours = session.contributions(model, found.id)
    states = {contributions_pb2.Contribution.ADMITTED, contributions_pb2.Contribution.QUARANTINED}
    there = [each for each in ours if each.state in states]
    if not there:
        raise NotFoundError(
            "withdraw.nothing_there",
            f"We have no contribution in the open round of {model}.",
            hint="See where it stands with `coldmerge status`.",
            model=model,
            round=found.id,
        )
    return _noted(session, session.withdraw(there[0].id))


def _noted(
    session: Session, taken: contributions_pb2.Contribution
) -> contributions_pb2.Contribution:
    body = {"model": taken.model, "round": taken.round, "contribution": taken.id}
    sent_log.record(session.home, "withdrawal", body, session.clock.now())
    return taken
