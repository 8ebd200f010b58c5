"""Taking a contribution back: while its round is open it is removed, and merged nowhere."""

from __future__ import annotations

from coldmerge.core.errors import NotFoundError
from coldmerge.wire.v1 import contributions_pb2
from coldmerge_client import sent_log
from coldmerge_client.prepare import open_round
from coldmerge_client.session import Session


def withdraw(session: Session, model: str) -> contributions_pb2.Contribution:
    """Take our organization's contribution to the open round back; the log says so.

    Raises:
        ConflictError: no round of the model is open: what was sealed stays.
        NotFoundError: we have none in the open round.
    """
    found = open_round(session, model)
    ours = session.contributions(model, found.id)
    admitted = [each for each in ours if each.state == contributions_pb2.Contribution.ADMITTED]
    if not admitted:
        raise NotFoundError(
            "withdraw.nothing_there",
            f"We have no contribution in the open round of {model}.",
            hint="See where it stands with `coldmerge status`.",
            model=model,
            round=found.id,
        )
    taken = session.withdraw(admitted[0].id)
    body = {"model": model, "round": found.id, "contribution": taken.id}
    sent_log.record(session.home, "withdrawal", body, session.clock.now())
    return taken
