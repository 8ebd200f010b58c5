"""A round that learns coefficients: probes go to the worker and back, the best to the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from coldmerge.core.documents import Evaluation
from coldmerge.rounds import coefficients
from coldmerge.rounds.policy import CoefficientsPolicy, RoundPolicy
from coldmerge.rounds.state import (
    MAX_MERGE_ATTEMPTS,
    Evaluated,
    MergeDone,
    MergeFailed,
    MergeStarted,
    Notify,
    Publish,
    RoundView,
    State,
    Tick,
    open_view,
    transition,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = tuple(f"org-{number:02}" for number in range(24))
Judge = Callable[..., Evaluation]


def probing(judge: Judge, count: int = 3, **changes: object) -> RoundView:
    """A round of `count` whose first probe is being measured."""
    learns = {"objective": "loss", "probes": 6, **changes}
    policy = RoundPolicy.model_validate(
        {"min_contributions": 1, "merge": {"coefficients": learns}, "gate": {"max_vetoes": 0}}
    )
    assert policy.merge.coefficients is not None
    names = NAMES[:count]
    view = replace(
        open_view("round-1", "triage", policy, NOW),
        state=State.SEALED,
        contributors=names,
        evaluators=names,
        search=coefficients.begin(policy.merge.coefficients, names, names, [], 11),
        probe_seed=11,
    )
    return merged(view)


def merged(view: RoundView) -> RoundView:
    view, _ = transition(view, MergeStarted(), NOW)
    return transition(view, MergeDone("0" * 64, "1" * 64), NOW)[0]


def measured(judge: Judge, name: str, loss: float) -> Evaluation:
    means = {"base_loss": 1.0, "candidate_loss": loss}
    return judge(name, 1.0).model_copy(update={"means": means})


def reported(view: RoundView, judge: Judge, count: int | None = None) -> tuple[RoundView, object]:
    assert view.search is not None
    loss = 1 + sum((one - 0.6) ** 2 for one in view.search.point)
    names = view.evaluators[:count]
    seen = replace(view, evaluations=tuple(measured(judge, name, loss) for name in names))
    return transition(seen, Evaluated(), NOW)


def test_probes_go_back_to_the_worker_and_the_best_goes_to_the_gate(judge: Judge) -> None:
    view = probing(judge)
    assert view.evaluation_closes_at == NOW + timedelta(minutes=10)
    for number in range(1, 7):
        assert (view.state, view.probing) == (State.CANDIDATE, True)
        view, effects = reported(view, judge)
        assert (view.state, view.trial, effects) == (State.SEALED, number, ())
        assert (view.candidate_digest, view.evaluations) == (None, ())
        view = merged(view)
    assert view.search is not None
    assert view.search.done
    assert all(0.3 <= one <= 0.7 for one in view.search.point)
    assert view.evaluation_closes_at == NOW + timedelta(hours=1)
    view, effects = reported(view, judge)
    assert view.state is State.PUBLISHED
    assert Publish(()) in tuple(effects)  # type: ignore[arg-type]


def test_a_rejected_result_is_not_looked_into(judge: Judge) -> None:
    view = probing(judge)
    while view.probing:
        view = merged(reported(view, judge)[0])
    view = replace(view, evaluations=tuple(judge(name, -9.0) for name in view.evaluators))
    view, _ = transition(view, Evaluated(), NOW)
    assert (view.state, view.trials) == (State.REJECTED, ())


def test_who_does_not_report_is_waited_for_and_then_done_without(judge: Judge) -> None:
    view, _ = reported(probing(judge), judge, 2)
    assert (view.state, view.trial) == (State.CANDIDATE, 0)
    view, _ = transition(view, Tick(), NOW + timedelta(minutes=11))
    assert (view.state, view.trial) == (State.SEALED, 1)
    assert view.search is not None
    assert set(view.search.probes[0].reports) == set(NAMES[:2])


def test_too_few_reports_end_the_search_with_the_best_so_far(judge: Judge) -> None:
    view = probing(judge, min_evaluators=2)
    view = merged(reported(view, judge)[0])
    view, effects = transition(view, Tick(), NOW + timedelta(hours=1))
    assert isinstance(effects[0], Notify)
    assert effects[0].kind == "round.stuck"
    assert view.search is not None
    assert (view.state, view.search.done, view.search.point) == (State.SEALED, True, (0.3,) * 3)
    assert "only 0 of at least 2 evaluators measured probe 2" in str(view.reason)


def test_numbers_of_another_kind_are_no_report(judge: Judge) -> None:
    view = probing(judge, objective="entropy")
    view, _ = reported(view, judge)
    assert view.state is State.CANDIDATE
    assert (
        coefficients.asked(CoefficientsPolicy(objective="entropy"), measured(judge, "a", 1.0))
        is None
    )
    assert (
        coefficients.asked(CoefficientsPolicy(objective="loss"), measured(judge, "a", 1.5)) == 0.5
    )
    assert coefficients.asked(
        CoefficientsPolicy(objective="accuracy"), judge("a", 2.0)
    ) == pytest.approx(-0.02)


@pytest.mark.parametrize("probes", [0, 1])
def test_a_probe_that_cannot_be_merged_ends_the_search(judge: Judge, probes: int) -> None:
    view = probing(judge)
    for _ in range(probes):
        view = merged(reported(view, judge)[0])
    view = replace(view, state=State.SEALED)
    for _ in range(MAX_MERGE_ATTEMPTS):
        view, _ = transition(view, MergeStarted(), NOW)
        view, _ = transition(view, MergeFailed("no"), NOW)
    if not probes:
        assert view.state is State.ABANDONED
        return
    assert view.search is not None
    assert (view.state, view.search.done, view.merge_attempts) == (State.SEALED, True, 0)
