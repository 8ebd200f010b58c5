"""Contents, signed records, publishing, rolling back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest
from sqlalchemy.orm import Session

from coldmerge.core.documents import ReleaseRecord, verify
from coldmerge.core.errors import ConflictError, NotFoundError
from coldmerge.rounds import state
from coldmerge_coordinator.store import Store, releases, rounds
from coldmerge_coordinator.store.models import Blob

Make = Callable[[Session, int], tuple[str, str]]


def publish(store: Store, content: Make, seed: int, now: datetime) -> None:
    with store.database.write() as session:
        digests = content(session, seed)
        releases.publish(session, store.signer, "triage", *digests, now, recipe={"method": "mean"})


def test_records_are_signed_and_chained(
    store: Store, model: str, content: Make, now: datetime
) -> None:
    publish(store, content, 1, now)
    publish(store, content, 2, now)
    key = store.signer.key.public_key()
    with store.database.read() as session:
        rows = releases.list_releases(session, model)
        assert releases.list_releases(session, model, after_number=1) == rows[2:]
    records = [verify(releases.signed_record(row), ReleaseRecord, key) for row in rows]
    assert [record.number for record in records] == [0, 1, 2]
    assert records[0].previous_record is None
    assert [r.previous_record for r in records[1:]] == [r.digest() for r in records[:-1]]
    assert [r.content_digest for r in records] == [row.content_digest for row in rows]
    assert [r.master_digest for r in records] == [row.master_digest for row in rows]
    assert {r.federation for r in records} == {"fed"}


def test_listings_and_masters_come_back(store: Store, model: str, content: Make) -> None:
    with store.database.read() as session:
        release = releases.latest_release(session, model)
        listing = releases.get_listing(session, release.content_digest)
        masters = releases.get_masters(session, release.master_digest)
    assert listing.digest == release.content_digest
    assert store.blobs.block(masters["body.w"], "F32", 0, 2).shape == (2,)


def test_only_what_belongs_to_a_release_may_be_read(store: Store, model: str) -> None:
    with store.database.read() as session:
        release = releases.latest_release(session, model)
        listing = releases.get_listing(session, release.content_digest)
        for sha256 in (listing.tensors[0].sha256, listing.files[0].sha256):
            assert releases.get_blob(session, sha256).nbytes == store.blobs.open(sha256).size
        master = releases.get_masters(session, release.master_digest)["body.w"]
        assert session.get_one(Blob, master).nbytes == 8
        for sha256 in (master, "0" * 64, "../x"):
            with pytest.raises(NotFoundError) as caught:
                releases.get_blob(session, sha256)
            assert caught.value.code == "blob.not_public"


def test_a_master_that_becomes_a_published_tensor_may_be_read(store: Store, model: str) -> None:
    from coldmerge.core.digests import Content
    from coldmerge.core.documents import TensorEntry

    with store.database.write() as session:
        release = releases.latest_release(session, model)
        master = releases.get_masters(session, release.master_digest)["body.w"]
        tensor = TensorEntry(name="body.w", dtype="F32", shape=(2,), sha256=master, nbytes=8)
        releases.add_content(
            session, Content((tensor,), ()), {"body.w": master}, release.published_at
        )
        assert releases.get_blob(session, master).public


def test_two_masters_may_render_to_the_same_content(
    store: Store, model: str, now: datetime
) -> None:
    """A bf16 round too small to show: the content stays, the master must not."""
    with store.database.write() as session:
        old = releases.latest_release(session, model)
        listing = releases.get_listing(session, old.content_digest)
        moved, _ = store.blobs.put(b"moved...")
        digests = releases.add_content(session, listing, {"body.w": moved}, now)
        new = releases.publish(
            session, store.signer, model, *digests, now, recipe={"method": "mean"}
        )
        assert new.content_digest == old.content_digest
        assert new.master_digest != old.master_digest
        assert releases.get_masters(session, new.master_digest) == {"body.w": moved}
        assert releases.find_release(session, model, old.content_digest) == new


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda s: releases.latest_release(s, "other"), "model.unknown"),
        (lambda s: releases.get_release(s, "other", 0), "model.unknown"),
        (lambda s: releases.get_release(s, "triage", 7), "release.unknown"),
        (lambda s: releases.get_listing(s, "0" * 64), "content.unknown"),
        (lambda s: releases.get_masters(s, "0" * 64), "master.unknown"),
    ],
)
def test_what_does_not_exist(
    store: Store, model: str, call: Callable[[Session], object], code: str
) -> None:
    with store.database.read() as session, pytest.raises(NotFoundError) as caught:
        call(session)
    assert caught.value.code == code
    with store.database.read() as session:
        assert releases.find_release(session, model, "0" * 64) is None
        assert not releases.is_candidate(session, model, "0" * 64)


def test_rolling_back_publishes_the_old_content_under_a_new_number(
    store: Store, model: str, content: Make, now: datetime
) -> None:
    publish(store, content, 1, now)
    with store.database.write() as session:
        back = releases.rollback(session, store.signer, model, 0, "worse in use", now)
        old = releases.get_release(session, model, 0)
    record = releases.get_record(back)
    assert back.number == 2
    assert (back.content_digest, back.master_digest) == (old.content_digest, old.master_digest)
    assert record.recipe == {"method": "rollback", "number": 0, "reason": "worse in use"}
    assert (record.flags, record.parents) == (("rollback",), (old.content_digest,))


def test_rolling_back_to_where_we_are_is_refused(store: Store, model: str, now: datetime) -> None:
    with pytest.raises(ConflictError) as caught, store.database.write() as session:
        releases.rollback(session, store.signer, model, 0, "why", now)
    assert caught.value.code == "release.already_latest"


def test_rolling_back_under_a_round_is_refused(
    store: Store, content: Make, open_round: Callable[..., str], now: datetime
) -> None:
    publish(store, content, 1, now)
    round_id = open_round()
    with pytest.raises(ConflictError) as caught, store.database.write() as session:
        releases.rollback(session, store.signer, "triage", 0, "why", now)
    assert caught.value.code == "release.round_active"
    with store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        rounds.apply(session, row, state.Abandon("rolling back"), now, store.signer)
        assert releases.rollback(session, store.signer, "triage", 0, "why", now).number == 2
