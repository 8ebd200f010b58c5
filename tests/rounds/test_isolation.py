"""The search for a culprit ends, finds it, and shows nobody's task vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.documents import Evaluation
from coldmerge.rounds.isolation import Rules, Trial, best, exposed, next_group
from coldmerge.rounds.policy import GatePolicy, RoundPolicy
from coldmerge.rounds.state import (
    MAX_MERGE_ATTEMPTS,
    Abandon,
    Evaluated,
    MergeDone,
    MergeFailed,
    MergeStarted,
    Notify,
    Publish,
    Resolve,
    RoundView,
    State,
    Tick,
    open_view,
    transition,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
Judge = Callable[..., Evaluation]
NAMES = tuple(f"org-{number:02}" for number in range(40))


def searched(rules: Rules, passes: Callable[[frozenset[str]], bool]) -> list[Trial]:
    """All trials of a search, after the candidate of all inputs was rejected."""
    trials = [Trial(0, (), passed=False, reason="")]
    while (group := next_group(rules, trials)) is not None:
        assert len(trials) < 100, "the search does not end"
        kept = frozenset(rules.everyone) - set(group)
        trials.append(Trial(len(trials), group, passed=passes(kept), reason=""))
    return trials


def revealed(everyone: Sequence[str], trials: Sequence[Trial]) -> set[str]:
    """Whose unit vector is in the span of the candidates: their τ is a sum of candidates."""
    rows = np.array([[name not in trial.left_out for name in everyone] for trial in trials], float)
    rank = np.linalg.matrix_rank(rows)
    units = np.eye(len(everyone))
    found = (np.linalg.matrix_rank(np.vstack([rows, unit])) == rank for unit in units)
    return {name for name, inside in zip(everyone, found, strict=True) if inside}


def bound(count: int) -> int:
    return 2 * ceil(log2(count)) + 1


@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    least=st.integers(2, 5),
    verdicts=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_no_search_reveals_anybody(count: int, seed: int, least: int, verdicts: list[bool]) -> None:
    rules = Rules(NAMES[:count], seed, least)
    answers = iter(verdicts)
    trials = searched(rules, lambda _kept: next(answers))
    if count < 2 * least:
        assert len(trials) == 1
        return
    assert len(trials) <= bound(count)
    groups = [frozenset(trial.left_out) for trial in trials[1:]]
    for group in groups:
        assert least <= len(group) <= count - least
        assert all(not group & other or group <= other or other <= group for other in groups)
    assert exposed(rules.everyone, groups, least) == set()
    assert revealed(rules.everyone, trials) == set()
    assert len(set(groups)) == len(groups), "no candidate is tried twice"


@given(
    count=st.integers(4, 24),
    seed=st.integers(0, 2**31),
    least=st.integers(2, 4),
    alone=st.sets(st.sampled_from(NAMES[:24])),
    verdicts=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_who_is_revealed_has_agreed(
    count: int, seed: int, least: int, alone: set[str], verdicts: list[bool]
) -> None:
    everyone = NAMES[:count]
    rules = Rules(everyone, seed, least, frozenset(alone))
    answers = iter(verdicts)
    trials = searched(rules, lambda _kept: next(answers))
    assert len(trials) <= bound(count)
    assert revealed(everyone, trials) <= alone
    assert exposed(everyone, [frozenset(trial.left_out) for trial in trials], least) <= alone


@given(count=st.integers(4, 40), seed=st.integers(0, 2**31), data=st.data())
def test_one_culprit_is_found_in_the_smallest_group_there_may_be(
    count: int, seed: int, data: st.DataObject
) -> None:
    everyone = NAMES[:count]
    culprit = data.draw(st.sampled_from(everyone))
    found = best(searched(Rules(everyone, seed), lambda kept: culprit not in kept))
    assert found is not None
    assert culprit in found.left_out
    assert len(found.left_out) in (2, 3)
    agreed = Rules(everyone, seed, 2, frozenset(everyone))
    alone = best(searched(agreed, lambda kept: culprit not in kept))
    assert alone is not None
    assert alone.left_out == (culprit,)


def test_culprits_in_both_halves_are_not_found() -> None:
    rules = Rules(NAMES[:8], 3)
    first = next_group(rules, [Trial(0, (), passed=False, reason="")])
    assert first is not None
    other = sorted(set(rules.everyone) - set(first))
    trials = searched(rules, lambda kept: not kept & {first[0], other[0]})
    assert [len(trial.left_out) for trial in trials] == [0, 4, 4]
    assert best(trials) is None


def test_the_order_is_the_seeds_and_not_the_names() -> None:
    first = {next_group(Rules(NAMES[:6], seed), ()) for seed in range(40)}
    assert len(first) > 8
    assert {len(group or ()) for group in first} == {2}


def isolating(count: int, **gate: object) -> RoundView:
    """A round of `count` whose candidate of all is being judged."""
    policy = RoundPolicy(
        min_contributions=1,
        gate=GatePolicy.model_validate({"on_reject": "isolate", "max_vetoes": 0, **gate}),
    )
    names = NAMES[:count]
    return replace(
        open_view("round-1", "triage", policy, NOW),
        state=State.CANDIDATE,
        contributors=names,
        evaluators=names,
        candidate_digest="0" * 64,
        candidate_master="1" * 64,
        evaluation_closes_at=NOW + HOUR,
        probe_seed=11,
    )


def judged(view: RoundView, judge: Judge, culprits: set[str]) -> tuple[RoundView, list[object]]:
    """Everybody judges the candidate at hand: it loses where a culprit's update is in it."""
    spoilt = bool(culprits - set(view.left_out))
    reports = tuple(judge(name, -5.0 if spoilt else 1.0) for name in view.evaluators)
    after, effects = transition(replace(view, evaluations=reports), Evaluated(), NOW)
    return after, list(effects)


