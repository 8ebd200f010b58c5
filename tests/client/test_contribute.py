"""The whole loop of contributors, with a trainer of a few lines."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.errors import ConflictError, DataError, UnavailableError
from coldmerge.wire.v1 import admin_pb2, common_pb2
from coldmerge_client import sent_log
from coldmerge_client.contribute import Step, Terms, contribute
from coldmerge_client.evaluate import evaluate, report
from coldmerge_client.files import exclusive
from coldmerge_client.home import Home
from coldmerge_client.outbox import Outbox
from coldmerge_client.policy import SendPolicy
from coldmerge_client.prepare import Facts, prepare
from coldmerge_client.pull import pull
from coldmerge_client.push import push
from coldmerge_client.session import Session
from coldmerge_client.train import finished, forget, train
from coldmerge_client.training.config import TrainConfig
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.client.members import GATE, config_of, run, trainings
from tests.support import until, write_model

State = common_pb2.Round


def test_two_organizations_take_two_rounds(coordinator: Coordinator, members: Any) -> None:
    a, b = members("org-a", 1, rounds=2), members("org-b", 2, rounds=2)
    coordinator.open_round(min_contributions=2, gate=GATE)
    threads = [a.start(), b.start()]
    admin = a.session.home.path.parent / "watcher"
    with Session.open(coordinator.join(admin, "org-c"), timeout=20) as watcher:
        until("release 1", lambda: watcher.model("m").latest_number == 1, 40)
        coordinator.open_round(min_contributions=2, gate=GATE)
        for thread in threads:
            thread.join(60)
        assert (a.error, b.error) == (None, None)
        assert watcher.model("m").latest_number == 2
    for member in (a, b):
        assert [found.state for found in member.ended] == [State.PUBLISHED] * 2
        assert member.kinds().count("sent") == 2
        assert member.kinds().count("evaluated") == 2
        home = member.session.home
        assert home.local_releases("m") == [0, 1, 2]
        assert (home.head("m") / "rounds").read_text() == "2"
        assert trainings(home) == 2
        events = [line.event for line in sent_log.read(home)]
        assert events.count("contribution") == events.count("evaluation") == 2
        releases = [
            Checkpoint.open(home.release("m", number)).block("body.small", 0, 16)
            for number in range(3)
        ]
        assert not np.array_equal(releases[0], releases[1])
        assert not np.array_equal(releases[1], releases[2])


def test_a_round_for_others_is_left_alone(coordinator: Coordinator, members: Any) -> None:
    a, b = members("org-a", 1), members("org-b", 2)
    threads = [a.start(), b.start()]
    first = coordinator.open_round(min_contributions=1, contributors=["org-a"])
    threads[0].join(40)
    until("b to say so", lambda: "skipped" in b.kinds())
    second = coordinator.open_round(min_contributions=1, contributors=["org-b"])
    threads[1].join(40)
    assert (a.error, b.error) == (None, None)
    assert [found.id for found in a.ended] == [first.id]
    assert [found.id for found in b.ended] == [second.id]
    assert b.kinds().count("skipped") == b.kinds().count("sent") == 1


def test_a_person_may_say_no_and_the_loop_goes_on(coordinator: Coordinator, members: Any) -> None:
    asked: list[object] = []

    def second_time(leaving: object) -> bool:
        asked.append(leaving)
        return len(asked) > 1

    a = members("org-a", 1, policy=SendPolicy(require_approval=True), approve=second_time)
    first = coordinator.open_round()
    thread = a.start()
    until("the refusal", lambda: "skipped" in a.kinds())
    with Session.open(a.session.home) as other:
        assert other.contributions("m", first.id) == ()
        assert [line.event for line in sent_log.read(a.session.home)] == ["join"]
    coordinator.admin("AbandonRound", admin_pb2.RoundAction(round=first.id, reason="nobody"))
    second = coordinator.open_round()
    thread.join(40)
    assert a.error is None
    assert [found.id for found in a.ended] == [second.id]
    assert trainings(a.session.home) == 1


def test_a_loop_started_again_does_nothing_twice(
    coordinator: Coordinator, members: Any, trainer: Path
) -> None:
    opened = coordinator.open_round(min_contributions=1, gate={"min_evaluators": 2})
    first = members("org-a", 1)
    first.start()
    until("the evaluation", lambda: "evaluated" in first.kinds(), 40)
    again = members("org-a", 1)
    again.session.home.lock("contribute-m").unlink()  # as after kill -9
    thread = again.start()
    with Session.open(coordinator.join(trainer.parent / "b", "org-b")) as other:
        report(other, other.round(opened.id), _scores(other, opened.id, trainer))
    thread.join(40)
    assert again.error is None
    assert [found.id for found in again.ended] == [opened.id]
    assert again.kinds() == []
    assert trainings(again.session.home) == 1


def _scores(session: Session, round_id: str, trainer: Path) -> Any:
    return evaluate(session, session.round(round_id), config_of(trainer, 2))


def test_an_upload_left_by_a_crash_is_sent_without_training_again(
    coordinator: Coordinator, members: Any, tmp_path: Path
) -> None:
    opened = coordinator.open_round()
    a = members("org-a", 1)
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), 9))
    entry = prepare(a.session, opened, tuned, Facts(3))
    run(a)
    assert Outbox(a.session.home).get(entry.id).state == "sent"
    assert not (a.session.home.path / "trainings").exists()


def test_what_waits_against_a_stricter_policy_is_made_again(
    coordinator: Coordinator, members: Any, tmp_path: Path
) -> None:
    opened = coordinator.open_round()
    a = members("org-a", 1, policy=SendPolicy(private=("body.small",)))
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), 9))
    entry = prepare(a.session, opened, tuned, Facts(3), policy=SendPolicy())
    run(a)
    outbox = Outbox(a.session.home)
    assert outbox.get(entry.id).state == "refused"
    sent = outbox.for_round(opened.id)
    assert sent is not None
    assert [tensor.name for tensor in sent.manifest.tensors] == ["body.large"]


def test_a_round_that_ends_while_we_train_is_left_out(
    coordinator: Coordinator, members: Any, tmp_path: Path
) -> None:
    first = coordinator.open_round()
    a = members("org-a", 1)
    other_home = coordinator.join(tmp_path / "other", "org-b")
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), 9))
    meanwhile = threading.Event()

    def tell(step: Step) -> None:
        a.steps.append(step)
        if step.kind == "sending" and not meanwhile.is_set():
            meanwhile.set()
            with Session.open(other_home) as other:
                push(other, "m", tuned, Facts(3))
                until("round 1", lambda: other.round(first.id).state == State.PUBLISHED)
            coordinator.open_round()

    a.terms = Terms(a.terms.config, a.terms.policy, tell=tell)
    run(a)
    assert "skipped" in a.kinds()
    assert [found.base_number for found in a.ended] == [1]
    states = {entry.manifest.round: entry.state for entry in Outbox(a.session.home).entries()}
    assert states[first.id] == "refused"


def test_the_loop_outlives_a_coordinator_that_is_killed(
    coordinator: Coordinator, members: Any
) -> None:
    a, b = members("org-a", 1), members("org-b", 2)
    thread = a.start()
    coordinator.open_round(min_contributions=2, gate=GATE)
    until("the first contribution", lambda: "sent" in a.kinds())
    coordinator.stop(signal.SIGKILL)
    coordinator.start()
    run(b)
    thread.join(40)
    assert a.error is None
    assert [found.state for found in (*a.ended, *b.ended)] == [State.PUBLISHED] * 2


def test_a_coordinator_that_stays_away_ends_the_loop(
    coordinator: Coordinator, members: Any
) -> None:
    a = members("org-a", 1)
    coordinator.stop()
    a.session.timeout = 1.0
    with pytest.raises(UnavailableError):
        run(a)


def test_one_loop_per_model_and_home(members: Any) -> None:
    a = members("org-a", 1)
    with (
        exclusive(a.session.home.lock("contribute-m"), "m", wait=False),
        pytest.raises(ConflictError),
    ):
        next(contribute(a.session, "m", a.terms))


def test_training_is_done_once_and_the_head_is_kept(session: Session, trainer: Path) -> None:
    base, home, config = pull(session, "m"), session.home, config_of(trainer, 1)
    assert finished(home, base, config) is None
    trained = train(home, base, config)
    assert train(home, base, config) == trained == finished(home, base)
    assert trainings(home) == 1
    assert (home.head("m") / "rounds").read_text() == "1"
    assert finished(home, base, config_of(trainer, 2)) is None
    forget(home, "m", keep=base)
    assert finished(home, base) == trained
    forget(home, "m")
    assert finished(home, base) is None
    assert (home.head("m") / "rounds").exists()


def test_data_that_cannot_be_used_ends_the_loop(
    coordinator: Coordinator, members: Any, tmp_path: Path
) -> None:
    a = members("org-a", 1)
    settings = {"trainer": "sequence-classification", "data": str(tmp_path / "data")}
    a.terms = Terms(TrainConfig.parse(settings), SendPolicy())
    coordinator.open_round()
    with pytest.raises(DataError):
        run(a)


def test_a_quarantined_contribution_is_told_and_not_sent_again(
    coordinator: Coordinator, members: Any
) -> None:
    screening = {"reference_norm": 1e-6, "smallest": 0.1}
    coordinator.open_round(min_contributions=1, gate=GATE, screening=screening, duration="1h")
    member = members("org-a", 1)
    member.start()
    until("it to wait", lambda: "held" in member.kinds(), 60)
    assert "times the round's reference norm" in next(
        step.text for step in member.steps if step.kind == "held"
    )
    (mine,) = member.session.contributions("m")
    assert mine.state == type(mine).QUARANTINED
    assert member.kinds().count("sending") == 1


def test_a_re_merge_is_no_round_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [common_pb2.Round(id="again", remerge=True), common_pb2.Round(id="own")]

    class Scripted:
        def __init__(self, *_: object) -> None:
            self.left = list(ends)

        def next(self) -> common_pb2.Round:
            return self.left.pop(0)

        def settle(self, current: common_pb2.Round) -> list[common_pb2.Round]:
            return [current]

        def act(self, _current: common_pb2.Round) -> None:
            pass

    monkeypatch.setattr("coldmerge_client.contribute._Loop", Scripted)
    session = SimpleNamespace(home=Home(tmp_path))
    ended = contribute(cast(Any, session), "m", cast(Any, None), rounds=1)
    assert [found.id for found in ended] == ["again", "own"]
