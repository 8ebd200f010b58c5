"""What the audit log says about rounds: one place, called by `rounds.apply`."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Session

from coldmerge.core.documents import Evaluation
from coldmerge.core.merkle import merkle_root
from coldmerge.rounds import state
from coldmerge.rounds.state import Event, RoundView, State
from coldmerge_coordinator import audit
from coldmerge_coordinator.audit import Scalar
from coldmerge_coordinator.store import learned
from coldmerge_coordinator.store.models import Round

_STATES = {
    State.SEALED: "round.sealed",
    State.PUBLISHED: "round.published",
    State.REJECTED: "round.rejected",
    State.ABANDONED: "round.abandoned",
}
_EVENTS: dict[type, str] = {
    state.Extend: "round.extended",
    state.MergeStarted: "round.merge_started",
    state.MergeDone: "round.merged",
    state.MergeFailed: "round.merge_failed",
    state.Resolve: "round.resolved",
}
_VERDICTS = {
    State.PUBLISHED: "publish",
    State.REJECTED: "reject",
    State.SEALED: "isolate",
}
_BY_THE_GATE = (state.Tick, state.Evaluated)


def opened(session: Session, row: Round, now: datetime, actor: str) -> None:
    """Log that a round opens, with the policy that is frozen into it."""
    policy: dict[str, Scalar] = {"merge": str(row.policy.get("merge", {}).get("method", ""))}
    policy["gated"] = row.policy.get("gate") is not None
    detail = {**policy, "base_number": row.base_number, "probe_seed": row.probe_seed}
    audit.append(session, "round.opened", actor, now, ids=_ids(row), detail=detail)


def moved(
    session: Session, row: Round, before: RoundView, event: Event, now: datetime, actor: str
) -> None:
    """Log what `event` made of the round: `row` is as it is now, `before` as it was."""
    for kind in _kinds(row, before, event):
        detail = _detail(row, kind)
        if isinstance(event, state.MergeFailed):
            detail["attempt"] = row.merge_attempts
        audit.append(session, kind, actor, now, ids=_ids(row), detail=detail)


def evaluated(
    session: Session, row: Round, evaluation: Evaluation, now: datetime, actor: str
) -> None:
    """Log a contributor's judgement of the candidate, by digest: its scores stay out."""
    ids = {**_ids(row), "contributor": evaluation.contributor, "evaluation": evaluation.digest()}
    detail: dict[str, Scalar] = {"trial": row.trial} if row.trial else {}
    audit.append(session, "evaluation.reported", actor, now, ids=ids, detail=detail)


def _kinds(row: Round, before: RoundView, event: Event) -> list[str]:
    changed, now = row.state != before.state, State(row.state)
    found = [_EVENTS[type(event)]] if type(event) in _EVENTS else []
    judged = before.state is State.CANDIDATE and isinstance(event, _BY_THE_GATE)
    if judged and not before.probing and (changed or row.held != before.held):
        found.append("gate.decided")
    if isinstance(event, state.Tick) and not changed and row.closes_at != before.closes_at:
        found.append("round.extended")
    retried = now is State.SEALED and before.state is State.MERGING
    if changed and now is State.SEALED and before.state is State.CANDIDATE:
        found.append("round.probed" if before.probing else "round.trial_started")
    elif changed and now in _STATES and not retried:
        found.append(_STATES[now])
    return found


def _ids(row: Round) -> dict[str, object]:
    return {"model": row.model, "round": row.id, "candidate": row.candidate_digest}


def _detail(row: Round, kind: str) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    if row.trial:
        found |= {"trial": row.trial, "left_out": len(row.left_out or ())}
    if kind == "round.probed":
        found["search"] = learned.digest(row)
    if row.sealed_inputs is not None:
        found["inputs"] = len(row.sealed_inputs)
        found["inputs_root"] = merkle_root(bytes.fromhex(one) for one in row.sealed_inputs)
    if kind in {"round.merged", "round.published"}:
        found["master"] = row.candidate_master
    if kind == "round.published":
        found["release"] = row.release_number
    if kind == "gate.decided":
        found["verdict"] = "held" if row.held else _VERDICTS.get(State(row.state), row.state)
    if row.reason is not None:
        found["reason"] = row.reason
    return found
