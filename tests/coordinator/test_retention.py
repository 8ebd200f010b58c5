"""What a collection removes, what it never touches, and who it must not race with."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.digests import Content
from coldmerge.core.errors import UnavailableError
from coldmerge.rounds.state import Abandon
from coldmerge_coordinator import retention
from coldmerge_coordinator.config import Retention
from coldmerge_coordinator.driver import COLLECT_EVERY, Driver
from coldmerge_coordinator.retention import Collected, collect, summary
from coldmerge_coordinator.service.uploads import upload_id
from coldmerge_coordinator.store import collection, contributions, releases, rounds
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.models import Blob, Contribution, Upload
from coldmerge_coordinator.worker import Worker, run_once

if TYPE_CHECKING:
    from coldmerge_coordinator.merging.candidate import Candidate
    from coldmerge_coordinator.merging.sources import Beat
    from coldmerge_coordinator.store.leases import Held
    from tests.coordinator.conftest import Bench

GATE = {"min_evaluators": 1, "window": "1d"}
LONG = timedelta(days=40)
DAY = timedelta(days=1)


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """Files have the machine's time: so has the clock."""
    bench.clock.time = datetime.now(UTC) + timedelta(minutes=1)
    bench.add_model({name: np.full(64, n, "<f4") for n, name in enumerate("abcd")})
    return bench


def stored(bench: Bench) -> dict[str, int]:
    shards = (f"{number:02x}" for number in range(256))
    return {b.sha256: b.size for shard in shards for b in bench.store.blobs.listed(shard)}


def play(bench: Bench, seed: int, gate: object = None) -> str:
    """A round up to its candidate or release."""
    round_id = bench.open_round(gate=gate)
    value = np.full(64, 0.25 + seed, "<f4")
    name = "abcd"[seed % 4]
    bench.contribute(round_id, "org", {name: value})
    assert run_once(bench.store, bench.clock)
    return round_id


def abandon(bench: Bench, round_id: str) -> None:
    with bench.store.database.write() as session:
        row = rounds.get(session, round_id, lock=True)
        now = bench.clock.now()
        rounds.apply(session, row, Abandon("test"), now, bench.store.signer)


def hashes(content: Content) -> set[str]:
    return {entry.sha256 for entry in content.tensors} | {entry.sha256 for entry in content.files}


def all_of(bench: Bench) -> set[str]:
    """Every blob of every release and of the round at hand, which must be there and sound."""
    wanted: set[str] = set()
    with bench.store.database.read() as session:
        for release in releases.list_releases(session, "m"):
            content = releases.get_listing(session, release.content_digest)
            wanted |= hashes(content)
            wanted |= set(releases.get_masters(session, release.master_digest).values())
        for row in rounds.active_rounds(session):
            if row.candidate_digest is not None and row.candidate_master is not None:
                content = releases.get_listing(session, row.candidate_digest)
                wanted |= hashes(content)
                wanted |= set(releases.get_masters(session, row.candidate_master).values())
        for sha256 in wanted:
            assert session.get(Blob, sha256) is not None
    for sha256 in wanted:
        found = hashlib.sha256(b"".join(bench.store.blobs.chunks(sha256))).hexdigest()
        assert found == sha256
    return wanted


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_keep_what_counts_and_lose_the_rest(bench: Bench, seed: int) -> None:
    draw = random.Random(seed)
    for step in range(8):
        what = draw.choice(["publish", "abandon", "orphan", "wait", "collect", "empty"])
        if what == "publish":
            play(bench, step)
        elif what == "abandon":
            abandon(bench, play(bench, step + 100, gate=GATE))
        elif what == "empty":
            abandon(bench, bench.open_round())
        elif what == "orphan":
            bench.store.blobs.put(draw.randbytes(100))
            bench.store.payloads.add(f"contribution-{step}.safetensors", b"left behind")
        elif what == "wait":
            bench.clock.advance(timedelta(days=draw.randrange(1, 20)))
        else:
            summary(bench.store, bench.clock.now())
        all_of(bench)
    play(bench, 7, gate=GATE)
    bench.clock.advance(LONG)
    before = stored(bench)
    foreseen = summary(bench.store, bench.clock.now(), dry_run=True)
    assert stored(bench) == before, "a dry run removes nothing"
    done = summary(bench.store, bench.clock.now())
    assert set(stored(bench)) == all_of(bench)
    assert done["payloads"] == foreseen["payloads"]
    with bench.store.database.read() as session:
        kept = set(session.scalars(select(Contribution.payload)))
    assert {found.name for found in bench.store.payloads.listed()} == kept
    assert not any(summary(bench.store, bench.clock.now()).values())


