"""Uploads beside each other, over a disk and a database that fail."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from coldmerge.core.errors import ColdmergeError, ConflictError, UnavailableError
from coldmerge.wire.calls import call
from coldmerge.wire.v1 import admin_pb2, models_pb2
from coldmerge_coordinator.store import rounds
from coldmerge_coordinator.store.models import Contribution, Upload
from tests.backends import needs_disk
from tests.harness import Live, deltas


def test_anybodys_upload_to_an_ended_round_gives_its_disk_back(live: Live) -> None:
    gone, org = live.machine("gone"), live.machine("a")
    first = live.open_round()
    gone.begin(gone.manifest(first, deltas())[0])
    call(live.local_admin.AbandonRound, admin_pb2.RoundAction(round=first.id, reason="test"))
    begun = org.begin(org.manifest(live.open_round(), deltas())[0])
    assert [name for name, _ in live.store.payloads.parts()] == [begun.upload_id]
    with live.store.database.read() as session:
        assert [row.id for row in session.query(Upload)] == [begun.upload_id]


def test_nobody_waits_while_anothers_upload_is_opened(live: Live) -> None:
    a, b = live.machine("a"), live.machine("b")
    round_ = live.open_round()
    begun = a.begin(a.manifest(round_, deltas(1))[0])
    with live.servers._intake._turn("a"):
        b.contribute(round_, deltas(2))
    assert a.status(begun.upload_id).committed_size == 0


@needs_disk
def test_lost_bytes_are_begun_again_at_once(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:100])
    live.servers._intake.close()
    (live.store.uploads / f"{begun.upload_id}.part").unlink()
    again = org.begin(manifest)
    assert (again.upload_id, again.committed_size) == (begun.upload_id, 0)
    org.write(again.upload_id, payload)
    org.commit(again.upload_id)


@needs_disk
def test_a_failed_fsync_is_not_believed_the_second_time(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload[:64])
    real = os.fsync
    failed: list[int] = []

    def fsync(fd: int) -> None:
        if not failed and Path(f"/proc/self/fd/{fd}").readlink().suffix == ".part":
            failed.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ColdmergeError):
        org.write(begun.upload_id, payload[64:], offset=64)
    assert failed
    assert org.begin(manifest).committed_size == 64
    org.write(begun.upload_id, payload[64:], offset=64)
    org.commit(begun.upload_id)


def test_a_commit_that_goes_on_without_its_caller_keeps_its_file(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(min_contributions=2), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    intake = live.servers._intake
    count, move = intake._count, rounds.apply
    moved, answered = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        effects = move(*arguments, **named)
        moved.set()
        answered.wait(30)
        return effects

    def cut(*arguments: Any) -> Any:
        monkeypatch.setattr(rounds, "apply", slow)
        threading.Thread(target=count, args=arguments).start()
        assert moved.wait(30)
        monkeypatch.setattr(rounds, "apply", move)
        threading.Timer(0.5, answered.set).start()
        raise UnavailableError("store.unavailable", "cut", hint="test")

    monkeypatch.setattr(intake, "_count", cut)
    receipt = org.commit(begun.upload_id)
    with live.store.database.read() as session:
        (row,) = session.query(Contribution)
    assert row.receipt == receipt.document
    assert live.store.payloads.exists(row.payload)


def test_a_commit_whose_answer_was_lost_keeps_its_file(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    intake = live.servers._intake
    count = intake._count

    def lost(*arguments: Any) -> Any:
        count(*arguments)
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("connection lost"))

    monkeypatch.setattr(intake, "_count", lost)
    org.commit(begun.upload_id)
    with live.store.database.read() as session:
        (row,) = session.query(Contribution)
    assert live.store.payloads.exists(row.payload)


def test_a_discarded_upload_cannot_be_committed(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    upload = live.servers._intake._live[begun.upload_id]
    upload.discard()
    with pytest.raises(ConflictError) as caught:
        upload.finish()
    assert caught.value.code == "upload.superseded"


def test_a_full_disk_does_not_stop_readers(live: Live) -> None:
    org = live.machine("a")

    def full(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE machine"):
            raise OperationalError(
                statement, {}, sqlite3.OperationalError("database or disk is full")
            )

    event.listen(live.store.database.engine, "before_cursor_execute", full)
    assert call(org.models.ListModels, models_pb2.ListModelsRequest()).models


def test_refused_payloads_leave_nothing_in_memory(live: Live) -> None:
    org = live.machine("a")
    round_ = live.open_round()
    for seed in range(3):
        manifest, payload = org.manifest(round_, deltas(seed))
        begun = org.begin(manifest)
        with pytest.raises(ColdmergeError):
            org.write(begun.upload_id, b"\0" * len(payload))
    begun = org.begin(org.manifest(round_, deltas(9))[0])
    assert list(live.servers._intake._live) == [begun.upload_id]
