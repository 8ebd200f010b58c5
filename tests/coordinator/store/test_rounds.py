"""Rounds in the database: compare-and-set, frozen inputs, publishing in one transaction."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from coldmerge.core.documents import Signed
from coldmerge.core.errors import ColdmergeError, ConflictError, ManifestError, NotFoundError
from coldmerge.rounds import state
from coldmerge.rounds.policy import GatePolicy, RoundPolicy
from coldmerge_coordinator.store import Store, contributions, releases, rounds
from coldmerge_coordinator.store.models import Contribution, Contributor, Notice, Round

HOUR = timedelta(hours=1)
Look = Callable[[str], Round]
Send = Callable[..., tuple[state.Effect, ...]]
UNGATED = RoundPolicy(min_contributions=2, gate=None, webhook="https://example.org/hook")


def notices(store: Store) -> list[str]:
    with store.database.read() as session:
        return [row.body["kind"] for row in session.scalars(select(Notice).order_by(Notice.id))]


def test_a_round_opens_on_the_latest_release(
    store: Store, open_round: Callable[..., str], look: Look, now: datetime
) -> None:
    row = look(open_round(RoundPolicy(min_contributions=2, duration=HOUR)))
    assert (row.state, row.active, row.version, row.base_number) == ("OPEN", True, 1, 0)
    assert row.closes_at == now + HOUR
    assert rounds.get_policy(row).duration == HOUR
    with store.database.read() as session:
        assert row.base_digest == releases.latest_release(session, "triage").content_digest
        active = rounds.active_round(session, "triage")
        assert active is not None
        assert active.id == row.id
        assert [item.id for item in rounds.active_rounds(session)] == [row.id]
        assert rounds.newest_round(session, "triage") == active


def test_a_second_round_is_refused(open_round: Callable[..., str]) -> None:
    first = open_round()
    with pytest.raises(ConflictError) as caught:
        open_round()
    assert caught.value.code == "round.already_active"
    assert caught.value.ids["round"] == first


def test_racing_to_open_makes_one_round(
    store: Store, model: str, open_round: Callable[..., str]
) -> None:
    outcomes: list[str] = []

    def race() -> None:
        try:
            outcomes.append(open_round())
        except ColdmergeError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("round.already_active") == 7
    with store.database.read() as session:
        assert len(rounds.list_rounds(session, model)) == 1


def test_unknown_rounds_and_models(store: Store, model: str, now: datetime) -> None:
    with store.database.write() as session:
        with pytest.raises(NotFoundError):
            rounds.get(session, "round-0")
        with pytest.raises(NotFoundError):
            rounds.open_round(session, "other", RoundPolicy(), now)
        assert rounds.newest_round(session, model) is None


def test_the_last_contribution_seals_and_freezes(
    store: Store, open_round: Callable[..., str], contribute: Callable[..., None], look: Look
) -> None:
    round_id = open_round()
    contribute(round_id, "b")
    assert look(round_id).state == "OPEN"
    contribute(round_id, "a")
    row = look(round_id)
    assert (row.state, row.active, row.version) == ("SEALED", True, 3)
    with store.database.read() as session:
        inputs = contributions.sealed(session, row)
        assert [item.manifest_digest for item in inputs] == row.sealed_inputs
        assert row.sealed_inputs == sorted(row.sealed_inputs or ())
        assert {item.contributor for item in inputs} == {"a", "b"}
        assert [item.id for item in rounds.rounds_to_merge(session)] == [round_id]


def test_a_sealed_round_takes_no_more(
    store: Store, open_round: Callable[..., str], contribute: Callable[..., None], look: Look
) -> None:
    round_id = open_round()
    contribute(round_id, "a")
    contribute(round_id, "b")
    with pytest.raises(ConflictError) as caught:
        contribute(round_id, "c")
    assert caught.value.code == "round.wrong_state"
    with store.database.read() as session:
        assert contributions.admitted_of(session, round_id, "c") is None
        assert len(contributions.admitted(session, round_id)) == 2


def test_inputs_leave_out_the_replaced_and_withdrawn(
    store: Store,
    open_round: Callable[..., str],
    contribute: Callable[..., None],
    send: Send,
    look: Look,
) -> None:
    round_id = open_round(RoundPolicy(min_contributions=3, max_contributions=9))
    for name in "abc":
        contribute(round_id, name)
    with store.database.write() as session:
        row = contributions.admitted_of(session, round_id, "b")
        assert row is not None
        row.state = contributions.WITHDRAWN
        rounds.apply(
            session, rounds.get(session, round_id), state.Withdrawn(), row.accepted_at, store.signer
        )
    send(round_id, state.Seal())
    with store.database.read() as session:
        inputs = contributions.sealed(session, look(round_id))
        assert {item.contributor for item in inputs} == {"a", "c"}
        assert len(contributions.of_round(session, round_id)) == 3


def test_a_vanished_input_is_noticed(
    store: Store, open_round: Callable[..., str], contribute: Callable[..., None]
) -> None:
    round_id = open_round()
    contribute(round_id, "a")
    contribute(round_id, "b")
    with store.database.write() as session:
        session.delete(session.scalars(select(Contribution).limit(1)).one())
        session.flush()
        with pytest.raises(ColdmergeError) as caught:
            contributions.sealed(session, rounds.get(session, round_id))
    assert caught.value.code == "round.input_missing"


def test_publishing_is_one_transaction(
    store: Store, candidate: Callable[..., str], look: Look
) -> None:
    row = look(candidate(UNGATED))
    assert (row.state, row.active, row.release_number) == ("PUBLISHED", False, 1)
    assert row.ended_at is not None
    assert notices(store) == ["round.published"]
    with store.database.read() as session:
        record = releases.get_record(releases.latest_release(session, "triage"))
        assert rounds.active_round(session, "triage") is None
    assert (record.number, record.content_digest) == (1, row.candidate_digest)
    assert record.master_digest == row.candidate_master
    assert record.parents == (row.base_digest,)
    assert list(record.contributions) == row.sealed_inputs
    assert record.recipe == {
        "method": "mean",
        "weights": "uniform",
        "mode": "screened",
        "screening.clip": 2.0,
        "screening.reference_norm": 1.0,
    }
    assert (record.round, record.flags) == (row.id, ("ungated",))


DIES = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from coldmerge.core.documents import Signed
from coldmerge_coordinator.store import Store, releases, rounds

store = Store.open(Path(sys.argv[1]))
with store.database.write() as session:
    row = rounds.get(session, sys.argv[2], lock=True)
    signed = Signed(sys.stdin.buffer.read(), b"")
    rounds.record_evaluation(session, row, signed, datetime.now(UTC), store.signer)
    assert row.state == "PUBLISHED" and releases.latest_release(session, row.model).number == 1
    os.kill(os.getpid(), signal.SIGKILL)
"""


