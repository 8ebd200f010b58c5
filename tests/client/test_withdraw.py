"""Taking a contribution back."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.wire.v1 import contributions_pb2
from coldmerge_client import sent_log
from coldmerge_client.prepare import Facts
from coldmerge_client.push import push
from coldmerge_client.session import Session
from coldmerge_client.withdraw import withdraw
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.support import write_model


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
