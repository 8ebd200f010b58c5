"""Two API processes on one database: an upload moves from one to the other and back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.errors import ColdmergeError, ConflictError
from coldmerge.core.task_vector import TaskVector
from coldmerge.rounds.policy import RoundPolicy
from coldmerge_coordinator import config as settings
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.service.uploads import FLUSH_BYTES, LiveUpload
from coldmerge_coordinator.store import Store, releases
from coldmerge_coordinator.store.models import Contribution
from coldmerge_coordinator.worker import run_once
from tests import s3
from tests.backends import needs_disk
from tests.harness import Live, MachineClient, make_coordinator
from tests.support import write_model

MiB = 2**20
SIZE = 40 * MiB


class Replicas:
    """Two coordinators: of one folder, or of two folders and one bucket."""

    def __init__(self, a: Live, b: Live) -> None:
        self.a, self.b = a, b
        self.org = a.machine("org")
        self.moved = MachineClient(b, "org", "box", self.org.keys, self.org.chain_pem)
        policy = RoundPolicy.model_validate({"min_contributions": 1, "gate": None})
        round_ = admin.open_round(a.store, "large", policy.model_dump_json(), a.clock.now())
        draw = np.random.default_rng(5)
        delta = {"large.weight": draw.random(SIZE // 4, np.float32)}
        self.manifest, self.payload = self.org.manifest(round_, delta)
        self.upload = self.org.begin(self.manifest).upload_id

    def opened(self, live: Live) -> LiveUpload:
        return live.servers._intake._live[self.upload]


def _folders(tmp_path: Path, blobs: str) -> tuple[Path, Path]:
    first = make_coordinator(tmp_path / "a", {"tiny": np.ones(4, np.float32)})
    second = tmp_path / "b"
    if blobs == "disk":
        second = first
    else:
        config = settings.load(first)
        kept = {**config.model_dump(), **s3.server().config(), "database_url": _url(first)}
        for folder in (first, second):
            if not folder.exists():
                _copy_keys(first, folder)
            settings.save(settings.CoordinatorConfig.model_validate(kept), folder)
    source = write_model(tmp_path / "large", {"large.weight": np.ones(SIZE // 4, np.float32)})
    with Store.open(first) as store:
        add_model(store, "large", source, ())
    return first, second


def _url(folder: Path) -> str:
    return settings.load(folder).database_in(folder)


def _copy_keys(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700)
    for name in ("keys", "ca", "offline"):
        shutil.copytree(source / name, target / name)


@pytest.fixture(params=["disk", "s3"])
def replicas(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Replicas]:
    folders = _folders(tmp_path, request.param)
    with ExitStack() as stack:
        lives = [Live(folder) for folder in folders]
        for live in lives:
            stack.callback(live.close)
        yield Replicas(*lives)


def test_a_moved_upload_goes_on_where_it_was(replicas: Replicas) -> None:
    r = replicas
    sent = 20 * MiB
    assert r.org.write(r.upload, r.payload[:sent]) == sent
    status = r.moved.status(r.upload)
    assert status.committed_size == sent
    r.moved.write(r.upload, r.payload[sent : 30 * MiB], offset=sent)
    back = r.org.status(r.upload).committed_size
    assert back == 30 * MiB
    r.org.write(r.upload, r.payload[back:], offset=back)
    r.moved.commit(r.upload)
    assert r.org.commit(r.upload).document == r.moved.commit(r.upload).document
    with r.b.store.database.read() as session:
        (row,) = session.query(Contribution)
    vector = TaskVector.open(r.b.store.payloads.local(row.payload))
    assert vector.entries() == r.manifest.tensors
    assert run_once(r.b.store, r.b.clock)
    with r.a.store.database.read() as session:
        assert releases.latest_release(session, "large").number == 1
    if r.a.store.bucket is not None:
        assert list(r.a.store.bucket.list("uploads")) == []


def test_a_replica_that_dies_costs_one_flush(replicas: Replicas) -> None:
    r = replicas
    r.org.write(r.upload, r.payload[:MiB])
    dead = r.opened(r.a)
    ticket = dead.take()
    for offset in range(MiB, 36 * MiB, MiB):  # its stream never ends: nothing is flushed for it
        dead.write(ticket, offset, r.payload[offset : offset + MiB])
    committed = r.moved.status(r.upload).committed_size
    assert dead.position - committed <= FLUSH_BYTES
    r.moved.write(r.upload, r.payload[committed:], offset=committed)
    r.moved.commit(r.upload)


def test_a_replica_that_was_left_behind_cannot_write(replicas: Replicas) -> None:
    r = replicas
    r.org.write(r.upload, r.payload[: 4 * MiB])
    stale = r.opened(r.a)
    ticket = stale.take()
    garbage = bytes(MiB)
    stale.write(ticket, 4 * MiB, r.payload[4 * MiB : 5 * MiB])
    r.moved.write(r.upload, r.payload[4 * MiB : 24 * MiB], offset=4 * MiB)
    with pytest.raises(ConflictError) as caught:
        _go_on(stale, ticket, garbage)
    assert caught.value.code == "upload.superseded"
    assert r.moved.status(r.upload).committed_size == 24 * MiB
    r.moved.write(r.upload, r.payload[24 * MiB :], offset=24 * MiB)
    r.moved.commit(r.upload)
    with r.a.store.database.read() as session:
        (row,) = session.query(Contribution)
    found = r.b.store.payloads.local(row.payload).read_bytes()
    assert found.endswith(r.payload)


def _go_on(stale: LiveUpload, ticket: int, data: bytes) -> None:
    """In S3 a write is private until it is flushed; on disk it is refused at once."""
    stale.write(ticket, stale.position, data)
    stale.flush()


def test_two_replicas_commit_at_once(replicas: Replicas) -> None:
    r = replicas
    r.org.write(r.upload, r.payload)
    r.moved.status(r.upload)
    receipts: list[bytes] = []
    failed: list[ColdmergeError] = []

    def commit(org: MachineClient) -> None:
        try:
            receipts.append(org.commit(r.upload).document)
        except ColdmergeError as error:
            failed.append(error)

    threads = [threading.Thread(target=commit, args=(org,)) for org in (r.org, r.moved)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receipts += [r.org.commit(r.upload).document, r.moved.commit(r.upload).document]
    assert len(set(receipts)) == 1
    assert all(isinstance(error, ConflictError) for error in failed)
    with r.a.store.database.read() as session:
        (row,) = session.query(Contribution)
    for live in (r.a, r.b):
        assert live.store.payloads.local(row.payload).read_bytes().endswith(r.payload)


@needs_disk
@pytest.mark.parametrize("replicas", ["disk"], indirect=True)
def test_who_opens_an_upload_leaves_a_commit_in_peace(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = replicas
    r.org.write(r.upload, r.payload)
    renamed, asked = threading.Event(), threading.Event()
    intake = r.a.servers._intake
    count = intake._count

    def slowly(*arguments: Any) -> Any:
        renamed.set()
        asked.wait(1)  # the other waits for us, and cannot answer before
        return count(*arguments)

    monkeypatch.setattr(intake, "_count", slowly)
    commit = threading.Thread(target=r.org.commit, args=(r.upload,))
    commit.start()
    renamed.wait(30)
    with pytest.raises(ColdmergeError):
        r.moved.status(r.upload)
    asked.set()
    commit.join()
    with r.a.store.database.read() as session:
        (row,) = session.query(Contribution)
    assert r.a.store.payloads.local(row.payload).read_bytes().endswith(r.payload)
