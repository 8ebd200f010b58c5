"""Continuous rounds as contributors see them: what was trained counts, up to a point."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ConflictError
from coldmerge.rounds.policy import RoundTemplate
from coldmerge.wire.v1 import common_pb2
from coldmerge_client.bases import base_of, open_round, staleness, unsent
from coldmerge_client.outbox import Outbox
from coldmerge_client.prepare import Facts, prepare
from coldmerge_client.push import push
from coldmerge_client.session import Session
from coldmerge_client.train import train
from coldmerge_coordinator.importing import set_template
from coldmerge_coordinator.store import Store, releases
from coldmerge_coordinator.verifying import Verified, verify_release
from tests.client.conftest import Coordinator, base_tensors, tuned_tensors
from tests.client.members import TRAINER, Member, config_of, run, trainings
from tests.support import until, write_model

ROOT = 2**-0.5


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    """Nudge, which waits for a word in the FIFO `option: word` before it trains."""
    path = tmp_path / "nudge.py"
    wait = (
        '        if word := self.config.options.get("word"):\n            Path(word).read_text()\n'
    )
    start = "    def train(self, job, progress=None):\n"
    assert start in TRAINER
    path.write_text(TRAINER.replace(start, start + wait))
    return path


@pytest.fixture
def continuous(coordinator: Coordinator) -> Coordinator:
    """Two arrivals a round, one merge stale at most, nobody asked."""
    rule = {"max_staleness": 1, "pause": "1s"}
    values = {"min_contributions": 2, "gate": None, "continuous": rule}
    with Store.open(coordinator.folder) as store:
        set_template(store, "m", RoundTemplate.model_validate(values))
    return coordinator


def a_word(tmp_path: Path) -> Path:
    path = tmp_path / "word"
    os.mkfifo(path)
    return path


def is_open(session: Session, base: int, contributions: int) -> common_pb2.Round | None:
    """The model's round, if it is open on that release and has so many contributions."""
    found = session.newest_round("m")
    if found is None or found.state != common_pb2.Round.OPEN:
        return None
    return found if (found.base_number, found.contributions) == (base, contributions) else None


def verified(coordinator: Coordinator, number: int) -> Verified:
    with Store.open(coordinator.folder) as store:
        return verify_release(store, "m", number, coordinator.folder)


def factors(coordinator: Coordinator, number: int) -> list[Any]:
    """What the signed record says that stale task vectors were multiplied by."""
    with Store.open(coordinator.folder) as store, store.database.read() as session:
        recipe = releases.get_record(releases.get_release(session, "m", number)).recipe
    return [value for key, value in recipe.items() if key.startswith("continuous.factor.")]


def test_who_trains_slowly_counts_in_a_later_round_for_less(
    continuous: Coordinator, members: Any, tmp_path: Path
) -> None:
    word = a_word(tmp_path)
    slow: Member = members("slow", 3, options={"word": str(word)})
    thread = slow.start()
    until("its training", lambda: slow.kinds() == ["training"])
    a, b = members("org-a", 1, rounds=2), members("org-b", 2, rounds=1)
    others = [a.start(), b.start()]
    with Session.open(continuous.join(tmp_path / "watcher", "org-w"), timeout=20) as watcher:
        until("a second round", partial(is_open, watcher, 1, 1), 40)
        word.write_text("go")
        for each in (*others, thread):
            each.join(60)
        assert [each.error for each in (slow, a, b)] == [None] * 3
        assert watcher.model("m").latest_number == 2
    assert slow.kinds() == ["training", "waiting", "training", "stale", "sending", "sent"]
    assert slow.steps[3].text == (
        "The fine-tune is stale: release 0 is one merge before release 1, so that its task "
        "vector is multiplied by 0.707"
    )
    assert trainings(slow.session.home) == 1
    assert [found.release_number for found in slow.ended] == [2]
    assert factors(continuous, 1) == []
    assert factors(continuous, 2) == [ROOT]
    assert verified(continuous, 2).answer == "exact"


def two_merges(coordinator: Coordinator, members: Any, count: int) -> None:
    """org-a and org-b make `count` releases and go home."""
    run(members("org-a", 1, rounds=count), members("org-b", 2, rounds=count))


def test_what_was_signed_for_a_round_that_sealed_is_signed_for_the_next(
    continuous: Coordinator, members: Any, trainer: Path
) -> None:
    late: Member = members("late", 3)
    home, config = late.session.home, config_of(trainer, 3)
    first = until("the first round", partial(is_open, late.session, 0, 0))
    trained = train(home, base_of(late.session, first), config)
    left = prepare(late.session, first, trained.folder, Facts(3))
    two_merges(continuous, members, 1)
    thread = late.start()
    until("the stale one", lambda: "sent" in late.kinds(), 40)
    assert Outbox(home).get(left.id).reason == (
        "not sent before its round sealed; signed again for the next"
    )
    second = until("the second round", partial(is_open, late.session, 1, 1))
    assert unsent(home, second, config) is None, "it was sent"
    tuned = write_model(home.path / "tuned", tuned_tensors(base_tensors(), 9))
    with Session.open(continuous.join(trainer.parent / "c", "org-c")) as other:
        entry = push(other, "m", tuned, Facts(3), base=0)
        assert (entry.manifest.round, entry.manifest.base_number) == (second.id, 0)
        assert entry.manifest.base_digest == first.base_digest
    thread.join(60)
    assert late.error is None
    assert trainings(home) == 1
    assert factors(continuous, 2) == [ROOT, ROOT]
    assert verified(continuous, 2).answer == "exact"


def test_beyond_the_admitted_staleness_it_is_trained_anew(
    continuous: Coordinator, members: Any, trainer: Path
) -> None:
    late: Member = members("late", 3)
    home, config = late.session.home, config_of(trainer, 3)
    first = until("the first round", partial(is_open, late.session, 0, 0))
    train(home, base_of(late.session, first), config)
    assert staleness(first, 0) is None
    two_merges(continuous, members, 2)
    third = until("the third round", partial(is_open, late.session, 2, 0))
    assert unsent(home, third, config) is None
    tuned = write_model(home.path / "tuned", tuned_tensors(base_tensors(), 9))
    with pytest.raises(ConflictError) as caught:
        push(late.session, "m", tuned, Facts(3), base=0)
    assert caught.value.code == "push.too_stale"
    assert (caught.value.expected, caught.value.got) == ("release 2 or 1", "release 0")
    with pytest.raises(ConflictError):
        base_of(late.session, third, number=0)
    assert open_round(late.session, "m", 1).id == third.id
    late.start()
    until("a contribution", lambda: "sent" in late.kinds(), 40)
    assert "stale" not in late.kinds()
    assert trainings(home) == 2
