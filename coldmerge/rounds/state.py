"""The life of a round: one pure function from (round, event, now) to (round', effects).

    OPEN → SEALED → MERGING → CANDIDATE → PUBLISHED | REJECTED

and ABANDONED from any state before the last two. A rejected candidate may send the round back
to SEALED, to try one without some of the inputs: see `coldmerge.rounds.judging`. Before that a
candidate may be a probe, that sends it back as soon as it is measured: `coldmerge.rounds.learning`.

The database applies what comes out by compare-and-set, so two processes that see the same
round cannot both move it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from coldmerge.core.errors import ConflictError
from coldmerge.rounds.judging import judge, tried
from coldmerge.rounds.learning import give_up
from coldmerge.rounds.policy import RoundPolicy, format_duration
from coldmerge.rounds.view import (
    Effect,
    FreezeInputs,
    Notify,
    Outcome,
    Publish,
    RoundView,
    State,
    abandoned,
    published,
    rejected,
)

__all__ = [
    "MAX_MERGE_ATTEMPTS",
    "Abandon",
    "Contributed",
    "Effect",
    "Evaluated",
    "Event",
    "Extend",
    "FreezeInputs",
    "MergeDone",
    "MergeFailed",
    "MergeStarted",
    "Notify",
    "Outcome",
    "Publish",
    "Resolve",
    "RoundView",
    "Seal",
    "State",
    "Tick",
    "Withdrawn",
    "open_view",
    "transition",
]

MAX_MERGE_ATTEMPTS = 3


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Contributed:
    """A contribution was admitted: `view.contributors` already has it."""


@dataclass(frozen=True)
class Withdrawn:
    """A contribution was taken back: `view.contributors` no longer has it."""


@dataclass(frozen=True)
class Seal:
    """An admin closes admissions now, even below the quorum."""


@dataclass(frozen=True)
class Abandon:
    """An admin ends the round without a release."""

    reason: str


@dataclass(frozen=True)
class Extend:
    """An admin moves the deadline the round is waiting for."""

    by: timedelta


@dataclass(frozen=True)
class MergeStarted:
    """A worker took the round, for the first time or after a crash."""


@dataclass(frozen=True)
class MergeDone:
    """The candidate is durable: digests of its content, fp32 master and outer optimizer's state.

    `note` is what an admin should know of the merge.
    """

    candidate_digest: str
    candidate_master: str
    candidate_state: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class MergeFailed:
    """The worker met an error; a merge is tried `MAX_MERGE_ATTEMPTS` times."""

    error: str


@dataclass(frozen=True)
class Evaluated:
    """An evaluation came in: `view.evaluations` already has it."""


@dataclass(frozen=True)
class Resolve:
    """An admin decides a held candidate."""

    publish: bool
    reason: str


Event = (
    Tick
    | Contributed
    | Withdrawn
    | Seal
    | Abandon
    | Extend
    | MergeStarted
    | MergeDone
    | MergeFailed
    | Evaluated
    | Resolve
)


def open_view(round_id: str, model: str, policy: RoundPolicy, now: datetime) -> RoundView:
    """A round that opens at `now`."""
    closes_at = None if policy.duration is None else now + policy.duration
    return RoundView(round_id, model, State.OPEN, policy, opened_at=now, closes_at=closes_at)


def transition(view: RoundView, event: Event, now: datetime) -> Outcome:
    """What `event` makes of the round, and what must be done in the same transaction.

    `Tick` is legal everywhere and mostly changes nothing.

    Raises:
        ConflictError: `round.wrong_state` when the event does not fit the state,
            `round.empty`, `round.no_deadline` or `round.not_held` when the round's
            content does not fit it.
    """
    if isinstance(event, Tick) and view.state not in {State.OPEN, State.CANDIDATE}:
        return view, ()
    handler, allowed = _HANDLERS[type(event)]
    if view.state not in allowed:
        raise ConflictError(
            "round.wrong_state",
            f"{_SENTENCES[type(event)]} while the round is {view.state}.",
            expected=" or ".join(state for state in State if state in allowed),
            got=view.state,
            hint=f"See where it is with `coldmerge round show {view.id}`.",
            round=view.id,
            model=view.model,
        )
    return handler(view, event, now)


def _tick(view: RoundView, _event: Event, now: datetime) -> Outcome:
    if view.state is State.CANDIDATE:
        return judge(view, now)
    if view.closes_at is None or now < view.closes_at:
        return view, ()
    if view.contributions >= view.policy.min_contributions:
        return _sealed(view)
    missed = (
        f"{view.contributions} of at least {view.policy.min_contributions} contributions "
        "came before the deadline"
    )
    if view.policy.on_quorum_missed == "extend" and view.policy.duration is not None:
        moved = replace(view, closes_at=now + view.policy.duration, reason=missed)
        text = f"{missed}; extended by {format_duration(view.policy.duration)}"
        return moved, (Notify("round.stuck", text),)
    return abandoned(view, missed)


def _contributed(view: RoundView, _event: Event, _now: datetime) -> Outcome:
    limit = view.policy.seals_at
    if limit is not None and view.contributions >= limit:
        return _sealed(view)
    return view, ()


def _withdrawn(view: RoundView, _event: Event, _now: datetime) -> Outcome:
    return view, ()


def _seal(view: RoundView, _event: Event, _now: datetime) -> Outcome:
    if not view.contributions:
        raise ConflictError(
            "round.empty",
            f"Round {view.id} has no contributions to merge.",
            expected="at least one",
            got=0,
            hint=f"Wait, or end it with `coldmerge round abandon {view.id}`.",
            round=view.id,
            model=view.model,
        )
    return _sealed(view)


def _sealed(view: RoundView) -> Outcome:
    return replace(view, state=State.SEALED, reason=None), (FreezeInputs(),)


def _abandon(view: RoundView, event: Abandon, _now: datetime) -> Outcome:
    return abandoned(view, event.reason)


def _extend(view: RoundView, event: Extend, now: datetime) -> Outcome:
    if view.state is State.CANDIDATE and view.evaluation_closes_at is not None:
        later = max(view.evaluation_closes_at, now) + event.by
        return replace(view, evaluation_closes_at=later, held=False, reason=None), ()
    if view.closes_at is None:
        raise ConflictError(
            "round.no_deadline",
            f"Round {view.id} has no deadline: it seals by count.",
            hint=f"Close it with `coldmerge round seal {view.id}`.",
            round=view.id,
            model=view.model,
        )
    return replace(view, closes_at=max(view.closes_at, now) + event.by), ()


def _merge_started(view: RoundView, _event: Event, _now: datetime) -> Outcome:
    return replace(view, state=State.MERGING), ()


def _merge_failed(view: RoundView, event: MergeFailed, _now: datetime) -> Outcome:
    attempts = view.merge_attempts + 1
    reason = f"merge attempt {attempts} of {MAX_MERGE_ATTEMPTS} failed: {event.error}"
    again = replace(view, state=State.SEALED, merge_attempts=attempts, reason=reason)
    if attempts >= MAX_MERGE_ATTEMPTS:
        if view.left_out:
            return tried(again, passed=False, why=reason)
        return give_up(again, reason) if view.probing else abandoned(again, reason)
    return again, (Notify("round.stuck", reason),)


def _merge_done(view: RoundView, event: MergeDone, now: datetime) -> Outcome:
    candidate = replace(
        view,
        state=State.CANDIDATE,
        candidate_digest=event.candidate_digest,
        candidate_master=event.candidate_master,
        candidate_state=event.candidate_state,
        reason=event.note,
    )
    learns = view.policy.merge.coefficients
    if view.probing and learns is not None:
        return replace(candidate, evaluation_closes_at=now + learns.window), ()
    gate = view.policy.gate
    if gate is None:
        return published(candidate, ("ungated",), "the round has no gate")
    return replace(candidate, evaluation_closes_at=now + gate.window), ()


def _evaluated(view: RoundView, _event: Event, now: datetime) -> Outcome:
    return judge(view, now)


def _resolve(view: RoundView, event: Resolve, _now: datetime) -> Outcome:
    if not view.held:
        raise ConflictError(
            "round.not_held",
            f"The gate has not given up on round {view.id}: evaluations are still awaited.",
            hint="Wait for the evaluation window to end, or abandon the round.",
            round=view.id,
            model=view.model,
        )
    if event.publish:
        return published(view, ("unchecked",), event.reason)
    return rejected(view, event.reason)


_Handler = Callable[[RoundView, Any, datetime], Outcome]  # Any: each takes its own event
_HANDLERS: dict[type[Event], tuple[_Handler, frozenset[State]]] = {
    Tick: (_tick, frozenset({State.OPEN, State.CANDIDATE})),
    Contributed: (_contributed, frozenset({State.OPEN})),
    Withdrawn: (_withdrawn, frozenset({State.OPEN})),
    Seal: (_seal, frozenset({State.OPEN})),
    Abandon: (_abandon, frozenset(state for state in State if state.active)),
    Extend: (_extend, frozenset({State.OPEN, State.CANDIDATE})),
    MergeStarted: (_merge_started, frozenset({State.SEALED, State.MERGING})),
    MergeDone: (_merge_done, frozenset({State.MERGING})),
    MergeFailed: (_merge_failed, frozenset({State.MERGING})),
    Evaluated: (_evaluated, frozenset({State.CANDIDATE})),
    Resolve: (_resolve, frozenset({State.CANDIDATE})),
}
_SENTENCES: dict[type[Event], str] = {
    Contributed: "No contribution can be admitted",
    Withdrawn: "No contribution can be taken back",
    Seal: "Admissions cannot be closed",
    Abandon: "There is nothing to abandon",
    Extend: "There is no deadline to move",
    MergeStarted: "There is nothing to merge",
    MergeDone: "No candidate is expected",
    MergeFailed: "No merge can fail",
    Evaluated: "No evaluation is awaited",
    Resolve: "There is no candidate to decide",
}
