"""Every transition, and that no sequence of events leaves the map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.documents import Evaluation
from coldmerge.core.errors import ConflictError
from coldmerge.rounds.policy import GatePolicy, RoundPolicy
from coldmerge.rounds.state import (
    MAX_MERGE_ATTEMPTS,
    Abandon,
    Contributed,
    Evaluated,
    Event,
    Extend,
    FreezeInputs,
    MergeDone,
    MergeFailed,
    MergeStarted,
    Notify,
    Publish,
    Resolve,
    RoundView,
    Seal,
    State,
    Tick,
    Withdrawn,
    open_view,
    transition,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
DONE = MergeDone("b" * 64, "c" * 64)
EVENTS: tuple[Event, ...] = (
    Tick(),
    Contributed(),
    Withdrawn(),
    Seal(),
    Abandon("enough"),
    Extend(HOUR),
    MergeStarted(),
    DONE,
    MergeFailed("boom"),
    Evaluated(),
    Resolve(publish=True, reason="looked at it"),
    Resolve(publish=False, reason="looked at it"),
)
Judge = Callable[..., Evaluation]


def a_round(state: State = State.OPEN, names: str = "", **changes: Any) -> RoundView:
    """A round of two at least, in `state`."""
    policy = changes.pop("policy", RoundPolicy(min_contributions=2))
    view = replace(
        open_view("round-1", "triage", policy, NOW),
        state=state,
        contributors=tuple(names),
        evaluators=tuple(names),
    )
    if state is State.CANDIDATE:
        view = replace(
            view,
            candidate_digest="b" * 64,
            candidate_master="c" * 64,
            evaluation_closes_at=NOW + HOUR,
        )
    return replace(view, **changes)


def kinds(effects: tuple[object, ...]) -> list[object]:
    """Effects, with notices reduced to their kind."""
    return [item.kind if isinstance(item, Notify) else item for item in effects]


LEGAL: dict[type[Event], set[State]] = {
    Contributed: {State.OPEN},
    Withdrawn: {State.OPEN},
    Seal: {State.OPEN},
    Abandon: {State.OPEN, State.SEALED, State.MERGING, State.CANDIDATE},
    Extend: {State.OPEN, State.CANDIDATE},
    MergeStarted: {State.SEALED, State.MERGING},
    MergeDone: {State.MERGING},
    MergeFailed: {State.MERGING},
    Evaluated: {State.CANDIDATE},
    Resolve: {State.CANDIDATE},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", EVENTS[1:], ids=lambda event: type(event).__name__)
def test_events_fit_their_states_only(state: State, event: Event) -> None:
    policy = RoundPolicy(min_contributions=2, duration=HOUR)
    view = a_round(state, "ab", policy=policy, held=state is State.CANDIDATE)
    if state in LEGAL[type(event)]:
        transition(view, event, NOW)
        return
    with pytest.raises(ConflictError) as caught:
        transition(view, event, NOW)
    assert caught.value.code == "round.wrong_state"
    assert caught.value.got == state


@pytest.mark.parametrize("state", [s for s in State if s not in (State.OPEN, State.CANDIDATE)])
def test_time_alone_moves_nothing_else(state: State) -> None:
    view = a_round(state, "ab", closes_at=NOW)
    assert transition(view, Tick(), NOW + HOUR) == (view, ())


def test_the_count_seals() -> None:
    one = a_round(names="a")
    assert transition(one, Contributed(), NOW) == (one, ())
    after, effects = transition(a_round(names="ab"), Contributed(), NOW)
    assert (after.state, effects) == (State.SEALED, (FreezeInputs(),))


def test_with_a_deadline_the_minimum_does_not_seal() -> None:
    policy = RoundPolicy(min_contributions=2, duration=HOUR)
    view = a_round(names="ab", policy=policy)
    assert view.closes_at == NOW + HOUR
    assert transition(view, Contributed(), NOW)[0].state is State.OPEN
    assert transition(view, Tick(), NOW + HOUR - timedelta(seconds=1)) == (view, ())
    assert transition(view, Tick(), NOW + HOUR)[0].state is State.SEALED


def test_with_a_deadline_the_maximum_seals() -> None:
    policy = RoundPolicy(min_contributions=1, max_contributions=2, duration=HOUR)
    assert transition(a_round(names="ab", policy=policy), Contributed(), NOW)[0].state == "SEALED"


def test_a_missed_quorum_abandons() -> None:
    view = a_round(names="a", policy=RoundPolicy(min_contributions=2, duration=HOUR))
    after, effects = transition(view, Tick(), NOW + HOUR)
    assert (after.state, kinds(effects)) == (State.ABANDONED, ["round.abandoned"])
    assert after.reason == "1 of at least 2 contributions came before the deadline"


def test_a_missed_quorum_extends() -> None:
    policy = RoundPolicy(min_contributions=2, duration=HOUR, on_quorum_missed="extend")
    after, effects = transition(a_round(names="a", policy=policy), Tick(), NOW + 3 * HOUR)
    assert (after.state, after.closes_at) == (State.OPEN, NOW + 4 * HOUR)
    assert kinds(effects) == ["round.stuck"]


def test_an_admin_seals_below_the_quorum_but_not_nothing() -> None:
    after, effects = transition(a_round(names="a"), Seal(), NOW)
    assert (after.state, effects) == (State.SEALED, (FreezeInputs(),))
    with pytest.raises(ConflictError) as caught:
        transition(a_round(), Seal(), NOW)
    assert caught.value.code == "round.empty"


def test_extending_starts_from_now_when_the_deadline_is_past() -> None:
    view = a_round(closes_at=NOW)
    assert transition(view, Extend(HOUR), NOW + 2 * HOUR)[0].closes_at == NOW + 3 * HOUR
    assert transition(view, Extend(HOUR), NOW - HOUR)[0].closes_at == NOW + HOUR


def test_a_round_without_a_deadline_has_none_to_extend() -> None:
    with pytest.raises(ConflictError) as caught:
        transition(a_round(), Extend(HOUR), NOW)
    assert caught.value.code == "round.no_deadline"


def test_a_merge_restarts_after_a_crash_without_counting_as_failed() -> None:
    view, _ = transition(a_round(State.SEALED, "ab"), MergeStarted(), NOW)
    again, effects = transition(view, MergeStarted(), NOW)
    assert (again.state, again.merge_attempts, effects) == (State.MERGING, 0, ())


def test_a_merge_that_keeps_failing_ends_the_round() -> None:
    view = a_round(State.SEALED, "ab")
    for attempt in range(1, MAX_MERGE_ATTEMPTS + 1):
        view, _ = transition(view, MergeStarted(), NOW)
        view, effects = transition(view, MergeFailed("boom"), NOW)
        assert view.merge_attempts == attempt
        last = attempt == MAX_MERGE_ATTEMPTS
        assert view.state is (State.ABANDONED if last else State.SEALED)
        assert kinds(effects) == ["round.abandoned" if last else "round.stuck"]
    assert view.reason == "merge attempt 3 of 3 failed: boom"


def test_a_merge_makes_a_candidate_and_starts_the_window() -> None:
    after, effects = transition(a_round(State.MERGING, "ab"), DONE, NOW)
    assert (after.state, effects) == (State.CANDIDATE, ())
    assert (after.candidate_digest, after.candidate_master) == ("b" * 64, "c" * 64)
    assert after.evaluation_closes_at == NOW + HOUR


def test_without_a_gate_the_candidate_is_published_and_says_so() -> None:
    view = a_round(State.MERGING, "ab", policy=RoundPolicy(gate=None))
    after, effects = transition(view, DONE, NOW)
    assert after.state is State.PUBLISHED
    assert kinds(effects) == [Publish(("ungated",)), "round.published"]


@pytest.mark.parametrize(
    ("points", "state", "expected"),
    [
        (1.0, State.PUBLISHED, [Publish(()), "round.published"]),
        (-1.0, State.REJECTED, ["round.rejected"]),
    ],
)
def test_the_last_evaluation_decides(
    judge: Judge, points: float, state: State, expected: list[object]
) -> None:
    one = a_round(State.CANDIDATE, "ab", evaluations=(judge("a", points),))
    assert transition(one, Evaluated(), NOW) == (one, ())
    both = replace(one, evaluations=(judge("a", points), judge("b", points)))
    after, effects = transition(both, Evaluated(), NOW)
    assert (after.state, kinds(effects)) == (state, expected)
    assert after.reason is not None
    assert after.reason.startswith("mean gain")


def test_the_revoked_are_not_waited_for(judge: Judge) -> None:
    view = a_round(State.CANDIDATE, "ab", evaluators=("a",), evaluations=(judge("a", 1.0),))
    assert transition(view, Tick(), NOW)[0].state is State.PUBLISHED


def test_a_held_round_tells_once_and_waits_for_an_admin() -> None:
    view = a_round(State.CANDIDATE, "ab")
    held, effects = transition(view, Tick(), NOW + HOUR)
    assert (held.state, held.held, kinds(effects)) == (State.CANDIDATE, True, ["round.stuck"])
    assert transition(held, Tick(), NOW + 2 * HOUR) == (held, ())


def test_a_late_evaluation_frees_a_held_round(judge: Judge) -> None:
    held = a_round(State.CANDIDATE, "ab", held=True, evaluations=(judge("a", 1.0),))
    after, effects = transition(held, Evaluated(), NOW + 2 * HOUR)
    assert (after.state, after.held) == (State.PUBLISHED, False)
    assert effects[0] == Publish(())


def test_extending_a_held_round_opens_the_window_again() -> None:
    held = a_round(State.CANDIDATE, "ab", held=True, reason="why")
    after, _ = transition(held, Extend(HOUR), NOW + 2 * HOUR)
    assert (after.held, after.reason) == (False, None)
    assert after.evaluation_closes_at == NOW + 3 * HOUR


@pytest.mark.parametrize(
    ("publish", "state", "expected"),
    [
        (True, State.PUBLISHED, [Publish(("unchecked",)), "round.published"]),
        (False, State.REJECTED, ["round.rejected"]),
    ],
)
def test_an_admin_decides_a_held_round(
    *, publish: bool, state: State, expected: list[object]
) -> None:
    held = a_round(State.CANDIDATE, "ab", held=True)
    after, effects = transition(held, Resolve(publish, "looked at it"), NOW)
    assert (after.state, after.reason, kinds(effects)) == (state, "looked at it", expected)


def test_an_admin_does_not_forestall_the_gate() -> None:
    with pytest.raises(ConflictError) as caught:
        transition(a_round(State.CANDIDATE, "ab"), Resolve(publish=True, reason="hurry"), NOW)
    assert caught.value.code == "round.not_held"


@pytest.mark.parametrize(
    ("on_timeout", "state", "flags"),
    [
        ("reject", State.REJECTED, None),
        ("publish_flagged", State.PUBLISHED, ("unchecked",)),
    ],
)
def test_a_timeout_does_what_the_policy_says(
    on_timeout: Any, state: State, flags: tuple[str, ...] | None
) -> None:
    policy = RoundPolicy(gate=GatePolicy(on_timeout=on_timeout))
    after, effects = transition(a_round(State.CANDIDATE, "ab", policy=policy), Tick(), NOW + HOUR)
    assert after.state is state
    assert [e.flags for e in effects if isinstance(e, Publish)] == ([flags] if flags else [])


POLICIES = st.builds(
    RoundPolicy,
    min_contributions=st.integers(1, 3),
    max_contributions=st.sampled_from([None, 3, 4]),
    duration=st.sampled_from([None, HOUR]),
    on_quorum_missed=st.sampled_from(["abandon", "extend"]),
    gate=st.none()
    | st.builds(
        GatePolicy,
        min_evaluators=st.integers(1, 3),
        on_timeout=st.sampled_from(["hold", "reject", "publish_flagged"]),
    ),
)
STEPS = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 5400)), max_size=40)
MAP = {
    State.OPEN: {State.OPEN, State.SEALED, State.ABANDONED},
    State.SEALED: {State.SEALED, State.MERGING, State.ABANDONED},
    State.MERGING: set(State) - {State.OPEN, State.REJECTED},
    State.CANDIDATE: {State.CANDIDATE, State.PUBLISHED, State.REJECTED, State.ABANDONED},
    State.PUBLISHED: {State.PUBLISHED},
    State.REJECTED: {State.REJECTED},
    State.ABANDONED: {State.ABANDONED},
}


@given(policy=POLICIES, steps=STEPS)
def test_no_sequence_leaves_the_map(policy: RoundPolicy, steps: Any) -> None:
    view, now = open_view("round-1", "triage", policy, NOW), NOW
    frozen = published = 0
    for event, seconds in steps:
        now += timedelta(seconds=seconds)
        if isinstance(event, Contributed) and view.state is State.OPEN:
            names = tuple(f"org-{index}" for index in range(view.contributions + 1))
            view = replace(view, contributors=names, evaluators=names)
        before = view
        try:
            view, effects = transition(view, event, now)
        except ConflictError:
            continue
        assert view.state in MAP[before.state]
        frozen += effects.count(FreezeInputs())
        published += sum(isinstance(effect, Publish) for effect in effects)
        assert (view.policy, view.opened_at) == (before.policy, before.opened_at)
        assert not view.held or view.state is State.CANDIDATE
        if view.state in (State.SEALED, State.MERGING, State.CANDIDATE, State.PUBLISHED):
            assert frozen == 1
            assert view.contributions >= 1
        if view.state in (State.CANDIDATE, State.PUBLISHED, State.REJECTED):
            assert view.candidate_digest is not None
        assert published == (view.state is State.PUBLISHED)
        assert view.state.active or transition(view, Tick(), now + HOUR) == (view, ())
