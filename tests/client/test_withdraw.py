"""Taking a contribution back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.wire.v1 import admin_pb2, contributions_pb2
from coldmerge_client import sent_log
from coldmerge_client.prepare import Facts
from coldmerge_client.push import push
from coldmerge_client.session import Session
from coldmerge_client.withdraw import withdraw
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.client.members import GATE, judged
from tests.support import until, write_model


def test_what_was_pushed_can_be_taken_back_while_the_round_is_open(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    opened = coordinator.open_round(min_contributions=2)
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), seed=3))
    with pytest.raises(NotFoundError) as caught:
        withdraw(session, "m")
    assert caught.value.code == "withdraw.nothing_there"
    pushed = push(session, "m", tuned, Facts(examples=5))
    assert pushed.receipt is not None

    taken = withdraw(session, "m")

    assert taken.id == pushed.receipt.contribution
    assert taken.state == contributions_pb2.Contribution.WITHDRAWN
    assert session.round(opened.id).contributions == 0
    assert list((coordinator.folder / "contributions").iterdir()) == []
    last = sent_log.read(session.home)[-1]
    assert (last.event, last.body["contribution"]) == ("withdrawal", taken.id)
    again = push(session, "m", tuned, Facts(examples=5))
    assert session.round(opened.id).contributions == 1
    assert again.id != pushed.id


def test_a_sealed_round_gives_nothing_back(
    coordinator: Coordinator, session: Session, tmp_path: Path
) -> None:
    coordinator.open_round(min_contributions=1)
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), seed=3))
    push(session, "m", tuned, Facts(examples=5))
    with pytest.raises(ConflictError) as caught:
        withdraw(session, "m")
    assert caught.value.code == "push.no_open_round"


def test_what_was_taken_back_is_not_sent_again_to_the_same_round(
    coordinator: Coordinator, members: Any, tmp_path: Path
) -> None:
    opened = coordinator.open_round(min_contributions=3)
    first = members("org-a", 1)
    first.start()
    until("the contribution", lambda: "sent" in first.kinds(), 40)
    with Session.open(first.session.home) as wish:
        withdraw(wish, "m")
    again = members("org-a", 1)
    again.session.home.lock("contribute-m").unlink()  # as after kill -9
    thread = again.start()
    until("the word about it", lambda: bool(again.kinds()))
    assert again.kinds() == ["skipped"]
    assert "coldmerge push m" in again.steps[0].text
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), 9))
    with Session.open(coordinator.join(tmp_path / "b", "org-b")) as other:
        push(other, "m", tuned, Facts(3))  # the round changes: the loop looks again
        until("its count", lambda: other.round(opened.id).contributions == 1)
    coordinator.admin("AbandonRound", admin_pb2.RoundAction(round=opened.id, reason="nobody"))
    second = coordinator.open_round()
    thread.join(40)
    assert again.error is None
    assert [found.id for found in again.ended] == [second.id]
    with Session.open(again.session.home) as session:
        states = [found.state for found in session.contributions("m", opened.id)]
        assert states == [contributions_pb2.Contribution.WITHDRAWN]
    assert again.kinds().count("skipped") == 1


def test_what_was_taken_back_may_be_pushed_again_and_the_loop_goes_on(
    coordinator: Coordinator, members: Any, tmp_path: Path
) -> None:
    opened = coordinator.open_round(min_contributions=2, gate=GATE)
    a = members("org-a", 1)
    tuned = write_model(tmp_path / "tuned", tuned_tensors(base_tensors(), 9))
    push(a.session, "m", tuned, Facts(3))
    withdraw(a.session, "m")
    thread = a.start()
    until("the word about it", lambda: a.kinds() == ["skipped"])
    with Session.open(a.session.home) as wish:
        push(wish, "m", tuned, Facts(3))
    with Session.open(coordinator.join(tmp_path / "b", "org-b")) as other:
        theirs = write_model(tmp_path / "theirs", tuned_tensors(base_tensors(), 10))
        push(other, "m", theirs, Facts(3))
    until("the evaluation", partial(judged, a, 1), 40)
    coordinator.admin("AbandonRound", admin_pb2.RoundAction(round=opened.id, reason="enough"))
    thread.join(40)
    assert a.error is None
    assert [found.id for found in a.ended] == [opened.id]
    assert a.kinds() == ["skipped", "evaluating", "evaluated"]
