"""How long somebody who was shut out goes on: measured on real sockets, on every kind of stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
import structlog
from sqlalchemy import text

from coldmerge.core.errors import ColdmergeError, UnauthenticatedError
from coldmerge.wire.calls import call
from coldmerge.wire.errors import from_rpc_error
from coldmerge.wire.v1 import admin_pb2, contributions_pb2, models_pb2, rounds_pb2
from coldmerge.wire.version import call_metadata
from coldmerge_coordinator.config import Limits
from coldmerge_coordinator.store.models import Contributor, Round
from tests.harness import MODEL, Live, MachineClient, chunk, coordinator, deltas, model_tensors
from tests.support import until

ON_NEW_CALLS = 1.0
ON_OPEN_STREAMS = 5.0
EACH = 5
BIG = np.zeros((4096, 4096), np.float32)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("revocation") / "hub"
    limits = Limits(enrolments_per_minute=1000)
    with coordinator(folder, {**model_tensors(), "big.weight": BIG}, limits) as live:
        live.open_round(min_contributions=500)
        yield live


def _shut_out(live: Live, contributor: str) -> float:
    request = admin_pb2.RevokeRequest(contributor=contributor, reason="test")
    call(live.local_admin.Revoke, request)
    return time.monotonic()


@dataclass
class _Open:
    """A stream in a thread of its own, and when and how it ended."""

    live: Live
    who: MachineClient
    kind: str
    end: threading.Event = field(default_factory=threading.Event)
    hung_up: float = 0.0
    error: ColdmergeError | None = None

    def start(self) -> _Open:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def _run(self) -> None:
        try:
            STREAMS[self.kind](self)
        except grpc.RpcError as error:
            self.hung_up = time.monotonic()
            self.error = from_rpc_error(error)

    def drain(self, stream: Iterator[object]) -> None:
        for _ in stream:
            pass


def _idle_upload(opened: _Open) -> None:
    """Begun, one chunk sent, then silence."""
    _upload(opened, lambda: opened.end.wait(30))


def _slow_upload(opened: _Open) -> None:
    """A chunk of nothing every 50 ms: it never gets anywhere."""
    _upload(opened, lambda: opened.end.wait(0.05))


def _upload(opened: _Open, pause: Callable[[], bool]) -> None:
    who, live = opened.who, opened.live
    with live.store.database.read() as session:
        round_ = session.query(Round).one()
    manifest, payload = who.manifest(round_, deltas())
    upload = who.begin(manifest).upload_id

    def requests() -> Iterator[contributions_pb2.WriteRequest]:
        for offset in range(len(payload)):
            yield chunk(upload, offset, payload[offset : offset + 1])
            if pause():
                return

    who.contributions.Write(requests(), metadata=call_metadata())


def _stalled_download(opened: _Open) -> None:
    """Reads one chunk of 64 MiB and then nothing: only the coordinator can end it."""
    release = call(opened.who.models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL))
    sha256 = next(tensor.sha256 for tensor in release.tensors if tensor.name == "big.weight")
    request = models_pb2.ReadBlobRequest(sha256=sha256)
    stream = opened.who.models.ReadBlob(request, metadata=call_metadata())
    next(stream)
    opened.end.wait(30)
    opened.drain(stream)


def _watch_releases(opened: _Open) -> None:
    request = models_pb2.WatchReleasesRequest(model=MODEL, after_number=-1)
    opened.drain(opened.who.models.WatchReleases(request, metadata=call_metadata()))


def _watch_rounds(opened: _Open) -> None:
    request = rounds_pb2.WatchRoundsRequest(model=MODEL)
    opened.drain(opened.who.rounds.Watch(request, metadata=call_metadata()))


STREAMS: dict[str, Callable[[_Open], None]] = {
    "idle upload": _idle_upload,
    "slow upload": _slow_upload,
    "stalled download": _stalled_download,
    "watch releases": _watch_releases,
    "watch rounds": _watch_rounds,
}


METHODS = ("/Write", "/ReadBlob", "/WatchReleases", "/Watch")


def _open_streams(live: Live) -> int:
    """How many streams the coordinator handles: not the short calls that lead to them."""
    return sum(call.method.endswith(METHODS) for call in live.servers._sentry._open)


def _let_go(live: Live, who: MachineClient) -> bool:
    return all(call.who.contributor != who.contributor for call in live.servers._sentry._open)


def test_open_streams_end_within_five_seconds(running: Live) -> None:
    opened = [
        _Open(running, running.machine(f"{kind.replace(' ', '-')}-{number}"), kind).start()
        for number in range(EACH)
        for kind in STREAMS
    ]
    until("all streams to be open", lambda: _open_streams(running) == len(opened))
    took = dict.fromkeys(STREAMS, 0.0)
    for stream in opened:
        shut_out = _shut_out(running, stream.who.contributor)
        if stream.kind == "stalled download":
            until("the coordinator to let go", partial(_let_go, running, stream.who))
            took[stream.kind] = max(took[stream.kind], time.monotonic() - shut_out)
            stream.end.set()
        until(f"the end of {stream.kind}", partial(getattr, stream, "error"))
        assert stream.error is not None
        assert stream.error.code == "auth.revoked"
        if stream.kind != "stalled download":
            took[stream.kind] = max(took[stream.kind], stream.hung_up - shut_out)
    print(f"\n{len(opened)} open streams, worst seconds from revocation to the end:")
    for kind, worst in took.items():
        print(f"  {kind:18} {worst:.3f}")
    assert max(took.values()) < ON_OPEN_STREAMS


def test_new_calls_end_at_once(running: Live) -> None:
    took = []
    for number in range(20):
        org = running.machine(f"caller-{number}")
        call(org.models.ListModels, models_pb2.ListModelsRequest())
        shut_out = _shut_out(running, org.contributor)
        with pytest.raises(ColdmergeError) as caught:
            call(org.models.ListModels, models_pb2.ListModelsRequest(), patience=0)
        took.append(time.monotonic() - shut_out)
        assert caught.value.code == "auth.revoked"
    print(f"\n{len(took)} revocations, worst seconds to a refused call: {max(took):.3f}")
    assert max(took) < ON_NEW_CALLS


@pytest.mark.parametrize("change", ["role", "expiry"])
def test_an_idle_stream_ends_with_the_right_to_it(tmp_path: Path, change: str) -> None:
    with coordinator(tmp_path / "hub") as live:
        live.open_round()
        stream = _Open(live, live.machine("a"), "idle upload").start()
        until("the stream to be open", lambda: _open_streams(live))
        if change == "role":
            with live.store.database.write() as session:
                session.get_one(Contributor, "a").role = "auditor"
        else:
            live.clock.offset = timedelta(hours=25)
        until("the end of the stream", lambda: stream.error, patience=ON_OPEN_STREAMS)
        assert stream.error is not None
        expected = "auth.wrong_role" if change == "role" else "auth.expired"
        assert stream.error.code == expected
        assert isinstance(stream.error, UnauthenticatedError) == (change == "expiry")


@pytest.mark.skipif("config.getoption('--database') != 'sqlite'", reason="types are checked")
def test_a_row_that_cannot_be_read_blinds_nobody_for_long(
    running: Live,
) -> None:
    """The look fails for all at once: it must be tried again."""
    until("what came before to end", lambda: not _open_streams(running))
    damaged, other = running.machine("damaged"), running.machine("other")
    streams = [_Open(running, who, "watch rounds").start() for who in (damaged, other)]
    statement = text("UPDATE machine SET enrolled_at = :at WHERE contributor = 'damaged'")

    def write(at: str) -> None:
        with running.store.database.write() as session:
            session.execute(statement, {"at": at})

    until("both streams to be open", lambda: _open_streams(running) == len(streams))
    with structlog.testing.capture_logs() as lines:
        write("never")
        until("the look to fail", lambda: any(x["event"] == "sentry.blind" for x in lines), 10)
    write("2026-01-01 00:00:00.000000")
    shut_out = _shut_out(running, "other")
    until("the end of the stream", lambda: streams[1].hung_up, 20)
    assert streams[1].hung_up - shut_out < ON_OPEN_STREAMS
    _shut_out(running, "damaged")
