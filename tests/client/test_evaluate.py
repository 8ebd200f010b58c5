"""What contributors judge at home, and what of it leaves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ConflictError
from coldmerge.wire.v1 import admin_pb2, common_pb2
from coldmerge_client import sent_log
from coldmerge_client.enrol import join
from coldmerge_client.evaluate import evaluate, report
from coldmerge_client.home import Home
from coldmerge_client.policy import SendPolicy
from coldmerge_client.prepare import Facts
from coldmerge_client.push import push
from coldmerge_client.session import Session
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.client.members import GATE, config_of, judged, run
from tests.support import until, write_model

State = common_pb2.Round


def test_the_paired_evaluation_is_what_the_trainer_found(
    coordinator: Coordinator, session: Session, trainer: Path, tmp_path: Path
) -> None:
    opened = coordinator.open_round(gate={"min_evaluators": 2})
    with pytest.raises(ConflictError, match="no candidate"):
        evaluate(session, opened, config_of(trainer, 1))
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), 9))
    push(session, "m", tuned, Facts(3))
    until("the candidate", lambda: session.round(opened.id).state == State.CANDIDATE)
    found = session.round(opened.id)
    scores = evaluate(session, found, config_of(trainer, 1, good=[10, 15]))
    assert (scores.n, scores.gained, scores.lost) == (20, 5, 0)
    assert (scores.base.accuracy, scores.candidate.accuracy) == (0.5, 0.75)
    document = report(session, found, scores)
    assert document.candidate_digest == found.candidate_digest
    assert session.round(opened.id).evaluations == 1
    line = sent_log.read(session.home)[-1]
    assert (line.event, line.body["n"], line.body["gained"]) == ("evaluation", 20, 5)


def test_an_evaluator_only_judges(coordinator: Coordinator, members: Any, tmp_path: Path) -> None:
    join(
        coordinator.invite("judge", "evaluator"), coordinator.fingerprint, Home(tmp_path / "judge")
    )
    judge, a = members("judge", 5), members("org-a", 1)
    coordinator.open_round(gate=GATE)
    run(judge, a)
    assert judge.kinds() == ["evaluating", "evaluated"]
    assert not (judge.session.home.path / "trainings").exists()
    assert [found.state for found in judge.ended] == [State.PUBLISHED]


def test_a_candidate_that_makes_things_worse_is_rejected(
    coordinator: Coordinator, members: Any
) -> None:
    worse = {"good": [14, 6]}
    a, b = members("org-a", 1, options=worse), members("org-b", 2, options=worse)
    coordinator.open_round(min_contributions=2, gate=GATE)
    run(a, b)
    assert [found.state for found in (*a.ended, *b.ended)] == [State.REJECTED] * 2
    assert a.session.model("m").latest_number == 0


def test_scores_leave_only_when_a_person_agrees(coordinator: Coordinator, members: Any) -> None:
    asked: list[Any] = []

    def tensors_only(leaving: Any) -> bool:
        asked.append(leaving)
        return bool(leaving.tensors)

    a = members("org-a", 1, policy=SendPolicy(require_approval=True), approve=tensors_only)
    opened = coordinator.open_round(gate={"min_evaluators": 1, "window": "2s"})
    thread = a.start()
    until("the refusal", lambda: "skipped" in a.kinds(), 40)
    assert [leaving.kind for leaving in asked] == ["full", "evaluation"]
    assert asked[1].numbers["items"] == 20
    events = [line.event for line in sent_log.read(a.session.home)]
    assert "evaluation" not in events
    coordinator.admin("AbandonRound", admin_pb2.RoundAction(round=opened.id, reason="nobody"))
    thread.join(40)
    assert a.error is None


def test_the_same_candidate_in_the_next_round_is_judged_again(
    coordinator: Coordinator, members: Any
) -> None:
    """A round that ends without a release leaves base, fine-tune and so the candidate alike."""
    a = members("org-a", 1, rounds=2)
    thread = a.start()
    for count in (1, 2):
        opened = coordinator.open_round(min_contributions=1, gate={"min_evaluators": 2})
        until("the evaluation", partial(judged, a, count), 40)
        coordinator.admin("AbandonRound", admin_pb2.RoundAction(round=opened.id))
    thread.join(40)
    assert a.error is None
    assert len({found.candidate_digest for found in a.ended}) == 1
