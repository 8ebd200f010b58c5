"""What contributors say about candidates: checked, and handed to the gate."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Session

from coldmerge.core.documents import Evaluation, Signed, verify
from coldmerge.core.errors import ManifestError
from coldmerge_coordinator.auth import Caller
from coldmerge_coordinator.store import rounds
from coldmerge_coordinator.store.models import Round
from coldmerge_coordinator.store.releases import Signer


def report(session: Session, who: Caller, signed: Signed, now: datetime, signer: Signer) -> Round:
    """Take a signed, paired evaluation by `who`, and let the gate look again: the round.

    Raises:
        ManifestError: not signed by `who`, for somebody else, or of another candidate.
        NotFoundError: no such round.
        ConflictError: the round is not CANDIDATE.
    """
    evaluation = verify(signed, Evaluation, who.identity)
    row = rounds.get(session, evaluation.round, lock=True)
    for what, expected, got in (
        ("federation", signer.federation, evaluation.federation),
        ("contributor", who.contributor, evaluation.contributor),
        ("model", row.model, evaluation.model),
    ):
        if expected != got:
            raise ManifestError(
                "evaluation.wrong_addressee",
                f"The evaluation names another {what}.",
                expected=expected,
                got=got,
                hint="Run `coldmerge evaluate` on the machine that reports.",
                round=row.id,
            )
    rounds.record_evaluation(session, row, signed, now, signer, actor=who.actor)
    return row
