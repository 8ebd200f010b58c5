"""Following rounds and judging candidates over the wire."""

from __future__ import annotations

from typing import Any

import pytest

from coldmerge.core.clock import SystemClock
from coldmerge.core.documents import Evaluation, Scores, sign
from coldmerge.core.errors import ConflictError, ManifestError, NotFoundError
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.convert import signed_to_proto
from coldmerge.wire.v1 import common_pb2, rounds_pb2
from coldmerge_coordinator import worker
from tests.harness import MODEL, Live, MachineClient, deltas


def _candidate(live: Live, *contributors: str, **gate: Any) -> list[MachineClient]:
    clients = [live.machine(name) for name in contributors]
    round_ = live.open_round(min_contributions=len(clients), gate=gate)
    for index, client in enumerate(clients):
        client.contribute(round_, deltas(index))
    assert worker.run_once(live.store, SystemClock())
    return clients


def _newest(org: MachineClient) -> common_pb2.Round:
    rows = call(org.rounds.List, rounds_pb2.ListRoundsRequest(model=MODEL)).rounds
    found: common_pb2.Round = rows[0]
    return found


def _evaluation(org: MachineClient, gained: int = 5, **changes: Any) -> Evaluation:
    round_ = _newest(org)
    fields: dict[str, Any] = {
        "federation": "test",
        "model": MODEL,
        "round": round_.id,
        "contributor": org.contributor,
        "base_digest": round_.base_digest,
        "candidate_digest": round_.candidate_digest,
        "n": 100,
        "base": Scores(accuracy=0.50, macro_f1=0.5),
        "candidate": Scores(accuracy=0.50 + gained / 100, macro_f1=0.5),
        "gained": max(gained, 0),
        "lost": max(-gained, 0),
        "probe_seed": round_.probe_seed,
        "created_at": org.live.clock.now(),
    }
    return Evaluation(**{**fields, **changes})


def _report(org: MachineClient, evaluation: Evaluation) -> common_pb2.Round:
    signed = sign(evaluation, org.keys.identity)
    request = rounds_pb2.ReportEvaluationRequest(evaluation=signed_to_proto(signed))
    answer: common_pb2.Round = call(org.rounds.ReportEvaluation, request, patience=0)
    return answer


def test_a_round_as_everybody_sees_it(live: Live) -> None:
    org = live.machine("a", "auditor")
    opened = live.open_round(min_contributions=2, duration="1h")
    found = call(org.rounds.Get, rounds_pb2.GetRoundRequest(id=opened.id))
    assert (found.model, found.state, found.min_contributions) == (MODEL, found.OPEN, 2)
    assert found.HasField("closes_at")
    assert found.base_digest == opened.base_digest
    assert found.probe_seed == opened.probe_seed
    assert '"min_contributions": 2' in found.policy_json
    assert _newest(org) == found


def test_rounds_that_do_not_exist(live: Live) -> None:
    org = live.machine("a")
    with pytest.raises(NotFoundError):
        call(org.rounds.Get, rounds_pb2.GetRoundRequest(id="round-0"))
    with pytest.raises(NotFoundError):
        call(org.rounds.List, rounds_pb2.ListRoundsRequest(model="ghost"))
    with pytest.raises(NotFoundError):
        org.collect(org.rounds.Watch, rounds_pb2.WatchRoundsRequest(model="ghost"))


def test_a_watch_sees_every_state(live: Live) -> None:
    org = live.machine("watcher", "evaluator")
    stream = server_stream(
        org.rounds.Watch, rounds_pb2.WatchRoundsRequest(model=MODEL), deadline=60
    )
    round_ = live.open_round(min_contributions=1)
    assert next(stream).state == common_pb2.Round.OPEN
    live.machine("a").contribute(round_, deltas())
    assert next(stream).state == common_pb2.Round.SEALED
    assert worker.run_once(live.store, SystemClock())
    seen = [next(stream).state]
    while seen[-1] != common_pb2.Round.PUBLISHED:
        seen.append(next(stream).state)
    assert seen == sorted(seen)


def test_good_evaluations_publish(live: Live) -> None:
    a, b = _candidate(live, "a", "b", min_evaluators=2)
    waiting = _report(a, _evaluation(a))
    assert (waiting.state, waiting.evaluations) == (common_pb2.Round.CANDIDATE, 1)
    done = _report(b, _evaluation(b))
    assert (done.state, done.release_number) == (common_pb2.Round.PUBLISHED, 1)


def test_bad_evaluations_reject(live: Live) -> None:
    (a,) = _candidate(live, "a")
    done = _report(a, _evaluation(a, gained=-20))
    assert done.state == common_pb2.Round.REJECTED
    assert done.reason


def test_the_last_evaluation_of_a_contributor_counts(live: Live) -> None:
    a, b = _candidate(live, "a", "b", min_evaluators=2)
    _report(a, _evaluation(a, gained=-40))
    again = _report(a, _evaluation(a, gained=3))
    assert again.evaluations == 1
    assert _report(b, _evaluation(b)).state == common_pb2.Round.PUBLISHED


def test_an_evaluator_who_sent_nothing_may_judge(live: Live) -> None:
    _candidate(live, "a", min_evaluators=2)
    judge = live.machine("judge", "evaluator")
    assert _report(judge, _evaluation(judge)).evaluations == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"contributor": "b"}, "evaluation.wrong_addressee"),
        ({"federation": "other"}, "evaluation.wrong_addressee"),
        ({"model": "other"}, "evaluation.wrong_addressee"),
        ({"candidate_digest": "0" * 64}, "evaluation.mismatch"),
        ({"base_digest": "0" * 64}, "evaluation.mismatch"),
        ({"probe_seed": 1}, "evaluation.mismatch"),
        ({"lost": 90}, "evaluation.impossible"),
    ],
)
def test_evaluations_that_lie(live: Live, changes: dict[str, Any], code: str) -> None:
    (a,) = _candidate(live, "a")
    with pytest.raises(ManifestError) as caught:
        _report(a, _evaluation(a, **changes))
    assert caught.value.code == code
    assert _newest(a).evaluations == 0


def test_an_evaluation_signed_by_another(live: Live) -> None:
    (a,) = _candidate(live, "a")
    signed = sign(_evaluation(a), live.machine("b").keys.identity)
    request = rounds_pb2.ReportEvaluationRequest(evaluation=signed_to_proto(signed))
    with pytest.raises(ManifestError) as caught:
        call(a.rounds.ReportEvaluation, request, patience=0)
    assert caught.value.code == "document.bad_signature"


def test_an_evaluation_when_none_is_awaited(live: Live) -> None:
    (a,) = _candidate(live, "a")
    evaluation = _evaluation(a)
    published = _report(a, evaluation)
    assert _report(a, evaluation) == published, "the same again is answered alike"
    another = evaluation.model_copy(update={"created_at": live.clock.now()})
    with pytest.raises(ConflictError) as caught:
        _report(a, another)
    assert caught.value.code == "round.wrong_state"
    with pytest.raises(NotFoundError):
        _report(a, _evaluation(a, round="round-0"))


def test_the_webhook_is_nobodys_business(live: Live) -> None:
    """Its URL is a credential with most receivers."""
    round_ = live.open_round(webhook="https://hooks.example.org/T0/B0/secret")
    org = live.machine("a", "auditor")
    found = call(org.rounds.Get, rounds_pb2.GetRoundRequest(id=round_.id))
    assert b"secret" not in found.SerializeToString()
