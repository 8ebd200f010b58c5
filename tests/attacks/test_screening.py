"""Contributions that are too loud, too faint or not one's own: over sockets, to the release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.documents import Receipt, verify
from coldmerge.core.errors import ColdmergeError, ConflictError, NotFoundError, TaskVectorError
from coldmerge.wire.calls import call
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import contributions_pb2, screening_pb2
from coldmerge_coordinator.service.admin import revoke
from coldmerge_coordinator.store import contributions, releases, rounds
from coldmerge_coordinator.store.models import AuditLeaf, Contribution, Notice, Round, Upload
from coldmerge_coordinator.worker import run_once
from tests.harness import Array, Live, MachineClient, coordinator, deltas, model_tensors

REFERENCE = float(np.sqrt(sum(np.sum(a.astype("f8") ** 2) for a in deltas(1).values())))
KNOWN = {"screening": {"reference_norm": REFERENCE}}
State = contributions_pb2.Contribution


def times(scale: float, seed: int = 9) -> dict[str, Array]:
    return {name: (a.astype("f8") * scale).astype("<f4") for name, a in deltas(seed).items()}


def standing(client: MachineClient) -> list[tuple[str, str]]:
    """(state, reason) of the caller's contributions, oldest first."""
    found = call(client.contributions.List, contributions_pb2.ListContributionsRequest())
    rows = list(reversed(found.contributions))
    return [(State.State.Name(row.state), row.reason) for row in rows]


def states(client: MachineClient) -> list[str]:
    return sorted(state for state, _ in standing(client))


def waiting(boss: MachineClient) -> list[Any]:
    found = call(boss.screening.ListQuarantine, screening_pb2.ListQuarantineRequest())
    return list(found.contributions)


def decide(boss: MachineClient, verb: str, identifier: str, reason: str = "") -> Any:
    request = screening_pb2.QuarantineDecision(contribution=identifier, reason=reason)
    return call(getattr(boss.screening, verb), request, patience=0)


def kinds(live: Live) -> list[str]:
    with live.store.database.read() as session:
        return [row.kind for row in session.query(AuditLeaf).order_by(AuditLeaf.position)]


def master(live: Live, number: int) -> dict[str, Array]:
    with live.store.database.read() as session:
        release = releases.get_release(session, "triage", number)
        digests = releases.get_masters(session, release.master_digest)
    return {name: np.fromfile(live.store.blobs.path(sha), "<f4") for name, sha in digests.items()}


def state_of(live: Live, round_: Round) -> Round:
    with live.store.database.read() as session:
        return rounds.get(session, round_.id)


def files(live: Live) -> set[str]:
    return {found.name for found in live.store.payloads.listed()}


@pytest.mark.parametrize("scale", [1000.0, 1e30, 1e-4])
def test_an_outlier_is_durable_and_waits(live: Live, scale: float) -> None:
    round_ = live.open_round(**KNOWN, webhook="http://127.0.0.1:9/hook")
    org, admin = live.machine("a"), live.machine("boss", "admin")
    signed = signed_from_proto(org.contribute(round_, times(scale)))
    receipt = verify(signed, Receipt, live.store.signer.key.public_key())
    (found,) = waiting(admin)
    assert found.contribution.id == receipt.contribution
    assert (found.contribution.contributor, found.reference_norm) == ("a", REFERENCE)
    assert "times the round's reference norm" in found.reason
    assert standing(org) == [("QUARANTINED", found.reason)]
    row = state_of(live, round_)
    assert row.state == "OPEN"
    with live.store.database.read() as session:
        assert contributions.admitted(session, round_.id) == []
        (notice,) = session.query(Notice)
    assert (notice.body["kind"], notice.body["contributor"]) == ("contribution.quarantined", "a")
    assert kinds(live)[-2:] == ["contribution.received", "contribution.quarantined"]


def test_an_accepted_outlier_counts_and_is_clipped(live: Live) -> None:
    round_ = live.open_round(min_contributions=3, **KNOWN)
    admin, loud = live.machine("boss", "admin"), live.machine("loud")
    loud.contribute(round_, times(1000.0))
    for seed, name in enumerate(("b", "c"), 2):
        live.machine(name).contribute(round_, deltas(seed))
    assert state_of(live, round_).state == "OPEN"
    decided = decide(admin, "Accept", waiting(admin)[0].contribution.id, "they told us")
    assert State.State.Name(decided.state) == "ADMITTED"
    assert decided.reason == "they told us"
    assert state_of(live, round_).state == "SEALED"
    assert waiting(admin) == []
    before = master(live, 0)
    assert run_once(live.store, live.clock)
    assert state_of(live, round_).state == "PUBLISHED"
    after = master(live, 1)
    honest = {n: (deltas(2)[n].astype("f8") + deltas(3)[n]).ravel() / 3 for n in deltas()}
    moved = {n: after[n].astype("f8") - before[n] - honest[n] for n in honest}
    share = float(np.sqrt(sum(np.sum(part**2) for part in moved.values())))
    assert share == pytest.approx(2 * REFERENCE / 3, rel=1e-5)
    report = json.loads(
        call(admin.screening.GetReport, screening_pb2.GetReportRequest(round=round_.id)).report_json
    )
    assert report["reference_norm"] == REFERENCE
    assert sorted(report["factors"].values())[1:] == [1.0, 1.0]
    assert {row["contributor"] for row in report["report"]["inputs"]} == {"loud", "b", "c"}
    (entry,) = call(loud.screening.GetHistory, screening_pb2.GetHistoryRequest()).entries
    assert (entry.state, entry.release_number, entry.isolated) == ("ADMITTED", 1, False)
    assert entry.clip_factor == pytest.approx(2 * REFERENCE / entry.norm)
    assert 0 < entry.cosine_to_merged <= 1
    assert kinds(live).count("contribution.accepted") == 1


def test_a_refused_one_is_gone_and_the_round_goes_on(live: Live) -> None:
    round_ = live.open_round(**KNOWN)
    admin, org = live.machine("boss", "admin"), live.machine("a")
    org.contribute(round_, times(1000.0))
    identifier = waiting(admin)[0].contribution.id
    decide(admin, "Refuse", identifier, "wrong base")
    assert standing(org) == [("REFUSED", "wrong base")]
    assert kinds(live)[-1] == "contribution.refused"
    assert files(live) == set()
    for verb in ("Accept", "Refuse"):
        with pytest.raises(ConflictError, match="does not wait") as caught:
            decide(admin, verb, identifier)
        assert caught.value.code == "contribution.not_quarantined"
    manifest, _ = org.manifest(round_, deltas(), base_number=7)
    with pytest.raises(ColdmergeError):
        org.begin(manifest)
    assert kinds(live)[-1] == "upload.refused"
    assert kinds(live).count("contribution.refused") == 1
    org.contribute(round_, deltas(4))
    assert states(org) == ["ADMITTED", "REFUSED"]


def test_nothing_is_accepted_once_the_round_has_sealed(live: Live) -> None:
    round_ = live.open_round(**KNOWN)
    admin, loud = live.machine("boss", "admin"), live.machine("loud")
    loud.contribute(round_, times(1000.0))
    identifier = waiting(admin)[0].contribution.id
    for seed, name in enumerate(("b", "c"), 2):
        live.machine(name).contribute(round_, deltas(seed))
    with pytest.raises(ConflictError) as caught:
        decide(admin, "Accept", identifier)
    assert caught.value.code == "round.not_open"
    assert waiting(admin) == []
    assert decide(admin, "Refuse", identifier).state == State.REFUSED
    assert identifier[-12:] not in str(state_of(live, round_).sealed_inputs)


def test_a_quarantined_second_leaves_the_first_until_it_is_accepted(live: Live) -> None:
    round_ = live.open_round(**KNOWN)
    admin, org = live.machine("boss", "admin"), live.machine("a")
    org.contribute(round_, deltas(1))
    org.contribute(round_, times(1000.0))
    assert states(org) == ["ADMITTED", "QUARANTINED"]
    org.contribute(round_, times(2000.0, seed=8))
    assert states(org) == ["ADMITTED", "QUARANTINED", "REPLACED"]
    assert len(files(live)) == 2
    decide(admin, "Accept", waiting(admin)[0].contribution.id)
    assert states(org) == ["ADMITTED", "REPLACED", "REPLACED"]
    assert len(files(live)) == 1


def test_an_ordinary_second_takes_the_place_of_a_quarantined_first(live: Live) -> None:
    round_ = live.open_round(**KNOWN)
    org = live.machine("a")
    org.contribute(round_, times(1000.0))
    org.contribute(round_, deltas(1))
    assert states(org) == ["ADMITTED", "REPLACED"]


def test_where_seconds_are_refused_a_waiting_one_counts_as_first(live: Live) -> None:
    round_ = live.open_round(second_contribution="refuse", **KNOWN)
    org = live.machine("a")
    org.contribute(round_, times(1000.0))
    with pytest.raises(ConflictError) as caught:
        org.contribute(round_, deltas(1))
    assert caught.value.code == "contribution.second"


def test_what_waits_can_be_taken_back(live: Live) -> None:
    round_ = live.open_round(**KNOWN)
    org = live.machine("a")
    org.contribute(round_, times(1000.0))
    (row,) = call(
        org.contributions.List, contributions_pb2.ListContributionsRequest()
    ).contributions
    call(org.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=row.id))
    assert states(org) == ["WITHDRAWN"]
    assert files(live) == set()


