"""Contributions that are taken back, over real TLS."""

from __future__ import annotations

import pytest

from coldmerge.core.errors import ConflictError, ManifestError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import admin_pb2, common_pb2, contributions_pb2
from coldmerge_coordinator.store import contributions, releases
from coldmerge_coordinator.worker import run_once
from tests.coordinator.service.conftest import current, rows_of
from tests.harness import MODEL, Live, deltas


def test_withdrawal_takes_the_bytes_and_the_count_back(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round()
    org.contribute(round_, deltas())
    row = rows_of(live)[0]
    request = contributions_pb2.WithdrawRequest(id=row.id)
    for _ in range(2):
        answer = call(org.contributions.Withdraw, request)
        assert answer.state == contributions_pb2.Contribution.WITHDRAWN
    assert list(live.store.payloads.listed()) == []
    manifest, _payload = org.manifest(round_, deltas())
    org.begin(manifest)
    live.machine("b").contribute(round_, deltas(2))
    assert current(live, round_).state == "OPEN"


def test_withdrawal_after_the_seal_is_refused(live: Live) -> None:
    org = live.machine("a")
    org.contribute(live.open_round(min_contributions=1), deltas())
    with pytest.raises(ConflictError) as caught:
        call(org.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=rows_of(live)[0].id))
    assert caught.value.code == "round.wrong_state"
    assert rows_of(live)[0].state == contributions.ADMITTED
    assert len(list(live.store.payloads.listed())) == 1


def test_a_withdrawn_manifest_cannot_come_back(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    org.commit(begun.upload_id)
    call(org.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=rows_of(live)[0].id))
    with pytest.raises(ManifestError) as caught:
        org.begin(manifest)
    assert caught.value.code == "manifest.replayed"


def test_withdrawal_after_the_round_erases_the_bytes_and_says_what_stays(live: Live) -> None:
    org, other = live.machine("a"), live.machine("b")
    round_ = live.open_round()
    org.contribute(round_, deltas())
    other.contribute(round_, deltas(2))
    assert run_once(live.store, live.clock)
    row = next(row for row in rows_of(live) if row.contributor == "a")
    answer = call(org.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=row.id))
    assert answer.state == contributions_pb2.Contribution.WITHDRAWN
    assert answer.reason == (
        "withdrawn; its update stays in release 1 and those made from it "
        "until an admin re-merges without it"
    )
    kept = [found.name for found in live.store.payloads.listed()]
    assert len(kept) == 1
    assert row.payload not in kept
    request = admin_pb2.RemergeRequest(model=MODEL, without=["a"], reason="a leaves")
    again = call(live.local_admin.Remerge, request)
    assert (again.state, again.remerge) == (common_pb2.Round.SEALED, True)
    mine = next(row for row in rows_of(live) if row.contributor == "b")
    with pytest.raises(ConflictError) as caught:
        call(other.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=mine.id))
    assert caught.value.code == "round.wrong_state"
    assert run_once(live.store, live.clock)
    with live.store.database.read() as session:
        record = releases.get_record(releases.latest_release(session, MODEL))
    assert (record.number, record.flags) == (2, ("remerged", "ungated"))
