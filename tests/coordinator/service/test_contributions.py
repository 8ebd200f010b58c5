"""Uploads over real TLS: admitted, resumed, counted, replaced."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest

from coldmerge.core.documents import Receipt, verify
from coldmerge.core.errors import (
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
    ResourceError,
)
from coldmerge.core.task_vector import TaskVector
from coldmerge.wire.calls import call
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import admin_pb2, contributions_pb2, rounds_pb2
from coldmerge_coordinator.service.uploads import contribution_id
from coldmerge_coordinator.store import contributions
from coldmerge_coordinator.store.models import Round, Upload
from tests.backends import needs_disk
from tests.coordinator.service.conftest import current, rows_of
from tests.harness import BF16, Live, MachineClient, chunk, coordinator, deltas
from tests.support import until


def test_whole_path_ends_with_a_signed_receipt_and_a_sound_file(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round()
    changes = deltas()
    manifest, payload = org.manifest(round_, changes)
    begun = org.begin(manifest)
    assert (begun.committed_size, begun.total_size) == (0, len(payload))
    assert org.write(begun.upload_id, payload) == len(payload)
    signed = signed_from_proto(org.commit(begun.upload_id))
    receipt = verify(signed, Receipt, live.store.signer.key.public_key())
    assert receipt.manifest_digest == manifest.digest()
    assert receipt.payload_bytes == len(payload)
    row = rows_of(live)[0]
    vector = TaskVector.open(live.store.payloads.local(row.payload))
    assert vector.entries() == manifest.tensors
    expected = np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in changes.values()))
    assert row.norm == pytest.approx(expected, rel=1e-12)
    assert current(live, round_).state == "OPEN"
    assert list(live.store.uploads.iterdir()) == []


def test_the_quorum_seals_thecurrent(live: Live) -> None:
    round_ = live.open_round()
    for index, name in enumerate("ab"):
        live.machine(name).contribute(round_, deltas(index))
    sealed = current(live, round_)
    assert sealed.state == "SEALED"
    assert sealed.sealed_inputs == sorted(row.manifest_digest for row in rows_of(live))


def test_lora_and_whole_tensors_in_one_vector(live: Live) -> None:
    org = live.machine("a")
    factors = {
        "embeddings.weight.lora_A": np.ones((2, 4), BF16),
        "embeddings.weight.lora_B": np.ones((16, 2), BF16),
        "layer.bias": np.zeros(4, BF16) + BF16.type(2),
    }
    org.contribute(
        live.open_round(),
        factors,
        kind="lora",
        encoding="bf16",
        scaling={"embeddings.weight": 0.5},
    )
    # 64 elements of 0.5 * 2, and four of 2.
    assert rows_of(live)[0].norm == pytest.approx(np.sqrt(64 * 1.0 + 4 * 4.0))


def test_begin_and_commit_may_be_repeated(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:100])
    again = org.begin(manifest)
    assert (again.upload_id, again.committed_size) == (begun.upload_id, 100)
    org.write(begun.upload_id, payload[100:], offset=100)
    first = org.commit(begun.upload_id)
    assert org.commit(begun.upload_id) == first
    done = org.begin(manifest)
    assert done.receipt == first
    assert done.upload_id == ""
    assert len(rows_of(live)) == 1


def test_a_wrong_offset_is_answered_with_the_true_one(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:64])
    for offset in (0, 63, 65, 10**6, -1):
        with pytest.raises(ConflictError) as caught:
            org.write(begun.upload_id, payload[64:], offset=offset)
        assert (caught.value.code, caught.value.expected) == ("upload.wrong_offset", "64")
    org.write(begun.upload_id, payload[64:], offset=64)
    org.commit(begun.upload_id)


def test_an_upload_goes_on_after_the_coordinator_restarts(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:130])
    live.stop()
    live.start()
    org.connect()
    assert org.status(begun.upload_id).committed_size == 130
    org.write(begun.upload_id, payload[130:], offset=130)
    org.commit(begun.upload_id)
    assert TaskVector.open(live.store.payloads.local(rows_of(live)[0].payload)).entries() == (
        manifest.tensors
    )


@needs_disk
def test_bytes_damaged_on_disk_are_found_and_the_upload_begins_again(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:300])
    live.stop()
    part = live.store.uploads / f"{begun.upload_id}.part"
    raw = bytearray(part.read_bytes())
    raw[-len(payload)] ^= 1
    part.write_bytes(raw)
    live.start()
    org.connect()
    with pytest.raises(ConflictError) as caught:
        org.status(begun.upload_id)
    assert caught.value.code == "upload.lost"
    assert org.begin(manifest).committed_size == 0
    org.write(begun.upload_id, payload)
    org.commit(begun.upload_id)


@needs_disk
def test_a_crash_between_rename_and_transaction_is_undone(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    live.stop()
    part = live.store.uploads / f"{begun.upload_id}.part"
    final = live.store.contributions / f"{contribution_id(manifest.digest())}.safetensors"
    part.rename(final)
    live.start()
    org.connect()
    org.commit(begun.upload_id)
    assert final.exists()
    assert not part.exists()


@needs_disk
def test_sweep_removes_what_no_row_knows(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round()
    org.contribute(round_, deltas())
    manifest, _ = org.manifest(round_, deltas(2))
    begun = org.begin(manifest)
    live.stop()
    (live.store.uploads / "upload-0.part").write_bytes(b"orphan")
    (live.store.contributions / "contribution-0.safetensors").write_bytes(b"orphan")
    live.start()
    assert [name for name, _ in live.store.payloads.parts()] == [begun.upload_id]
    assert [p.name for p in live.store.payloads.listed()] == [rows_of(live)[0].payload]


def test_a_second_contribution_replaces_the_first(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round()
    org.contribute(round_, deltas(1))
    org.contribute(round_, deltas(2))
    states = [row.state for row in rows_of(live)]
    assert states == [contributions.REPLACED, contributions.ADMITTED]
    assert len(list(live.store.payloads.listed())) == 1
    assert current(live, round_).state == "OPEN"


def test_a_second_contribution_is_refused_where_the_policy_says_so(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round(second_contribution="refuse")
    late, payload = org.manifest(round_, deltas(3))
    begun = org.begin(late)
    org.contribute(round_, deltas(1))
    manifest, _ = org.manifest(round_, deltas(2))
    with pytest.raises(ConflictError) as caught:
        org.begin(manifest)
    assert caught.value.code == "contribution.second"
    org.write(begun.upload_id, payload)
    with pytest.raises(ConflictError) as caught:
        org.commit(begun.upload_id)
    assert caught.value.code == "contribution.second"
    assert len(rows_of(live)) == 1


def test_a_round_for_some_takes_nothing_of_others_and_tells_no_names(live: Live) -> None:
    asked, other, admin = live.machine("a"), live.machine("b"), live.machine("c", "admin")
    round_ = live.open_round(contributors=["a", "z"])
    manifest, _ = other.manifest(round_, deltas(1))
    with pytest.raises(PermissionDeniedError) as caught:
        other.begin(manifest)
    assert caught.value.code == "round.not_asked"
    asked.contribute(round_, deltas(2))
    assert [row.contributor for row in rows_of(live)] == ["a"]

    def seen(who: MachineClient) -> list[str]:
        found = call(who.rounds.Get, rounds_pb2.GetRoundRequest(id=round_.id))
        listed: list[str] = json.loads(found.policy_json)["contributors"]
        return listed

    assert [seen(who) for who in (asked, other, admin)] == [["a"], [], ["a", "z"]]


def test_a_new_stream_takes_over_from_a_dead_one(live: Live) -> None:
    org, second = live.machine("a"), live.machine("a", name="laptop")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    seen: list[int] = []

    def slow() -> Iterator[contributions_pb2.WriteRequest]:
        yield chunk(begun.upload_id, 0, payload[:50])
        until("50 bytes", lambda: second.status(begun.upload_id).committed_size == 50)
        seen.append(second.write(begun.upload_id, payload[50:], offset=50))
        yield chunk(begun.upload_id, 50, payload[50:])

    with pytest.raises(ConflictError) as caught:
        org.stream(slow())
    assert caught.value.code == "upload.superseded"
    assert seen == [len(payload)]
    org.commit(begun.upload_id)


def test_many_open_uploads_are_too_many(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round()
    limit = live.store.config.limits.max_open_uploads
    for index in range(limit):
        org.begin(org.manifest(round_, deltas(index))[0])
    with pytest.raises(ResourceError) as caught:
        org.begin(org.manifest(round_, deltas(99))[0])
    assert caught.value.code == "upload.too_many"
    live.machine("b").contribute(round_, deltas())


def test_uploads_to_an_ended_round_make_room(live: Live) -> None:
    org = live.machine("a")
    first = live.open_round(min_contributions=1)
    for index in range(live.store.config.limits.max_open_uploads):
        org.begin(org.manifest(first, deltas(index))[0])
    live.machine("b").contribute(first, deltas())
    _abandon(live, first)
    second = live.open_round()
    begun = org.begin(org.manifest(second, deltas())[0])
    assert [name for name, _ in live.store.payloads.parts()] == [begun.upload_id]
    with live.store.database.read() as session:
        assert session.query(Upload).count() == 1


def _abandon(live: Live, round_: Round) -> None:
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=round_.id, reason="test"))


def test_list_and_get_show_only_ones_own(live: Live) -> None:
    a, b, auditor = live.machine("a"), live.machine("b"), live.machine("c", "auditor")
    round_ = live.open_round(min_contributions=3)
    a.contribute(round_, deltas(1))
    b.contribute(round_, deltas(2))
    everything = contributions_pb2.ListContributionsRequest()
    ids = {
        who.contributor: [
            item.id for item in call(who.contributions.List, everything).contributions
        ]
        for who in (a, b, auditor)
    }
    assert len(ids["a"]) == len(ids["b"]) == 1
    assert sorted(ids["c"]) == sorted(itertools.chain(ids["a"], ids["b"]))
    with pytest.raises(NotFoundError):
        call(a.contributions.Get, contributions_pb2.GetContributionRequest(id=ids["b"][0]))
    with pytest.raises(NotFoundError):
        call(a.contributions.Withdraw, contributions_pb2.WithdrawRequest(id=ids["b"][0]))
    found = call(b.contributions.Get, contributions_pb2.GetContributionRequest(id=ids["b"][0]))
    assert found.contributor == "b"


def test_an_upload_belongs_to_its_contributor(live: Live) -> None:
    a, b = live.machine("a"), live.machine("b")
    manifest, payload = a.manifest(live.open_round(), deltas())
    begun = a.begin(manifest)
    a.write(begun.upload_id, payload)
    for attempt in (
        lambda: b.status(begun.upload_id),
        lambda: b.write(begun.upload_id, payload),
        lambda: b.commit(begun.upload_id),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    a.commit(begun.upload_id)
    with pytest.raises(NotFoundError):
        b.commit(begun.upload_id)


def test_a_large_upload_is_flushed_on_the_way(tmp_path_factory: pytest.TempPathFactory) -> None:
    big = {"big.weight": np.zeros((5 * 2**20,), np.float32)}
    with coordinator(tmp_path_factory.mktemp("big") / "hub", big) as live:
        org = live.machine("a")
        changes = {"big.weight": np.full((5 * 2**20,), 0.5, np.float32)}
        manifest, payload = org.manifest(live.open_round(min_contributions=1), changes)
        begun = org.begin(manifest)

        def committed() -> int:
            with live.store.database.read() as session:
                return session.get_one(Upload, begun.upload_id).committed_size

        def requests() -> Iterator[contributions_pb2.WriteRequest]:
            for start in range(0, len(payload), 2**20):
                if start == 17 * 2**20:
                    until("a flush", lambda: committed() >= 16 * 2**20)
                yield chunk(begun.upload_id, start, payload[start : start + 2**20])

        assert org.stream(requests()) == len(payload) == committed()
        org.commit(begun.upload_id)