def test_what_waits_survives_a_restart(tmp_path: Path) -> None:
    with coordinator(tmp_path / "hub") as live:
        round_ = live.open_round(**KNOWN)
        org, admin = live.machine("a"), live.machine("boss", "admin")
        org.contribute(round_, times(1000.0))
        live.stop()
        live.start()
        admin.connect()
        assert len(files(live)) == 1
        decide(admin, "Accept", waiting(admin)[0].contribution.id)
        with live.store.database.read() as session:
            assert len(contributions.admitted(session, round_.id)) == 1


def test_a_round_may_refuse_outliers_at_the_door(live: Live) -> None:
    round_ = live.open_round(screening={"reference_norm": REFERENCE, "on_outlier": "refuse"})
    org = live.machine("a")
    with pytest.raises(TaskVectorError) as caught:
        org.contribute(round_, times(1000.0))
    assert caught.value.code == "contribution.outside_band"
    with live.store.database.read() as session:
        assert session.query(Contribution).count() == session.query(Upload).count() == 0
    assert files(live) == set()
    assert list(live.store.uploads.iterdir()) == []
    org.contribute(round_, deltas(1))


def test_a_round_may_take_what_comes_and_clip_it(live: Live) -> None:
    round_ = live.open_round(screening={"reference_norm": REFERENCE, "on_outlier": "accept"})
    org = live.machine("a")
    org.contribute(round_, times(1e30))
    live.machine("b").contribute(round_, deltas(2))
    assert run_once(live.store, live.clock)
    assert state_of(live, round_).state == "PUBLISHED"
    moved = [master(live, 1)[n].astype("f8") - master(live, 0)[n] for n in deltas()]
    assert np.sqrt(sum(np.sum(part**2) for part in moved)) <= 2 * REFERENCE


LARGE = {**model_tensors(), "big.weight": np.zeros((64, 64), np.float32)}


def large(seed: int) -> dict[str, Array]:
    return {"big.weight": np.random.default_rng(seed).standard_normal((64, 64)).astype("<f4")}


@pytest.mark.parametrize(("policy", "state"), [("quarantine", "QUARANTINED"), ("warn", "ADMITTED")])
def test_a_copy_waits_or_is_pointed_at(tmp_path: Path, policy: str, state: str) -> None:
    with coordinator(tmp_path / "hub", LARGE) as live:
        round_ = live.open_round(min_contributions=3, screening={"duplicates": policy})
        victim, thief = live.machine("victim"), live.machine("thief")
        victim.contribute(round_, large(1))
        thief.contribute(round_, {**large(1), **times(0.1, 3)})
        assert states(victim) == ["ADMITTED"]
        ((found, reason),) = standing(thief)
        assert found == state
        sent = "its tensor big.weight has the bytes that {} sent"
        assert reason == (sent.format("another organization") if policy != "warn" else "")
        request = screening_pb2.GetHistoryRequest()
        assert [e.reason for e in call(thief.screening.GetHistory, request).entries] == [reason]
        told = [item.reason for item in waiting(live.machine("boss", "admin"))]
        assert told == ([sent.format("victim")] if policy != "warn" else [])
        if policy == "warn":
            live.machine("c").contribute(round_, large(2))
            assert run_once(live.store, live.clock)
            report = (state_of(live, round_).screening or {})["report"]
            assert [hint["kind"] for hint in report["hints"]] == ["near_copies"]


def test_a_history_is_ones_own(live: Live) -> None:
    round_ = live.open_round(**KNOWN)
    org, other = live.machine("a"), live.machine("b")
    auditor = live.machine("eye", "auditor")
    org.contribute(round_, times(1000.0))
    request = screening_pb2.GetHistoryRequest(contributor="a")
    for client in (org, auditor):
        found = call(client.screening.GetHistory, request)
        assert [entry.state for entry in found.entries] == ["QUARANTINED"]
    for name in ("a", "nobody"):
        with pytest.raises(NotFoundError) as caught:
            call(other.screening.GetHistory, screening_pb2.GetHistoryRequest(contributor=name))
        assert caught.value.code == "contributor.unknown"


def test_revoking_takes_what_waits_out_of_quarantine(live: Live) -> None:
    boss = live.machine("boss", "admin")
    round_ = live.open_round(**KNOWN)
    live.machine("a").contribute(round_, times(1000))
    assert len(waiting(boss)) == 1
    now = live.clock.now()
    revoke(live.store, "a", "", "caught", now)
    assert waiting(boss) == []
    assert list(live.store.payloads.listed()) == []
    with live.store.database.read() as session:
        (row,) = session.query(Contribution)
    assert (row.state, row.payload_erased_at) == ("WITHDRAWN", now)
