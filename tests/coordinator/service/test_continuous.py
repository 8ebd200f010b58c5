"""What a continuous round takes from the wire: stale bases, copies, second contributions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.errors import ConflictError, TaskVectorError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import admin_pb2, common_pb2, contributions_pb2, rounds_pb2, screening_pb2
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import releases
from coldmerge_coordinator.store.models import Round
from coldmerge_coordinator.verifying import verify_release
from coldmerge_coordinator.worker import run_once
from tests.harness import MODEL, Array, Live, MachineClient, coordinator

RULE = {"max_staleness": 1}
State = contributions_pb2.Contribution


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    random = np.random.default_rng(7)
    tensors = {"large.weight": random.standard_normal((64, 32)).astype(np.float32)}
    with coordinator(tmp_path / "hub", tensors) as running:
        yield running


def delta(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {"large.weight": random.standard_normal((64, 32)).astype(np.float32)}


def a_round(live: Live, **policy: object) -> Round:
    return live.open_round(continuous=RULE, **policy)


def merged(live: Live, number: int) -> None:
    """The round that has sealed becomes release `number`."""
    assert run_once(live.store, live.clock)
    with live.store.database.read() as session:
        assert releases.latest_release(session, MODEL).number == number


def on(live: Live, number: int) -> dict[str, Any]:
    """The base of a manifest."""
    with live.store.database.read() as session:
        release = releases.get_release(session, MODEL, number)
    return {"base_number": number, "base_digest": release.content_digest}


def standing(org: MachineClient, round_: Round) -> list[tuple[str, str]]:
    request = contributions_pb2.ListContributionsRequest(model=MODEL, round=round_.id)
    found = call(org.contributions.List, request).contributions
    return [(State.State.Name(each.state), each.reason) for each in found]


def two_releases(live: Live, a: MachineClient, b: MachineClient) -> None:
    for number in (1, 2):
        round_ = a_round(live)
        a.contribute(round_, delta(10 * number))
        b.contribute(round_, delta(10 * number + 1))
        merged(live, number)


def test_a_stale_contribution_counts_for_less_and_everybody_can_see_it(live: Live) -> None:
    a, b, slow = (live.machine(name) for name in ("a", "b", "slow"))
    two_releases(live, a, b)
    round_ = a_round(live)
    shown = call(a.rounds.Get, rounds_pb2.GetRoundRequest(id=round_.id))
    assert [(base.number, base.staleness) for base in shown.bases] == [(2, 0), (1, 1)]
    assert shown.bases[1].digest == on(live, 1)["base_digest"]
    assert shown.bases[1].discount == 2**-0.5
    slow.contribute(round_, delta(5), **on(live, 1))
    request = admin_pb2.RoundAction(round=round_.id)
    (waiting,) = call(live.local_admin.ListRoundContributions, request).contributions
    assert (waiting.base_number, waiting.discount) == (1, 2**-0.5)
    a.contribute(round_, delta(6))
    merged(live, 3)
    found = call(live.local_admin.ListRoundContributions, request).contributions
    assert {each.contributor: each.discount for each in found} == {"a": 1.0, "slow": 2**-0.5}
    assert not call(a.rounds.Get, rounds_pb2.GetRoundRequest(id=round_.id)).bases
    (entry,) = call(slow.screening.GetHistory, screening_pb2.GetHistoryRequest()).entries
    assert (entry.discount, entry.clip_factor, entry.release_number) == (2**-0.5, 1.0, 3)
    assert verify_release(live.store, MODEL, None, live.folder).answer == "exact"


@pytest.mark.parametrize(
    ("number", "base", "code"),
    [
        (0, {}, "manifest.too_stale"),
        (3, {"base_digest": "a" * 64}, "manifest.too_stale"),
        (1, {"base_digest": "a" * 64}, "manifest.wrong_base"),
        (2, {"base_digest": "a" * 64}, "manifest.wrong_base"),
    ],
)
def test_a_base_that_the_round_does_not_admit_is_refused(
    live: Live, number: int, base: dict[str, Any], code: str
) -> None:
    a, b = live.machine("a"), live.machine("b")
    two_releases(live, a, b)
    round_ = a_round(live)
    named = {"base_number": number, **(base or on(live, number))}
    manifest, _ = a.manifest(round_, delta(5), **named)
    with pytest.raises(TaskVectorError) as caught:
        a.begin(manifest)
    assert caught.value.code == code
    assert caught.value.got is not None
    assert f"release {number}" in caught.value.got


def test_an_old_number_with_the_newest_digest_is_not_that_release(live: Live) -> None:
    a, b = live.machine("a"), live.machine("b")
    two_releases(live, a, b)
    round_ = a_round(live)
    manifest, _ = a.manifest(round_, delta(5), base_number=1, base_digest=round_.base_digest)
    with pytest.raises(TaskVectorError) as caught:
        a.begin(manifest)
    assert caught.value.code == "manifest.wrong_base"
    assert caught.value.expected == f"release 1, {on(live, 1)['base_digest']}"


def test_a_windowed_round_takes_nothing_stale(live: Live) -> None:
    a, b = live.machine("a"), live.machine("b")
    two_releases(live, a, b)
    round_ = live.open_round()
    manifest, _ = a.manifest(round_, delta(5), **on(live, 1))
    with pytest.raises(TaskVectorError) as caught:
        a.begin(manifest)
    assert caught.value.code == "manifest.wrong_base"
    assert not call(a.rounds.Get, rounds_pb2.GetRoundRequest(id=round_.id)).bases


def test_what_was_merged_already_does_not_count_twice(live: Live) -> None:
    a, b, c = (live.machine(name) for name in "abc")
    two_releases(live, a, b)
    round_ = a_round(live)
    a.contribute(round_, delta(20), **on(live, 1))
    b.contribute(round_, delta(21))
    c.contribute(round_, delta(20), **on(live, 1))
    ((state, own),) = standing(a, round_)
    assert state == "QUARANTINED"
    assert own.startswith("its tensor large.weight was merged in round round-")
    assert standing(b, round_)[0][0] == "QUARANTINED", "not as if it were of the newest, either"
    ((state, of_others),) = standing(c, round_)
    assert state == "QUARANTINED"
    assert of_others == "its tensor large.weight has the bytes that another organization sent"
    a.contribute(round_, delta(30))
    b.contribute(round_, delta(31))
    merged(live, 3)


def test_what_was_not_merged_may_be_sent_again(live: Live) -> None:
    a, b = live.machine("a"), live.machine("b")
    two_releases(live, a, b)
    first = a_round(live)
    a.contribute(first, delta(5))
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=first.id, reason="no"))
    admin.rollback(live.store, MODEL, 1, "2 was bad", live.clock.now())
    round_ = a_round(live)
    a.contribute(round_, delta(20), **on(live, 1))
    b.contribute(round_, delta(21))
    assert [standing(org, round_)[0][0] for org in (a, b)] == ["ADMITTED"] * 2
    merged(live, 4)


def test_a_fresh_contribution_takes_the_place_of_a_stale_one(live: Live) -> None:
    a, b = live.machine("a"), live.machine("b")
    two_releases(live, a, b)
    round_ = a_round(live)
    a.contribute(round_, delta(5), **on(live, 1))
    a.contribute(round_, delta(6))
    assert sorted(standing(a, round_)) == [("ADMITTED", ""), ("REPLACED", "")]
    b.contribute(round_, delta(7))
    merged(live, 3)
    with live.store.database.read() as session:
        recipe = releases.get_record(releases.latest_release(session, MODEL)).recipe
    assert not any(key.startswith("continuous.factor") for key in recipe)
    strict = a_round(live, second_contribution="refuse")
    a.contribute(strict, delta(8))
    with pytest.raises(ConflictError) as caught:
        a.contribute(strict, delta(9), **on(live, 2))
    assert caught.value.code == "contribution.second"


def test_the_frozen_policy_says_what_a_contributor_agrees_to(live: Live) -> None:
    round_ = a_round(live)
    a = live.machine("a")
    shown = call(a.rounds.Get, rounds_pb2.GetRoundRequest(id=round_.id))
    assert shown.state == common_pb2.Round.OPEN
    said = json.loads(shown.policy_json)["continuous"]
    assert said == {"max_staleness": 1, "discount": 0.5, "pause": "5m"}
