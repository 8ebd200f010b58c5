"""Webhooks, against a real HTTP server that sometimes refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from coldmerge_coordinator.notices import ID_HEADER, Notifier
from coldmerge_coordinator.store import notices
from coldmerge_coordinator.store.models import Notice

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent; answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 204
        self.requests = 0
        self.bodies: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests += 1
        if self.server.status < 300:
            assert body["id"] == self.headers[ID_HEADER]
            self.server.bodies.append(body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        if 300 <= self.server.status < 400:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def notifier(bench: Bench) -> Iterator[Notifier]:
    made = Notifier(bench.store.database, bench.clock)
    yield made
    made.close()


def queue(bench: Bench, url: str, text: str = "hello") -> None:
    with bench.store.database.write() as session:
        notices.insert(session, url, {"kind": "test", "text": text}, bench.clock.now())
    bench.clock.advance(timedelta(milliseconds=1))


def test_delivered_once_and_in_order(bench: Bench, receiver: Receiver, notifier: Notifier) -> None:
    for text in ("one", "two", "three"):
        queue(bench, receiver.url, text)
    assert notifier.deliver_due() == 3
    assert notifier.deliver_due() == 0
    assert [body["text"] for body in receiver.bodies] == ["one", "two", "three"]


@pytest.mark.parametrize("status", [302, 404, 500])
def test_refused_ones_come_again_later(
    bench: Bench, receiver: Receiver, notifier: Notifier, status: int
) -> None:
    queue(bench, receiver.url)
    receiver.status = status
    waits = []
    for _ in range(4):
        assert notifier.deliver_due() == 0
        assert notifier.deliver_due() == 0, "not before its time"
        with bench.store.database.read() as session:
            due_at = session.scalars(select(Notice)).one().next_attempt_at
        waits.append(due_at - bench.clock.now())
        bench.clock.advance(waits[-1])
    assert receiver.requests == 4
    assert waits == [timedelta(seconds=seconds) for seconds in (5, 10, 20, 40)]
    receiver.status = 200
    assert notifier.deliver_due() == 1
    assert len(receiver.bodies) == 1


def test_a_dead_receiver_costs_one_attempt_and_does_not_hold_up_others(
    bench: Bench, receiver: Receiver, notifier: Notifier
) -> None:
    dead = "http://127.0.0.1:9/hook"
    for url in (dead, dead, receiver.url, "http://[broken/"):
        queue(bench, url)
    assert notifier.deliver_due() == 1
    with bench.store.database.read() as session:
        rows = session.scalars(select(Notice).order_by(Notice.created_at)).all()
    assert [row.attempts for row in rows] == [1, 0, 1, 1]
    assert [row.delivered_at is None for row in rows] == [True, True, False, True]