def merged(view: RoundView) -> RoundView:
    view, _ = transition(view, MergeStarted(), NOW)
    digits = f"{view.trial:02x}"
    return transition(view, MergeDone(digits * 32, digits * 32), NOW)[0]


def test_the_round_goes_back_and_publishes_without_the_culprits_group(judge: Judge) -> None:
    view, effects = judged(isolating(8), judge, {NAMES[3]})
    sizes = []
    while view.state is State.SEALED:
        assert view.candidate_digest is None
        assert view.evaluations == ()
        assert [type(effect) for effect in effects] == [Notify]
        assert isinstance(effects[0], Notify)
        assert effects[0].kind == "round.isolating"
        sizes.append(len(view.left_out))
        view, effects = judged(merged(view), judge, {NAMES[3]})
    assert view.state is State.PUBLISHED
    assert Publish(("isolated",)) in effects
    assert NAMES[3] in view.left_out
    assert len(view.left_out) == 2
    assert sizes[0] == 4
    found = best(view.trials)
    assert found is not None
    assert (view.trial, view.candidate_digest) == (found.number, f"{found.number:02x}" * 32)
    assert view.reason == f"without 2 of 8: {found.reason}"


def test_a_last_failed_trial_leaves_the_one_that_passed(judge: Judge) -> None:
    """Two culprits in one half, in different quarters: neither quarter alone is enough."""
    half = next_group(Rules(NAMES[:8], 11), ())
    assert half is not None
    passed = [Trial(0, (), passed=False, reason=""), Trial(1, half, passed=True, reason="")]
    quarter = next_group(Rules(NAMES[:8], 11), passed)
    assert quarter is not None
    culprits = {quarter[0], min(set(half) - set(quarter))}
    view, _ = judged(isolating(8), judge, culprits)
    while view.state is State.SEALED:
        view, effects = judged(merged(view), judge, culprits)
    assert view.state is State.PUBLISHED
    assert [trial.passed for trial in view.trials] == [False, True, False, False]
    assert (view.trial, view.left_out, view.candidate_digest) == (1, half, "01" * 32)
    assert Publish(("isolated",)) in effects


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_to_search_are_rejected_at_once(judge: Judge, count: int) -> None:
    view, effects = judged(isolating(count), judge, {NAMES[0]})
    assert view.state is State.REJECTED
    assert [effect.kind for effect in effects if isinstance(effect, Notify)] == ["round.rejected"]


