"""Power cuts of a contributor's machine: its outbox and its sent log, and the receipt it printed.

`coldmerge push` is recorded as the coordinator is in `test_power`. At every moment the home can
be read: each entry of the outbox is whole or not there, no line of the sent log looks tampered
with, and what waits to be sent is sent once. When the command has ended, the receipt is there.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from coldmerge_client import sent_log
from coldmerge_client.home import Home
from coldmerge_client.outbox import Outbox
from coldmerge_client.pull import pull
from coldmerge_client.push import send
from coldmerge_client.session import Session
from tests.crash.host import GATES, Host
from tests.crash.members import MODEL, base_tensors
from tests.crash.power import Disk
from tests.crash.trace import Step, Trace, recording
from tests.federation import COLDMERGE, environment
from tests.support import write_model
from tests.zygote import Zygote

pytestmark = [
    pytest.mark.xdist_group("crash-power"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]


@dataclass(frozen=True)
class Pushed:
    """A home before and while it pushed, and the coordinator that has it all."""

    home: Home
    before: Path
    steps: list[Step]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    folder, zygote = tmp_path_factory.mktemp("power-client"), Zygote()
    base = base_tensors(2000)
    host = Host.make(folder / "hub", zygote, base)
    host.start()
    home = host.join("a")
    host.open_round(**GATES[0])
    tuned = {n: (a.astype(np.float32) + 0.01).astype(a.dtype) for n, a in base.items()}
    write_model(folder / "tuned", tuned)
    with Session.open(home) as session:
        pull(session, MODEL)
    shutil.copytree(home.path, folder / "before")
    push = ("push", MODEL, "--from", str(folder / "tuned"), "--base", "0", "--examples", "10")
    command = [*recording(folder / "log"), *COLDMERGE, *push]
    subprocess.run(command, env=environment(COLDMERGE_HOME=str(home.path)), check=True)
    steps = [step for step in Trace().read(folder / "log") if step.path.startswith(str(home.path))]
    yield Pushed(home, folder / "before", steps)
    host.close()
    zygote.close()


def check_home(home: Home) -> int:
    """All of it can be read; what waits is sent: how many entries there are."""
    outbox = Outbox(home)
    outbox.tidy()
    sent_log.read(home)
    with Session.open(home) as session:
        for entry in outbox.entries():
            assert send(session, entry).receipt is not None
    logged = {line.body["manifest"] for line in sent_log.read(home) if line.event == "contribution"}
    assert logged == {entry.manifest.digest() for entry in outbox.entries()}
    return len(logged)


def test_the_power_goes_at_any_moment_of_a_push(pushed: Pushed) -> None:
    disk, found = Disk(pushed.home.path, pushed.before), []
    for number, step in enumerate(pushed.steps, 1):
        disk.apply(step)
        if step.kind not in ("end", "rename", "remove") and number < len(pushed.steps):
            continue
        for luck in (None, 1, 2):
            shutil.rmtree(pushed.home.path)
            disk.materialize(
                pushed.home.path, None if luck is None else random.Random(f"{number} {luck}")
            )
            found.append(check_home(pushed.home))
    assert found[0] == 0
    assert found[-3:] == [1, 1, 1]
    assert len(found) > 30


def test_a_receipt_that_was_printed_is_on_the_disk(pushed: Pushed) -> None:
    for luck in (None, 1, 2):
        disk = Disk(pushed.home.path, pushed.before)
        disk.follow(pushed.steps)
        shutil.rmtree(pushed.home.path)
        disk.materialize(pushed.home.path, None if luck is None else random.Random(luck))
        (entry,) = Outbox(pushed.home).entries()
        assert entry.state == "sent"
        assert entry.receipt is not None
        assert entry.receipt.manifest_digest == entry.manifest.digest()
        assert [line.event for line in sent_log.read(pushed.home)][-1] == "receipt"
