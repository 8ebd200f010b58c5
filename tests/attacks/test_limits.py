"""What one caller can take is bounded; whoever is slow, or too many, harms nobody else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from coldmerge.core.errors import ResourceError, UnauthenticatedError, UnavailableError
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.v1 import contributions_pb2, models_pb2, rounds_pb2
from coldmerge_coordinator import config as settings
from coldmerge_coordinator.config import Limits
from tests.harness import MODEL, Keys, Live, MachineClient, chunk, deltas, make_coordinator
from tests.support import until

LIST = models_pb2.ListModelsRequest()
WATCH = rounds_pb2.WatchRoundsRequest(model=MODEL)
ELEMENTS = 24 * 2**20


@contextmanager
def limited(folder: Path, large: bool = False, **limits: float) -> Iterator[Live]:
    """A coordinator with these limits; `large`: of a model of 96 MiB."""
    tensors = {"w": np.zeros(ELEMENTS, np.float32)} if large else None
    made = make_coordinator(folder / "hub", tensors)
    changed = settings.load(made).model_copy(update={"limits": Limits.model_validate(limits)})
    settings.save(changed, made)
    live = Live(made)
    try:
        yield live
    finally:
        live.close()


def watch(org: MachineClient) -> Iterator[object]:
    """A stream that is open and has said something."""
    stream = server_stream(org.rounds.Watch, WATCH)
    next(stream)
    return stream


def test_calls_at_a_time(tmp_path: Path) -> None:
    with limited(tmp_path, max_calls=2) as live:
        live.open_round(min_contributions=3)
        org, other = live.machine("a"), live.machine("b")
        streams = [watch(org), watch(org)]
        with pytest.raises(ResourceError) as caught:
            call(org.models.ListModels, LIST, patience=0)
        assert caught.value.code == "limit.too_many_calls"
        assert call(other.models.ListModels, LIST, patience=0).models[0].name == MODEL
        streams.pop().close()  # type: ignore[attr-defined]
        until("the place is free", lambda: not _refused(org))
        streams.pop().close()  # type: ignore[attr-defined]


def _refused(org: MachineClient) -> bool:
    try:
        call(org.models.ListModels, LIST, patience=0)
    except ResourceError:
        return True
    return False


def test_bytes_a_day(tmp_path: Path) -> None:
    with limited(tmp_path, bytes_per_day=700) as live:
        round_ = live.open_round(min_contributions=3)
        org = live.machine("a")
        manifest, payload = org.manifest(round_, deltas())
        begun = org.begin(manifest)
        for _ in range(3):
            assert org.begin(manifest).upload_id == begun.upload_id  # the same one costs nothing
        assert 2 * len(payload) <= 700 < 3 * len(payload)
        org.begin(org.manifest(round_, deltas(2))[0])
        with pytest.raises(ResourceError) as caught:
            org.begin(org.manifest(round_, deltas(3))[0])
        assert caught.value.code == "upload.quota"
        live.machine("b").contribute(round_, deltas(4))
        org.write(begun.upload_id, payload)
        org.commit(begun.upload_id)


def test_an_upload_that_stands_still_is_ended_and_goes_on(tmp_path: Path) -> None:
    with limited(tmp_path, idle_seconds=0.5) as live:
        round_ = live.open_round(min_contributions=2)
        org = live.machine("a")
        manifest, payload = org.manifest(round_, deltas())
        upload = org.begin(manifest).upload_id
        ended = threading.Event()

        def requests() -> Iterator[contributions_pb2.WriteRequest]:
            yield chunk(upload, 0, payload[:100])
            ended.wait(30)

        with pytest.raises(UnavailableError) as caught:
            org.stream(requests())
        ended.set()
        assert caught.value.code == "limit.stalled"
        assert org.status(upload).committed_size == 100
        org.write(upload, payload[100:], offset=100)
        org.commit(upload)


def test_a_reader_that_takes_nothing_is_ended(tmp_path: Path) -> None:
    with limited(tmp_path, large=True, idle_seconds=0.5, max_calls=1) as live:
        org = live.machine("a")
        latest = models_pb2.GetReleaseRequest(model=MODEL, latest=True)
        sha256 = call(org.models.GetRelease, latest).tensors[0].sha256
        request = models_pb2.ReadBlobRequest(sha256=sha256)
        with closing(server_stream(org.models.ReadBlob, request, deadline=60)) as stream:
            first = next(stream)
            assert _refused(org)
            until("the stream was ended", lambda: not _refused(org))
            with pytest.raises(UnavailableError) as caught:
                list(stream)
        assert first.offset == 0
        assert caught.value.code == "limit.stalled"


def test_enrolment_attempts(tmp_path: Path) -> None:
    with limited(tmp_path, enrolments_per_minute=3) as live:
        for _ in range(3):
            with pytest.raises(UnauthenticatedError):
                call(live.enrolment.Enrol, Keys.make().enrol_request("guess"), patience=0)
        with pytest.raises(ResourceError) as caught:
            call(live.enrolment.Enrol, Keys.make().enrol_request("guess"), patience=0)
        assert caught.value.code == "limit.too_often"
        live.clock.offset = timedelta(minutes=1)
        with pytest.raises(UnauthenticatedError):
            call(live.enrolment.Enrol, Keys.make().enrol_request("guess"), patience=0)


@pytest.mark.slow
def test_a_connection_that_never_shakes_hands_is_closed(tmp_path: Path) -> None:
    with limited(tmp_path) as live:
        host, port = live.servers.addresses.api.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=20) as idle:
            assert idle.recv(1) == b""