def test_the_rest_of_a_candidate_goes_a_month_after_its_round(bench: Bench) -> None:
    round_id = play(bench, 1, gate=GATE)
    abandon(bench, round_id)
    bench.clock.advance(29 * DAY)
    assert summary(bench.store, bench.clock.now())["candidates"] == 0
    bench.clock.advance(2 * DAY)
    assert summary(bench.store, bench.clock.now())["candidates"] == 1
    assert set(stored(bench)) == all_of(bench)


def test_a_blob_that_is_written_again_is_new(bench: Bench) -> None:
    sha256, _ = bench.store.blobs.put(b"left behind")
    now = datetime.now(UTC) + 25 * timedelta(hours=1)
    kept = bench.store.config.retention.grace
    assert kept == DAY
    assert not summary(bench.store, datetime.now(UTC) + kept / 2)["blobs"]
    assert summary(bench.store, now, dry_run=True)["blobs"] == 1
    assert bench.store.blobs.stored([sha256])
    assert summary(bench.store, now)["blobs"] == 1
    assert not bench.store.blobs.stored([sha256])


class Raced(Worker):
    """Its blobs are collected after the merge has written them, before they are named."""

    raced = 0

    def _finish(self, round_id: str, held: Held, candidate: Candidate, beat: Beat) -> None:
        if not self.raced:
            self.raced = summary(self._store, datetime.now(UTC) + LONG)["blobs"]
        super()._finish(round_id, held, candidate, beat)


def test_a_merge_whose_blobs_were_collected_is_done_again(bench: Bench) -> None:
    round_id = bench.open_round()
    bench.contribute(round_id, "org", {"a": np.full(64, 5.5, "<f4")})
    worker = Raced(bench.store, bench.clock)
    assert worker.run_once()
    assert worker.raced == 1
    assert (bench.round(round_id).state, bench.round(round_id).merge_attempts) == ("MERGING", 0)
    assert worker.run_once()
    assert bench.release().number == 1
    all_of(bench)


