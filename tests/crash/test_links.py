"""Links that are cut, slow, or silent: an upload goes on, and little is sent again.

`python -m benchmarks.cuts --bytes 2000000000 --cuts 100` is the long run.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cuts import ALLOWED, Cutter
from coldmerge_client.home import Home
from coldmerge_client.prepare import Facts
from coldmerge_client.pull import pull
from coldmerge_client.push import push
from coldmerge_client.session import Session
from tests.client.conftest import Relay
from tests.crash.checks import check_folder
from tests.crash.host import GATES, Host
from tests.crash.members import MODEL, Ledger, Member, base_tensors
from tests.support import until, write_model
from tests.zygote import Zygote

pytestmark = pytest.mark.xdist_group("crash-links")

MiB = 2**20
PIECE = 16 * 1024


class Link(Relay):
    """A relay that can be slow (`pace`, bytes a second upwards) or silent: nothing passes any
    more, and nobody is told.
    """

    def __init__(self, target: str) -> None:
        self.pace: float | None = None
        self.speaks = threading.Event()
        self.speaks.set()
        super().__init__(target)

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        speaks = self.speaks
        with suppress(OSError):
            while data := source.recv(PIECE):
                speaks.wait()
                self._count(len(data), up)
                if up and self.pace is not None:
                    time.sleep(len(data) / self.pace)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def fall_silent(self) -> None:
        """For the connections there are; new ones pass."""
        self.speaks.clear()
        self.speaks = threading.Event()
        self.speaks.set()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


class Upload:
    """A coordinator, and one organization that reaches it through a link."""

    def __init__(self, folder: Path, zygote: Zygote, elements: int) -> None:
        self.base = base_tensors(elements)
        self.host = Host.make(folder / "hub", zygote, self.base)
        self.host.start()
        self.home: Home = self.host.join("a")
        self.link = Link(self.host.address)
        self.home.save_membership(replace(self.home.membership(), address=self.link.address))
        self.host.open_round(**GATES[0])

    def close(self) -> None:
        self.link.close()
        self.host.close()


Make = Callable[[int], Upload]


@pytest.fixture
def make(tmp_path: Path, zygote: Zygote) -> Iterator[Make]:
    made: list[Upload] = []

    def begin(elements: int) -> Upload:
        made.append(Upload(tmp_path, zygote, elements))
        return made[-1]

    yield begin
    for upload in made:
        upload.close()


def test_a_link_that_is_cut_again_and_again(make: Make, tmp_path: Path) -> None:
    upload = make(6 * MiB)
    tuned = {
        name: (array.astype(np.float32) + 0.01).astype(array.dtype)
        for name, array in upload.base.items()
    }
    write_model(tmp_path / "tuned", tuned)
    with Session.open(upload.home) as session:
        pull(session, MODEL)
        before = upload.link.up
        payload = sum(4 * array.size for array in tuned.values())
        with Cutter(upload.host.folder, upload.link, payload, cuts=6) as cutter:
            entry = push(session, MODEL, tmp_path / "tuned", Facts(examples=10), base=0)
    assert entry.receipt is not None
    assert len(cutter.waste) == 6
    assert max(cutter.waste) <= ALLOWED
    assert upload.link.up - before - payload <= 6 * 8 * MiB


def test_a_slow_link_is_waited_for(make: Make) -> None:
    upload = make(100_000)
    upload.link.pace = 200_000.0
    ledger = Ledger(upload.base)
    member = Member(upload.home, ledger, 1, habit=["send"])
    try:
        assert member.step()
        assert len(ledger.receipts) == 1
    finally:
        member.session.close()


def silent_half_way(upload: Upload, member: Member) -> threading.Thread:
    """Send, and let the link fall silent in the middle."""
    found = member.session.newest_round(MODEL)
    assert found is not None
    member.prepare(found)
    upload.link.pace = 400_000.0
    writing = threading.Thread(target=_quietly, args=(member,))
    before = upload.link.up
    writing.start()
    until("half of the payload", lambda: upload.link.up > before + 200_000, every=0.005)
    upload.link.fall_silent()
    upload.link.pace = None
    return writing


def _quietly(member: Member) -> None:
    with suppress(Exception):
        member.send()


def test_a_peer_that_has_vanished_keeps_nobody_waiting(make: Make) -> None:
    """The dead stream is superseded by the one that comes next, without waiting for it."""
    upload = make(100_000)
    ledger = Ledger(upload.base)
    lost = Member(upload.home, ledger, 1, habit=["send"])
    writing = silent_half_way(upload, lost)
    again = Member(upload.home, ledger, 1, habit=["send"])
    again._pending = lost._pending
    try:
        started = time.monotonic()
        until("the receipt", lambda: again.step() and ledger.receipts)
        assert time.monotonic() - started < 10
        assert len(ledger.receipts) == 1
    finally:
        again.session.close()
        lost.session.close()
        writing.join(60)
    upload.host.stop()
    check_folder(upload.host.folder, ledger)


@pytest.mark.slow
def test_a_client_notices_that_the_coordinator_has_vanished(make: Make) -> None:
    """Its pings are not answered: within a minute it calls again."""
    upload = make(100_000)
    ledger = Ledger(upload.base)
    member = Member(upload.home, ledger, 1, habit=["send"])
    started = time.monotonic()
    writing = silent_half_way(upload, member)
    writing.join(90)
    assert not writing.is_alive()
    assert time.monotonic() - started < 75
    member.session.close()
    member.send()
    assert len(ledger.receipts) == 1
    member.session.close()
