from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.documents import Manifest, Receipt, TensorEntry, sign
from coldmerge.core.errors import IntegrityError, ManifestError, NotFoundError
from coldmerge_client.home import Home, Membership
from coldmerge_client.outbox import PAYLOAD, Outbox, OutboxEntry

AT = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def manifest(round_id: str = "round-1", nonce: str = "0" * 32) -> Manifest:
    return Manifest(
        federation="fed",
        model="m",
        round=round_id,
        contributor="org-a",
        base_digest="a" * 64,
        base_number=0,
        nonce=nonce,
        created_at=AT,
        kind="full",
        encoding="fp32",
        tensors=(TensorEntry(name="w", dtype="F32", shape=(1,), sha256="b" * 64, nbytes=4),),
        examples=10,
        norm=1.0,
    )


def add(home: Home, document: Manifest | None = None) -> OutboxEntry:
    outbox = Outbox(home)
    draft = outbox.draft()
    (draft / PAYLOAD).write_bytes(b"payload")
    signed = sign(document or manifest(), home.identity_key())
    return outbox.commit(draft, signed, kept_home=(("head.weight", "private"),), unchanged=2)


def test_an_entry_comes_back_as_it_was(home: Home) -> None:
    entry = add(home)
    found = Outbox(home).get(entry.id)
    assert found == entry
    assert found.state == "prepared"
    assert found.pending
    assert found.kept_home == (("head.weight", "private"),)
    assert found.manifest == manifest()


def test_a_draft_is_no_entry_and_is_tidied_away(home: Home) -> None:
    outbox = Outbox(home)
    draft = outbox.draft()
    (draft / PAYLOAD).write_bytes(b"half")
    assert outbox.entries() == ()
    outbox.tidy()
    assert not draft.exists()


def test_a_crash_after_the_manifest_leaves_nothing_to_send(home: Home) -> None:
    outbox = Outbox(home)
    draft = outbox.draft()
    signed = sign(manifest(), home.identity_key())
    (draft / "manifest.json").write_bytes(signed.document)
    (draft / "manifest.sig").write_bytes(signed.signature)
    assert outbox.entries() == ()
    with pytest.raises(NotFoundError):
        outbox.get(draft.name)


def test_marks_are_durable(home: Home) -> None:
    entry = add(home)
    Outbox(home).mark(entry, state="sending", logged=True, approved=True)
    found = Outbox(home).get(entry.id)
    assert (found.state, found.logged, found.approved) == ("sending", True, True)
    assert found.pending


def acknowledge(home: Home, entry: OutboxEntry) -> OutboxEntry:
    key = Ed25519PrivateKey.generate()
    member = home.membership().__dict__ | {"signing_key": key.public_key().public_bytes_raw().hex()}
    home.save_membership(Membership(**member))
    receipt = Receipt(
        federation="fed",
        model="m",
        round="round-1",
        contributor="org-a",
        contribution="c-1",
        manifest_digest=entry.manifest.digest(),
        payload_bytes=4,
        accepted_at=AT,
    )
    return Outbox(home).acknowledge(entry, sign(receipt, key), receipt)


def test_a_receipt_replaces_the_payload(home: Home) -> None:
    entry = acknowledge(home, add(home))
    found = Outbox(home).get(entry.id)
    assert found.state == "sent"
    assert found.receipt is not None
    assert found.receipt.contribution == "c-1"
    assert not found.payload.exists()
    assert not found.pending


def test_a_crash_between_receipt_and_payload_is_tidied(home: Home) -> None:
    entry = acknowledge(home, add(home))
    entry.payload.write_bytes(b"left behind")
    Outbox(home).tidy()
    assert not entry.payload.exists()


def test_a_crash_between_receipt_and_state_still_counts_as_pending(home: Home) -> None:
    entry = add(home)
    before = (entry.folder / "state.json").read_bytes()
    acknowledge(home, entry)
    (entry.folder / "state.json").write_bytes(before)
    assert Outbox(home).get(entry.id).pending


def test_a_refused_entry_keeps_its_reason(home: Home) -> None:
    entry = Outbox(home).refuse(add(home), "the round sealed")
    assert Outbox(home).get(entry.id).reason == "the round sealed"
    assert Outbox(home).for_round("round-1") is None
    assert not entry.payload.exists()


def test_entries_are_found_by_round_and_model(home: Home) -> None:
    first, second = add(home), add(home, manifest("round-2", "1" * 32))
    outbox = Outbox(home)
    assert outbox.for_round("round-2") == second
    assert {entry.id for entry in outbox.entries()} == {first.id, second.id}
    assert outbox.pending() == outbox.entries()
    assert {entry.id for entry in outbox.naming(first.manifest.round)} >= {first.id}
    assert outbox.naming("round-of-nobody") == ()


def test_a_manifest_changed_on_disk_is_not_sent(home: Home) -> None:
    entry = add(home)
    path: Path = entry.folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"examples":10', b'"examples":99'))
    with pytest.raises(ManifestError, match="signature"):
        Outbox(home).get(entry.id)


def test_a_damaged_state_is_an_integrity_error(home: Home) -> None:
    entry = add(home)
    (entry.folder / "state.json").write_text('{"state": "gone"}')
    with pytest.raises(IntegrityError):
        Outbox(home).get(entry.id)
