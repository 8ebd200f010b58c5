"""Uploads that are interrupted: by the link, by the coordinator, by kill -9 of the client."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from coldmerge.core.task_vector import TaskVector
from coldmerge_client import sent_log
from coldmerge_client.outbox import Outbox, OutboxEntry
from coldmerge_client.prepare import Facts, prepare
from coldmerge_client.push import send
from coldmerge_client.session import Session
from tests.client.conftest import Coordinator, Relay, through
from tests.support import until, write_model

MiB = 2**20
ELEMENTS = 12 * MiB
SIZE = 4 * ELEMENTS


@pytest.fixture(scope="module")
def large_tensors() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return {"body.large": np.zeros(ELEMENTS, np.float32)}


@pytest.fixture
def large(
    make_coordinator: Callable[..., Coordinator],
    large_tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
    tmp_path: Path,
) -> Iterator[tuple[Coordinator, Relay, Session, OutboxEntry]]:
    """A contribution of 48 MiB, prepared, with a relay on the way."""
    coordinator = make_coordinator(large_tensors)
    relay = Relay(coordinator.addresses()["api"])
    opened = coordinator.open_round(min_contributions=2)
    moved = np.random.default_rng(1).normal(size=ELEMENTS).astype(np.float32)
    tuned = write_model(tmp_path / "tuned", {"body.large": moved})
    home = through(coordinator.join(tmp_path / "home"), relay)
    with Session.open(home, timeout=20) as session:
        entry = prepare(session, opened, tuned, Facts(examples=12))
        relay.up = 0
        yield coordinator, relay, session, entry
    relay.close()


def check_complete(coordinator: Coordinator, entry: OutboxEntry) -> None:
    assert entry.receipt is not None
    name = f"{entry.receipt.contribution}.safetensors"
    stored = TaskVector.open(coordinator.folder / "contributions" / name)
    assert stored.entries() == entry.manifest.tensors


def test_an_upload_goes_on_when_the_link_breaks(
    large: tuple[Coordinator, Relay, Session, OutboxEntry],
) -> None:
    coordinator, relay, session, entry = large
    relay.cut_after(up=SIZE // 2)
    check_complete(coordinator, send(session, entry))
    assert relay.cuts == 1
    assert relay.up < SIZE + 24 * MiB


def test_an_upload_goes_on_when_the_coordinator_is_killed(
    large: tuple[Coordinator, Relay, Session, OutboxEntry],
) -> None:
    coordinator, relay, session, entry = large
    restarted: list[int] = []

    def progress(step: str, done: int, total: int) -> None:
        if step == "upload" and done > SIZE // 2 and not restarted:
            restarted.append(done)
            coordinator.stop(signal.SIGKILL)
            coordinator.start()

    check_complete(coordinator, send(session, entry, progress=progress))
    assert restarted
    assert relay.up < SIZE + 40 * MiB


SENDER = """
import sys
from pathlib import Path
from threading import Event
from coldmerge_client.home import Home
from coldmerge_client.outbox import Outbox
from coldmerge_client.push import send
from coldmerge_client.session import Session

def stop_half_way(step, done, total):
    if step == "upload" and done >= total // 2:
        Path(sys.argv[2]).write_text(str(done))
        Event().wait()

with Session.open(Home(Path(sys.argv[1]))) as session:
    send(session, Outbox(session.home).entries()[-1], progress=stop_half_way)
"""


def test_an_upload_resumes_after_kill_9_of_the_client(
    large: tuple[Coordinator, Relay, Session, OutboxEntry], tmp_path: Path
) -> None:
    coordinator, relay, session, entry = large
    mark = tmp_path / "half"
    process = subprocess.Popen([sys.executable, "-c", SENDER, str(session.home.path), str(mark)])
    try:
        until("half of the upload", mark.exists, 30)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert Outbox(session.home).get(entry.id).state == "sending"
    check_complete(coordinator, send(session, Outbox(session.home).get(entry.id)))
    assert relay.up < SIZE + 20 * MiB
    events = [line.event for line in sent_log.read(session.home)]
    assert events == ["join", "contribution", "receipt"]