def test_nobody_asked_for_a_search(judge: Judge) -> None:
    view, _ = judged(isolating(8, on_reject="reject"), judge, {NAMES[0]})
    assert (view.state, view.trial) == (State.REJECTED, 0)


def test_everybody_spoils_it(judge: Judge) -> None:
    view, _ = judged(isolating(6), judge, set(NAMES[:6]))
    while view.state is State.SEALED:
        view, _ = judged(merged(view), judge, set(NAMES[:6]))
    assert view.state is State.REJECTED
    assert view.trial == 2
    assert (view.reason or "").startswith(
        "no group that may be left out is enough, in 2 trials; the last: 6 of at most 0 vetoes"
    )


@pytest.mark.parametrize("on_timeout", ["reject", "hold", "publish_flagged"])
def test_nobody_judges_a_trial(judge: Judge, on_timeout: str) -> None:
    view, _ = judged(isolating(6, on_timeout=on_timeout), judge, {NAMES[0]})
    view, effects = transition(merged(view), Tick(), NOW + HOUR)
    if on_timeout == "hold":
        assert (view.state, view.held) == (State.CANDIDATE, True)
        view, effects = transition(view, Resolve(publish=True, reason="seen"), NOW)
    if on_timeout == "reject":
        assert view.state is State.REJECTED
        return
    assert view.state is State.PUBLISHED
    assert Publish(("unchecked", "isolated")) in effects


def test_a_timeout_before_any_judgement_starts_no_search() -> None:
    view, _ = transition(isolating(6, on_timeout="reject"), Tick(), NOW + HOUR)
    assert (view.state, view.trial) == (State.REJECTED, 0)


def test_a_trial_that_cannot_be_merged_counts_as_failed(judge: Judge) -> None:
    view, _ = judged(isolating(6), judge, {NAMES[0]})
    first = view.left_out
    for _ in range(MAX_MERGE_ATTEMPTS):
        view, _ = transition(view, MergeStarted(), NOW)
        view, _ = transition(view, MergeFailed("slerp takes 2 inputs"), NOW)
    assert (view.state, view.trial, view.merge_attempts) == (State.SEALED, 2, 0)
    assert not set(first) & set(view.left_out)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("judge", "judge", "judge", "merge", "merge", "fail", "wait", "end")),
        st.integers(0, 2**12 - 1),
    ),
    max_size=60,
)


@given(
    count=st.integers(1, 12),
    on_timeout=st.sampled_from(["hold", "reject", "publish_flagged"]),
    steps=STEPS,
)
def test_no_failed_trial_is_ever_published(count: int, on_timeout: str, steps: object) -> None:
    from tests.rounds.conftest import _judge

    view = isolating(count, on_timeout=on_timeout)
    names = NAMES[:count]
    assert isinstance(steps, list)
    for what, bits in steps:
        if not view.state.active:
            break
        effects: tuple[object, ...] = ()
        if what == "end" and bits % 7 == 0:
            view, effects = transition(view, Abandon("enough"), NOW)
        elif view.state is State.SEALED:
            view, effects = transition(view, MergeStarted(), NOW)
        elif view.state is State.MERGING:
            done = MergeDone(f"{view.trial:064x}", "1" * 64)
            event = MergeFailed("boom") if what == "fail" else done
            view, effects = transition(view, event, NOW)
        elif what == "wait":
            view, effects = transition(view, Tick(), NOW + HOUR)
        else:
            points = [5.0 if bits >> at & 1 else -5.0 for at in range(count)]
            reports = tuple(_judge(n, p) for n, p in zip(names, points, strict=True))
            view = replace(view, evaluations=reports)
            view, effects = transition(view, Evaluated(), NOW)
        assert view.trial <= bound(max(count, 2))
        assert 2 <= len(view.left_out) <= count - 2 or not view.left_out
        assert (view.left_out == ()) == (view.trial == 0)
        if any(isinstance(effect, Publish) for effect in effects):
            failed = {trial.digest for trial in view.trials if not trial.passed}
            assert view.candidate_digest not in failed
            assert view.candidate_digest is not None
