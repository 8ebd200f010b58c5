"""What is kept for how long, and what goes: garbage of crashes, and what a setting lets go.

Releases, their masters and optimizer states, and all records stay for ever. The work is cut
into steps, each a short transaction; what a step deletes it checks again in it. A collection
may be killed at any moment, and several may run at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Select, delete, func, or_, select, union
from sqlalchemy.orm import Session

from coldmerge_coordinator import audit
from coldmerge_coordinator.actors import COORDINATOR
from coldmerge_coordinator.service.uploads import contribution_id, forget, payload_name
from coldmerge_coordinator.store import Store, collection, learned, trials
from coldmerge_coordinator.store.contributions import REPLACED, WITHDRAWN
from coldmerge_coordinator.store.models import (
    Blob,
    Content,
    Contribution,
    Master,
    Model,
    OuterState,
    Release,
    Round,
    Upload,
)

T = TypeVar("T")

BATCH = 200
_ATTEMPTS = 3
KINDS = ("upload", "contribution", "payload", "segment", "candidate", "blob")
_SHARDS = tuple(f"{number:02x}" for number in range(256))


@dataclass(frozen=True)
class Collected:
    """What one step removed, or would have."""

    kind: str
    count: int
    nbytes: int


def collect(store: Store, now: datetime, *, dry_run: bool = False) -> Iterator[Collected]:
    """All that may go at `now`, step by step. With `dry_run`, nothing goes."""
    yield from _uploads(store, now, dry_run)
    yield from _contributions(store, now, dry_run)
    yield from _payloads(store, now, dry_run)
    yield from _segments(store, now, dry_run)
    yield from _blobs(store, now, dry_run)


def summary(store: Store, now: datetime, *, dry_run: bool = False) -> dict[str, int]:
    """Collect all of it: how many of each kind went, and how many bytes."""
    totals = dict.fromkeys((f"{kind}s" for kind in KINDS), 0)
    nbytes = 0
    for found in collect(store, now, dry_run=dry_run):
        totals[f"{found.kind}s"] += found.count
        nbytes += found.nbytes if found.kind != "candidate" else 0  # they go as orphans
    return {**totals, "bytes": nbytes}


def _uploads(store: Store, now: datetime, dry_run: bool) -> Iterator[Collected]:
    """Uploads that have not moved for long."""
    before = now - store.config.retention.uploads
    moved = func.coalesce(Upload.updated_at, Upload.created_at)
    with store.database.read() as session:
        rows = list(session.scalars(select(Upload).where(moved < before)))
    for row in rows:
        if not dry_run and not _expire(store, row, now):
            continue
        yield Collected("upload", 1, row.total_size)


def _expire(store: Store, row: Upload, now: datetime) -> bool:
    same = (Upload.id == row.id, Upload.fence == row.fence)
    unmoved = Upload.committed_size == row.committed_size
    with store.database.write() as session:
        gone = session.connection().execute(delete(Upload).where(*same, unmoved)).rowcount
        if gone:
            ids = {"contributor": row.contributor, "round": row.round, "upload": row.id}
            audit.append(session, "upload.expired", COORDINATOR, now, ids=ids)
    if gone:
        forget(store, row.id)
    return bool(gone)


def _contributions(store: Store, now: datetime, dry_run: bool) -> Iterator[Collected]:
    """Task vectors of rounds that ended long ago, if a setting says so. Their rows stay."""
    keep = store.config.retention.contributions
    if keep is None:
        return
    with store.database.read() as session:
        found = list(session.scalars(_erasable(now - keep).with_only_columns(Contribution.id)))
    for batch in _batches(found):
        yield _erase(store, batch, now - keep, now, dry_run)


def _erasable(before: datetime) -> Select[Contribution]:
    ended = select(Round.id).where(Round.ended_at < before, ~Round.active)
    busy = select(Round.model).where(Round.active)  # a re-merge may read old rounds
    return select(Contribution).where(
        Contribution.round.in_(ended),
        Contribution.model.not_in(busy),
        Contribution.payload_erased_at.is_(None),
        Contribution.state.not_in((REPLACED, WITHDRAWN)),
    )


def _erase(
    store: Store, batch: Sequence[str], before: datetime, now: datetime, dry_run: bool
) -> Collected:
    these = Contribution.id.in_(batch)
    with store.database.read() if dry_run else store.database.write() as session:
        query = _erasable(before).where(these)
        if not dry_run:
            # Nobody opens a re-merge meanwhile; one that is open by now keeps what it reads.
            models = select(Model).where(Model.name.in_(select(Contribution.model).where(these)))
            session.scalars(models.order_by(Model.name).with_for_update()).all()
            query = query.with_for_update()
        rows = list(session.scalars(query))
        for row in rows if not dry_run else ():
            row.payload_erased_at = now
            ids = {"contributor": row.contributor, "round": row.round, "contribution": row.id}
            audit.append(session, "contribution.erased", COORDINATOR, now, ids=ids)
    if not dry_run:
        store.payloads.remove([row.payload for row in rows])
    return Collected("contribution", len(rows), sum(row.payload_bytes for row in rows))


def _payloads(store: Store, now: datetime, dry_run: bool) -> Iterator[Collected]:
    """Files of task vectors that no contribution and no upload has."""
    before = now - store.config.retention.grace
    old = [found for found in store.payloads.listed() if found.written < before]
    sizes = {found.name: found.size for found in old}
    for batch in _batches(list(sizes)):
        with store.database.read() as session:
            kept = select(Contribution.payload).where(
                Contribution.payload.in_(batch),
                Contribution.payload_erased_at.is_(None),
                Contribution.state.not_in((REPLACED, WITHDRAWN)),
            )
            uploads = session.scalars(select(Upload.manifest_digest))
            known = {payload_name(contribution_id(digest)) for digest in uploads}
            known |= set(session.scalars(kept))
        gone = [name for name in batch if name not in known]
        if not dry_run:
            store.payloads.remove(gone)
        yield Collected("payload", len(gone), sum(sizes[name] for name in gone))


def _segments(store: Store, now: datetime, dry_run: bool) -> Iterator[Collected]:
    """Bytes in S3 of uploads that are no more."""
    if store.bucket is None:
        return
    before = now - store.config.retention.grace
    old = [found for found in store.bucket.list("uploads") if found.written < before]
    for batch in _batches(old):
        with store.database.read() as session:
            known = set(session.scalars(select(Upload.id)))
        gone = [found for found in batch if found.key.split("/")[1] not in known]
        if not dry_run:
            store.bucket.remove([found.key for found in gone])
        yield Collected("segment", len(gone), sum(found.size for found in gone))


def _blobs(store: Store, now: datetime, dry_run: bool) -> Iterator[Collected]:
    """Blobs of candidates that were not published, and those that nobody ever named."""
    with store.database.read() as session:
        live = frozenset(_live(session, now - store.config.retention.candidates))
    for shard in _SHARDS:
        yield from _candidates(store, shard, live, now, dry_run)
        yield from _orphans(store, shard, now, dry_run)
        yield Collected("blob", 0, 0)  # a listing is work enough for a step


def _live(session: Session, since: datetime) -> Iterator[bytes]:
    """What releases, and the candidates of rounds that go on or ended after `since`, consist of."""
    kept = or_(Round.active, Round.ended_at.is_(None), Round.ended_at >= since)
    going_on = session.scalars(select(Round).where(Round.active)).all()
    tried = [trial for row in going_on for trial in trials.of(row)]
    digests_of_trials = {one for t in tried for one in (t.digest, t.master, t.state) if one}
    digests_of_trials |= {one for row in going_on for one in learned.directions_of(row)}
    tables: tuple[tuple[Any, Any, Any, Any, Any], ...] = (
        (Release.content_digest, Round.candidate_digest, Content, Content.listing, _of_content),
        (Release.master_digest, Round.candidate_master, Master, Master.tensors, _of_master),
        (Release.state_digest, Round.candidate_state, OuterState, OuterState.document, _of_state),
    )
    for released, candidate, table, value, hashes in tables:
        digests = union(select(released), select(candidate).where(kept))
        query = select(value).where(
            or_(table.digest.in_(digests), table.digest.in_(digests_of_trials))
        )
        for found in session.scalars(query.execution_options(yield_per=20)):
            yield from (bytes.fromhex(sha256) for sha256 in hashes(found))


def _of_content(listing: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    for part in ("tensors", "files"):
        yield from (entry["sha256"] for entry in listing[part])


def _of_master(tensors: dict[str, str]) -> Iterator[str]:
    yield from tensors.values()


def _of_state(document: dict[str, dict[str, dict[str, str]]]) -> Iterator[str]:
    for slot in document["slots"].values():
        yield from slot.values()


def _candidates(
    store: Store, shard: str, live: frozenset[bytes], now: datetime, dry_run: bool
) -> Iterator[Collected]:
    """The rows of blobs that are only of candidates which ended long ago: then they are orphans."""
    before = now - store.config.retention.candidates
    old = (Blob.sha256.startswith(shard), Blob.created_at < before)
    with store.database.read() as session:
        rows = session.execute(select(Blob.sha256, Blob.nbytes).where(*old)).all()
    sizes = {sha256: nbytes for sha256, nbytes in rows if bytes.fromhex(sha256) not in live}
    for batch in _batches(sorted(sizes)):
        if not dry_run:
            with store.database.write() as session:
                collection.lock(session)
                # Who names a blob again makes its row new: such a row stays.
                gone = delete(Blob).where(Blob.sha256.in_(batch), Blob.created_at < before)
                count = session.connection().execute(gone).rowcount
                detail: dict[str, str | int] = {"count": count, "first": batch[0]}
                audit.append(session, "blobs.erased", COORDINATOR, now, detail=detail)
        yield Collected("candidate", len(batch), sum(sizes[sha256] for sha256 in batch))


def _orphans(store: Store, shard: str, now: datetime, dry_run: bool) -> Iterator[Collected]:
    """Stored blobs without a row, written long enough ago that nobody is about to name them."""
    before = now - store.config.retention.grace
    sizes = {
        found.sha256: found.size for found in store.blobs.listed(shard) if found.written < before
    }
    for batch in _batches(sorted(sizes)):
        with store.database.read() as session:
            gone = collection.unnamed(session, batch)  # mostly none: nothing is locked for them
        if gone and not dry_run:
            gone = _remove(store, gone)
        yield Collected("blob", len(gone), sum(sizes[sha256] for sha256 in gone))


def _remove(store: Store, batch: Sequence[str]) -> list[str]:
    """Delete those of the blobs that still have no row: which.

    One request to S3 under the lock, on purpose. Whoever deleted without it, and was held up,
    would delete what had been written and named since.
    """
    for _ in range(_ATTEMPTS):
        fence = collection.announce(store.database)
        with store.database.write() as session:
            if collection.may_delete(session, fence):
                gone = collection.unnamed(session, batch)
                store.blobs.remove(gone)
                return gone
    return []  # other collections are at work: they, or the next one, remove them


def _batches(items: Sequence[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch
