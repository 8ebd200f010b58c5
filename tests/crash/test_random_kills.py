"""kill -9 at random moments of a federation that goes on: `pytest … --kills 500 --seed 1`.

Contributors contribute, take back and judge over many rounds while the coordinator, its
worker or both are killed and started again. A reader in a process of its own checks every
release it can read. In the end nothing that was acknowledged is missing, and every release
is, bit for bit, what an undisturbed merge of its inputs is.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import reader
from tests.crash.checks import check_folder
from tests.crash.host import Host, Opener, What
from tests.crash.members import MODEL, Crowd, Ledger, Member, base_tensors
from tests.zygote import Zygote

pytestmark = pytest.mark.xdist_group("crash-random")

NAMES = ("a", "b", "c")
MOMENTS = (("begin", 2, 0.01), ("write", 2, 0.01), ("commit", 4, 0.02), ("withdraw", 1, 0.01),
           ("judge", 2, 0.02), ("receipt", 4, 0.6), ("start", 1, 0.4))  # fmt: skip
"""What is being done, its weight, and how many seconds after it the kill may come."""
WHOM: tuple[tuple[What, int], ...] = (("all", 5), ("api", 3), ("worker", 2))
COMMAND_EVERY = 25
"""So often the coordinator is started by its command, with a supervised worker."""


class Killer:
    """Kills at moments that are drawn by what is being done."""

    def __init__(self, host: Host, ledger: Ledger, seed: int) -> None:
        self._host, self._ledger = host, ledger
        self._draw = random.Random(seed)
        self.done: Counter[str] = Counter()

    def once(self, number: int) -> None:
        """Wait for a moment, kill, start again."""
        (moment, _, within) = self._draw.choices(MOMENTS, [m[1] for m in MOMENTS])[0]
        (whom, _) = self._draw.choices(WHOM, [w[1] for w in WHOM])[0]
        if moment != "start":
            self._ledger.wait_for(moment, 3.0)
        time.sleep(self._draw.uniform(0, within))
        self._host.kill(whom)
        self.done[f"{whom} at {moment}"] += 1
        self._host.start(real=number % COMMAND_EVERY == COMMAND_EVERY - 1)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    zygote = Zygote()
    made = Host.make(tmp_path / "hub", zygote, base_tensors())
    yield made
    made.close()
    zygote.close()
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_killed_at_random_moments(
    host: Host, kills: int, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    ledger = Ledger(base_tensors())
    host.start()
    members = [Member(host.join(name), ledger, seed) for name in NAMES]
    watching = reader.start(host.join("reader"))
    opener, crowd = Opener(host), Crowd(members, ledger)
    killer = Killer(host, ledger, seed)
    try:
        for number in range(kills):
            killer.once(number)
            assert ledger.failures == []
            assert watching.poll() is None
        until_quiet(host, ledger)
    finally:
        opener.stop()
        crowd.stop()
        seen = reader.finish(watching)
    assert ledger.failures == []
    assert seen["wrong"] == []
    host.kill()
    sound = check_folder(host.folder, ledger)
    check_second_start(host)
    assert check_folder(host.folder, ledger).receipts == sound.receipts
    with capsys.disabled():
        print(
            f"\n{kills} kills (seed {seed}), {sound.rounds} rounds, {sound.releases - 1} releases, "
            f"{sound.receipts} contributions acknowledged, lost 0, torn 0; the reader verified "
            f"{seen['releases']} releases and {seen['blobs']} blobs in {seen['polls']} polls; "
            f"{time.monotonic() - started:.0f} s"
        )
    assert seen["releases"] > kills // 50
    assert len(ledger.receipts) > kills // 2


def until_quiet(host: Host, ledger: Ledger) -> None:
    """Left in peace, the federation goes on: two more rounds come to their end."""
    if host.real is not None:
        host.kill()
    host.start()
    for _ in range(6):
        assert ledger.wait_for("receipt", 60), f"{MODEL} stands still; {host.log}"


def check_second_start(host: Host) -> None:
    """Started once more, it serves, and ends when it is asked to, without a complaint."""
    before = host.log.stat().st_size
    host.start()
    host.stop()
    said = host.log.read_bytes()[before:].decode()
    assert "Traceback" not in said, said
    assert "[error" not in said, said