class Asked(BlobStore):
    """Says in which write transactions it was asked, or told to delete, and does it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.store.blobs.folder)
        self.within: list[str] = []
        self._writing = False
        self._database = bench.store.database
        self._write = self._database.write

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._write() as session:
            self._writing = True
            try:
                yield session
            finally:
                self._writing = False

    def stored(self, sha256s: Sequence[str]) -> dict[str, int]:
        if self._writing and sha256s:
            self.within.append("stored")
        return super().stored(sha256s)

    def remove(self, sha256s: Sequence[str]) -> None:
        assert self._writing, "only under the lock"
        self.within.append("remove")
        super().remove(sha256s)


@pytest.fixture
def asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked(bench)
    monkeypatch.setattr(bench.store, "blobs", found)
    monkeypatch.setattr(bench.store.database, "write", found.write)
    return found


def test_a_quiet_merge_asks_for_its_blobs_outside_of_the_transaction(
    bench: Bench, asked: Asked
) -> None:
    play(bench, 1)
    assert summary(bench.store, bench.clock.now() + LONG)["blobs"] == 0
    assert asked.within == []
    assert bench.release().number == 1


def announced_at(bench: Bench, asked: Asked, when: str) -> int:
    """A collection that says it begins before, or right after, a merge has looked."""
    fence = 0
    look = asked.stored

    def stored(sha256s: Sequence[str]) -> dict[str, int]:
        nonlocal fence
        found = look(sha256s)
        if when == "after" and not fence:
            fence = collection.announce(bench.store.database)
        return found

    asked.stored = stored  # type: ignore[method-assign]
    if when == "before":
        fence = collection.announce(bench.store.database)
    play(bench, 1)
    return fence


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_merge_beside_a_collection_asks_again_under_the_lock(
    bench: Bench, asked: Asked, when: str
) -> None:
    fence = announced_at(bench, asked, when)
    assert asked.within == ["stored"]
    with bench.store.database.write() as session:
        assert collection.may_delete(session, fence)
        assert collection.unnamed(session, sorted(stored(bench))) == []
    asked.within.clear()
    play(bench, 2)
    assert asked.within == [], "the collection has ended"


def test_a_collection_deletes_only_while_nobody_else_was_announced(bench: Bench) -> None:
    first = collection.announce(bench.store.database)
    second = collection.announce(bench.store.database)
    assert second == first + 1
    with bench.store.database.write() as session:
        assert not collection.may_delete(session, first)
        assert collection.may_delete(session, second)
    sha256, _ = bench.store.blobs.put(b"left behind")
    assert summary(bench.store, datetime.now(UTC) + LONG)["blobs"] == 1
    assert not bench.store.blobs.stored([sha256])


def test_a_collection_that_dies_while_it_deletes_lets_nobody_name_what_is_gone(
    bench: Bench, asked: Asked
) -> None:
    """Its deletions are done, its transaction is not: the next one must not trust its look."""
    sha256, nbytes = bench.store.blobs.put(b"written by a merge")
    fence = collection.announce(bench.store.database)

    def die() -> None:
        with bench.store.database.write() as session:
            assert collection.may_delete(session, fence)
            asked.remove([sha256])
            raise ZeroDivisionError

    def name() -> None:
        with bench.store.database.write() as session:
            releases.register(session, {sha256: nbytes}, public=False, now=bench.clock.now())
            collection.confirm(session, asked, seen)

    with pytest.raises(ZeroDivisionError):
        die()
    asked.put(b"written by a merge")
    seen = collection.look(bench.store.database, asked, [sha256])
    with bench.store.database.write():
        asked.remove([sha256])  # what the dead one had sent arrives late
    with pytest.raises(UnavailableError) as caught:
        name()
    assert caught.value.code == "blob.collected"


def test_an_upload_that_does_not_move_expires(bench: Bench) -> None:
    round_id = bench.open_round()
    contribution = bench.contribute(round_id, "org", {"a": np.ones(64, "<f4")})
    with bench.store.database.write() as session:
        row = contributions.get(session, contribution)
        old, now = bench.clock.now() - 8 * DAY, bench.clock.now()
        for digest, moved in (("0" * 64, None), ("1" * 64, now)):
            session.add(
                Upload(
                    id=upload_id(digest),
                    manifest_digest=digest,
                    contributor="org",
                    machine="box",
                    round=round_id,
                    manifest=row.manifest,
                    signature=b"",
                    total_size=100,
                    committed_size=10,
                    created_at=old,
                    updated_at=moved,
                    fence=0,
                )
            )
    assert summary(bench.store, bench.clock.now())["uploads"] == 1
    with bench.store.database.read() as session:
        assert [row.manifest_digest for row in session.query(Upload)] == ["1" * 64]


def test_task_vectors_go_only_if_a_setting_says_so(bench: Bench) -> None:
    play(bench, 1)
    bench.clock.advance(LONG)
    assert summary(bench.store, bench.clock.now())["contributions"] == 0
    keep = bench.store.config.retention.model_copy(update={"contributions": 10 * DAY})
    bench.store.config = bench.store.config.model_copy(update={"retention": keep})
    round_id = bench.open_round()
    assert summary(bench.store, bench.clock.now())["contributions"] == 0, "a re-merge may want it"
    abandon(bench, round_id)
    assert summary(bench.store, bench.clock.now())["contributions"] == 1
    with bench.store.database.read() as session:
        (row,) = session.scalars(select(Contribution))
    assert row.payload_erased_at == bench.clock.now()
    assert row.manifest
    assert not bench.store.payloads.exists(row.payload)
    all_of(bench)


def test_what_a_re_merge_that_began_meanwhile_reads_is_not_erased(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 1)
    for seed in (1, 2, 3):
        play(bench, seed)
    bench.clock.advance(LONG)
    keep = bench.store.config.retention.model_copy(update={"contributions": 10 * DAY})
    bench.store.config = bench.store.config.model_copy(update={"retention": keep})
    steps = collect(bench.store, bench.clock.now())
    assert next(found for found in steps if found.kind == "contribution").count == 1
    bench.open_round()
    assert sum(found.count for found in steps if found.kind == "contribution") == 0
    with bench.store.database.read() as session:
        rows = list(session.scalars(select(Contribution)))
    assert [row.payload_erased_at is None for row in rows].count(True) == 2
    assert sum(bench.store.payloads.exists(row.payload) for row in rows) == 2


def test_the_driver_collects_every_hour_in_small_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[datetime] = []

    def counted(store: object, now: datetime) -> object:
        asked.append(now)
        return iter([Collected("blob", 0, 0), Collected("blob", 1, 5)])

    monkeypatch.setattr("coldmerge_coordinator.driver.collect", counted)
    driver = Driver(bench.store, bench.clock)
    assert driver.step()
    assert not asked
    bench.clock.advance(COLLECT_EVERY)
    for _ in range(4):
        assert driver.step()
    assert len(asked) == 1
    bench.clock.advance(COLLECT_EVERY)
    assert driver.step()
    assert len(asked) == 2
    driver.close()


def test_every_setting_is_a_duration() -> None:
    settings = Retention.model_validate({"grace": "1h", "candidates": "2d", "contributions": "90d"})
    assert settings.grace == timedelta(hours=1)
    assert json.loads(settings.model_dump_json())["contributions"] == "90d"