def evaluate(store: Store, round_id: str, signed: Signed, now: datetime) -> None:
    with store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        rounds.record_evaluation(session, row, signed, now, store.signer)


def test_a_crash_while_publishing_leaves_the_candidate(
    store: Store,
    candidate: Callable[..., str],
    judgement: Callable[..., Signed],
    look: Look,
    now: datetime,
) -> None:
    round_id = candidate()
    evaluate(store, round_id, judgement(round_id, "a", 1), now)
    died = subprocess.run(
        [sys.executable, "-c", DIES, str(store.folder), round_id],
        input=judgement(round_id, "b", 1).document,
        capture_output=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    row = look(round_id)
    assert (row.state, row.release_number) == ("CANDIDATE", None)
    with store.database.read() as session:
        assert releases.latest_release(session, "triage").number == 0
        assert rounds.count_evaluations(session, rounds.get(session, round_id)) == 1
    evaluate(store, round_id, judgement(round_id, "b", 1), now)
    assert look(round_id).state == "PUBLISHED"


@pytest.mark.parametrize(("points", "final", "number"), [(1, "PUBLISHED", 1), (-1, "REJECTED", 0)])
def test_evaluations_decide(
    store: Store,
    candidate: Callable[..., str],
    judgement: Callable[..., Signed],
    look: Look,
    now: datetime,
    points: int,
    final: str,
    number: int,
) -> None:
    round_id = candidate()
    evaluate(store, round_id, judgement(round_id, "a", points), now)
    assert look(round_id).state == "CANDIDATE"
    evaluate(store, round_id, judgement(round_id, "b", points), now)
    assert look(round_id).state == final
    with store.database.read() as session:
        assert releases.latest_release(session, "triage").number == number
        assert rounds.count_evaluations(session, rounds.get(session, round_id)) == 2


def test_the_last_evaluation_of_a_contributor_counts(
    store: Store,
    candidate: Callable[..., str],
    judgement: Callable[..., Signed],
    look: Look,
    now: datetime,
) -> None:
    round_id = candidate()
    evaluate(store, round_id, judgement(round_id, "a", -50), now)
    evaluate(store, round_id, judgement(round_id, "a", 2), now)
    evaluate(store, round_id, judgement(round_id, "b", 0), now)
    assert look(round_id).state == "PUBLISHED"


def test_an_evaluation_of_another_candidate_is_refused(
    store: Store,
    candidate: Callable[..., str],
    judgement: Callable[..., Signed],
    look: Look,
    send: Send,
    now: datetime,
) -> None:
    first = candidate()
    signed = judgement(first, "a", 1)
    send(first, state.Abandon("again"))
    second = candidate(seed=2)
    with pytest.raises(ManifestError) as caught:
        evaluate(store, second, signed, now)
    assert caught.value.code == "evaluation.mismatch"
    with pytest.raises(ConflictError):
        evaluate(store, first, signed, now)
    with store.database.read() as session:
        assert rounds.count_evaluations(session, rounds.get(session, first)) == 0
    assert look(second).state == "CANDIDATE"


def test_the_revoked_neither_count_nor_are_waited_for(
    store: Store,
    candidate: Callable[..., str],
    judgement: Callable[..., Signed],
    look: Look,
    send: Send,
    now: datetime,
) -> None:
    round_id = candidate()
    evaluate(store, round_id, judgement(round_id, "b", -50), now)
    with store.database.write() as session:
        session.get_one(Contributor, "b").revoked_at = now
    evaluate(store, round_id, judgement(round_id, "a", 1), now)
    assert look(round_id).state == "PUBLISHED"


def test_all_evaluators_gone_holds_and_an_admin_decides(
    store: Store, candidate: Callable[..., str], look: Look, send: Send
) -> None:
    policy = RoundPolicy(
        min_contributions=2, gate=GatePolicy(window=HOUR), webhook="https://example.org/hook"
    )
    round_id = candidate(policy)
    assert send(round_id, state.Tick(), HOUR - timedelta(seconds=1)) == ()
    version = look(round_id).version
    send(round_id, state.Tick(), HOUR)
    assert look(round_id).held
    assert send(round_id, state.Tick(), 2 * HOUR) == ()
    assert look(round_id).version == version + 1
    assert notices(store) == ["round.stuck"]
    send(round_id, state.Resolve(publish=True, reason="looked at it"), 3 * HOUR)
    row = look(round_id)
    assert (row.state, row.held, row.reason) == ("PUBLISHED", False, "looked at it")
    with store.database.read() as session:
        record = releases.get_record(releases.get_release(session, "triage", 1))
    assert record.flags == ("unchecked",)


def test_a_stale_reader_cannot_move_the_round(
    store: Store, open_round: Callable[..., str], send: Send, now: datetime
) -> None:
    round_id = open_round()
    with store.database.read() as session:
        stale = rounds.get(session, round_id)
    with store.database.write() as session:
        fresh = rounds.get(session, round_id, lock=True)
        rounds.apply(session, fresh, state.Contributed(), now, store.signer)
    with pytest.raises(ConflictError) as caught, store.database.write() as session:
        rounds.apply(session, stale, state.Abandon("late"), now, store.signer)
    assert caught.value.code == "round.moved"


def test_racing_events_move_the_round_once(
    store: Store, candidate: Callable[..., str], send: Send, look: Look, model: str
) -> None:
    """Eight processes' worth of ticks at the timeout: one release."""
    policy = RoundPolicy(min_contributions=2, gate=GatePolicy(on_timeout="publish_flagged"))
    round_id = candidate(policy)
    published: list[state.Effect] = []

    def tick() -> None:
        effects = send(round_id, state.Tick(), 2 * HOUR)
        published.extend(effect for effect in effects if isinstance(effect, state.Publish))

    threads = [threading.Thread(target=tick) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert published == [state.Publish(("unchecked",))]
    with store.database.read() as session:
        assert [row.number for row in releases.list_releases(session, model)] == [0, 1]
    assert look(round_id).state == "PUBLISHED"


def test_rounds_are_listed_newest_first(store: Store, model: str, now: datetime) -> None:
    opened = []
    for hour in range(3):
        with store.database.write() as session:
            row = rounds.open_round(session, model, RoundPolicy(), now + hour * HOUR)
            rounds.apply(session, row, state.Abandon("next"), now + hour * HOUR, store.signer)
            opened.append(row.id)
    with store.database.read() as session:
        assert [row.id for row in rounds.list_rounds(session, model)] == opened[::-1]
        assert [row.id for row in rounds.list_rounds(session, model, limit=1)] == opened[2:]
        newest = rounds.newest_round(session, model)
        assert newest is not None
        assert newest.id == opened[2]
        assert rounds.rounds_to_merge(session) == []


def test_an_evaluation_that_is_stored_already_changes_nothing(
    store: Store,
    candidate: Callable[..., str],
    judgement: Callable[..., Signed],
    look: Look,
    now: datetime,
) -> None:
    """An evaluator that did not hear the answer reports again, even after the release."""
    round_id = candidate()
    evaluate(store, round_id, judgement(round_id, "a", 1), now)
    version = look(round_id).version
    evaluate(store, round_id, judgement(round_id, "a", 1), now)
    assert look(round_id).version == version
    evaluate(store, round_id, judgement(round_id, "b", 1), now)
    evaluate(store, round_id, judgement(round_id, "b", 1), now)
    assert (look(round_id).state, look(round_id).release_number) == ("PUBLISHED", 1)
    with pytest.raises(ConflictError, match="No evaluation is awaited"):
        evaluate(store, round_id, judgement(round_id, "b", 2), now)
