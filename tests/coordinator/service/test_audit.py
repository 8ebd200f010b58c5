"""The Audit service over real sockets: checkpoints, proofs, entries; and what is in the log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from coldmerge.core.documents import Receipt, ReleaseRecord, verify
from coldmerge.core.errors import ColdmergeError, ConflictError, NotFoundError
from coldmerge.core.evidence import AuditCheckpoint, AuditEntry
from coldmerge.core.merkle import leaf_hash, verify_consistency, verify_inclusion
from coldmerge.wire.calls import call
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import admin_pb2, audit_pb2, contributions_pb2, models_pb2
from coldmerge_coordinator.service.refusals import ONE_BY_ONE
from coldmerge_coordinator.store import rounds
from tests.harness import MODEL, Live, MachineClient, coordinator, deltas


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with coordinator(tmp_path_factory.mktemp("audit") / "hub") as live:
        yield live


@pytest.fixture(scope="module")
def org(live: Live) -> MachineClient:
    return live.machine("a")


@pytest.fixture(scope="module")
def auditor(live: Live) -> MachineClient:
    return live.machine("watchdog", "auditor")


def checkpoint(
    live: Live, machine: MachineClient, size: int = 0
) -> tuple[AuditCheckpoint, list[bytes]]:
    answer = call(machine.audit.Checkpoint, audit_pb2.CheckpointRequest(from_size=size))
    key = live.store.signer.key.public_key()
    signed = signed_from_proto(answer.checkpoint)
    return verify(signed, AuditCheckpoint, key), list(answer.consistency)


def log(auditor: MachineClient, start: int = 0, limit: int = 0) -> list[bytes]:
    request = audit_pb2.ReadAuditRequest(start=start, limit=limit)
    found = auditor.collect(auditor.audit.Read, request)
    assert [leaf.position for leaf in found] == list(range(start, start + len(found)))
    return [leaf.document for leaf in found]


def kinds(documents: list[bytes]) -> list[str]:
    found = []
    for raw in documents:
        for kind, name in ((ReleaseRecord, "release.published"), (Receipt, "receipt")):
            if raw.endswith(b'"type":"%s"}' % kind.schema_name.encode()):
                kind.parse(raw)
                found.append(name)
                break
        else:
            found.append(AuditEntry.parse(raw).kind)
    return found


def test_checkpoints_extend_each_other(
    live: Live, org: MachineClient, auditor: MachineClient
) -> None:
    first, _ = checkpoint(live, org)
    live.open_round(min_contributions=3)
    second, proof = checkpoint(live, org, first.size)
    assert second.size > first.size
    roots = bytes.fromhex(first.root), bytes.fromhex(second.root)
    assert verify_consistency(first.size, second.size, *roots, proof)
    assert second.expires_at - second.issued_at == timedelta(hours=24)
    assert second.releases[MODEL].number == 0
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=_round(live)))
    with pytest.raises(ConflictError) as caught:
        checkpoint(live, org, 10_000)
    assert caught.value.code == "audit.shorter"


def _round(live: Live) -> str:
    with live.store.database.read() as session:
        found = rounds.active_round(session, MODEL)
        assert found is not None
        return found.id


def test_a_checkpoint_is_signed_anew_when_it_is_a_minute_old(
    live: Live, org: MachineClient
) -> None:
    first, _ = checkpoint(live, org)
    assert checkpoint(live, org)[0] == first
    live.clock.offset += timedelta(minutes=2)
    second, proof = checkpoint(live, org, first.size)
    assert (second.size, second.root, proof) == (first.size, first.root, [])
    assert second.issued_at - first.issued_at >= timedelta(minutes=2)


def test_the_holder_of_a_record_or_receipt_can_have_it_proved(
    live: Live, org: MachineClient
) -> None:
    round_ = live.open_round(min_contributions=3)
    receipt = org.contribute(round_, deltas())
    release = call(org.models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL, latest=True))
    head, _ = checkpoint(live, org)
    for document in (receipt.document, release.record.document):
        leaf = leaf_hash(document)
        found = call(org.audit.Prove, audit_pb2.ProveRequest(leaf_hash=leaf, size=head.size))
        root = bytes.fromhex(head.root)
        assert verify_inclusion(leaf, found.position, head.size, found.inclusion, root)
    for leaf, size in ((leaf_hash(b"never"), head.size), (leaf_hash(receipt.document), 1)):
        with pytest.raises(NotFoundError):
            call(org.audit.Prove, audit_pb2.ProveRequest(leaf_hash=leaf, size=size))
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=round_.id, reason="done"))


def test_who_did_what(live: Live, org: MachineClient, auditor: MachineClient) -> None:
    start = checkpoint(live, org)[0].size
    boss = live.machine("boss", "admin")
    request = admin_pb2.OpenRoundRequest(model=MODEL, policy_json='{"min_contributions": 3}')
    round_ = call(boss.admin.OpenRound, request)
    with live.store.database.read() as session:
        row = rounds.get(session, round_.id)
    org.contribute(row, deltas(1))
    org.contribute(row, deltas(2))
    mine = call(org.contributions.List, contributions_pb2.ListContributionsRequest(round=row.id))
    admitted = next(one for one in mine.contributions if one.state == one.ADMITTED)
    call(org.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=admitted.id))
    call(boss.admin.AbandonRound, admin_pb2.RoundAction(round=row.id, reason="a rehearsal"))
    live.machine("passing-by")
    call(boss.admin.Revoke, admin_pb2.RevokeRequest(contributor="passing-by", reason="left"))
    found = log(auditor, start)
    assert kinds(found) == [
        "contributor.invited",
        "machine.enrolled",
        "round.opened",
        "receipt",
        "receipt",
        "contribution.replaced",
        "contribution.withdrawn",
        "round.abandoned",
        "contributor.invited",
        "machine.enrolled",
        "contributor.revoked",
    ]
    actors = {
        entry.kind: entry.actor
        for entry in (AuditEntry.parse(raw) for raw in found if b"coldmerge.audit/1" in raw)
    }
    assert actors["round.opened"] == actors["contributor.revoked"] == "boss/box"
    assert actors["contribution.withdrawn"] == "a/box"
    assert actors["contributor.invited"] == "local admin"
    ended = next(e for e in map(_entry, found) if e and e.kind == "round.abandoned")
    assert ended.detail["reason"] == "a rehearsal"
    assert ended.ids["round"] == row.id


def _entry(raw: bytes) -> AuditEntry | None:
    return AuditEntry.parse(raw) if b"coldmerge.audit/1" in raw else None


def test_refusals_are_logged_and_bounded(live: Live, auditor: MachineClient) -> None:
    org = live.machine("clumsy")
    round_ = live.open_round(min_contributions=3)
    start = checkpoint(live, org)[0].size
    times = 4 * ONE_BY_ONE
    for _ in range(times):
        manifest, _ = org.manifest(round_, deltas(), base_number=7)
        with pytest.raises(ColdmergeError):
            org.begin(manifest)
    entries = [AuditEntry.parse(raw) for raw in log(auditor, start)]
    single = [e for e in entries if e.kind == "upload.refused"]
    assert len(single) == ONE_BY_ONE
    assert {e.actor for e in single} == {"clumsy/box"}
    assert {e.ids["contributor"] for e in single} == {"clumsy"}
    assert len({str(e.detail["code"]) for e in single}) == 1
    many = entries[ONE_BY_ONE:]
    assert {e.kind for e in many} == {"upload.refusals"}
    assert [e.detail["this_hour"] for e in many] == [32, 64]
    assert len(entries) == ONE_BY_ONE + 2
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=round_.id))


def test_pages_of_the_log(live: Live, auditor: MachineClient) -> None:
    everything = log(auditor)
    assert log(auditor, 3, 2) == everything[3:5]
    assert log(auditor, len(everything) + 5) == []
