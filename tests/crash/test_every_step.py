"""kill -9 at every durable step of a round, in the API and in the worker.

A durable step is an fsync, a rename or an unlink in the coordinator's folder. One round is
counted undisturbed, from the start of the processes: contributions (one in two parts, one taken
back, one replaced), the merge, evaluations, the publication. Then the same round is killed as
it enters its first step, its second, and so on, started again, and comes to its release.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coldmerge.core.errors import ConflictError, UnavailableError
from coldmerge.wire.v1 import common_pb2
from coldmerge_client.home import Home
from tests.crash.checks import check_folder
from tests.crash.host import GATES, Host
from tests.crash.members import MODEL, Ledger, Member, base_tensors
from tests.crash.trap import Trap
from tests.zygote import Zygote

pytestmark = [
    pytest.mark.xdist_group("crash-steps"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

HABITS = {"a": ["send", "take back", "send"], "b": ["send", "send"], "c": ["send"]}
ELEMENTS = 2000
SEED = 3
PATIENCE = 120.0


@dataclass
class Stage:
    """A federation that is put back to its beginning for every round."""

    paused: Path
    host: Host
    trap: Trap
    calm: Zygote
    homes: list[Home]

    def play(self, at: int | None) -> bool:
        """One round, killed at step `at`: whether the kill came."""
        host, ledger = self.host, Ledger(base_tensors(ELEMENTS))
        shutil.rmtree(host.folder)
        shutil.copytree(self.paused, host.folder)
        traced, hit = host.zygote, self.trap.hit
        self.trap.arm(at, lambda: host.api)
        members = [Member(home, ledger, SEED, HABITS[home.path.name[-1]]) for home in self.homes]
        try:
            host.start(unless=hit.is_set)
            patience = time.monotonic() + PATIENCE
            while not self._finished(members):
                assert time.monotonic() < patience, f"the round stands still; killed at step {at}"
                if hit.is_set() and host.zygote is traced:
                    self._again()
        finally:
            for member in members:
                member.session.close()
            host.close()
            host.zygote = traced
        assert check_folder(host.folder, ledger).releases == 2
        return hit.is_set()

    def _again(self) -> None:
        self.host.kill()
        self.host.zygote = self.calm
        self.host.start()

    def _finished(self, members: list[Member]) -> bool:
        """Everybody does something; whether the round is published."""
        try:
            found = members[0].session.newest_round(MODEL)
            if found is None:
                self.host.open_round(**GATES[1])
            elif found.state == common_pb2.Round.PUBLISHED:
                return True
            else:
                assert found.state not in ENDED, found
            for member in members:
                while member.step() and not self.trap.hit.is_set():
                    pass
        except (UnavailableError, ConflictError):
            for member in members:
                member.session.close()
        time.sleep(0.01)
        return False


ENDED = (common_pb2.Round.REJECTED, common_pb2.Round.ABANDONED)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("steps")
    trap = Trap(folder / "hub", folder / "pipe")
    calm, traced = Zygote(), Zygote(*trap.command)
    host = Host.make(folder / "hub", calm, base_tensors(ELEMENTS))
    host.start()
    homes = [host.join(name) for name in HABITS]
    host.stop()
    shutil.copytree(host.folder, folder / "paused", ignore=shutil.ignore_patterns("*.sock"))
    host.zygote = traced
    yield Stage(folder / "paused", host, trap, calm, homes)
    host.close()
    for zygote in (traced, calm):
        zygote.close()
    trap.close()
    shutil.rmtree(folder)


Steps = list[str]


@pytest.fixture(scope="module")
def steps(stage: Stage) -> Steps:
    """The durable steps of a round that nobody disturbs."""
    assert not stage.play(None)
    return list(stage.trap.entered)


def kill_at(stage: Stage, places: list[int]) -> Counter[str]:
    """Kill a round at each of these steps: what was being done."""
    found: Counter[str] = Counter()
    for place in places:
        if stage.play(place):
            found[stage.trap.entered[place - 1]] += 1
    return found


def test_killed_at_some_steps(stage: Stage, steps: Steps, seed: int) -> None:
    places = random.Random(seed).sample(range(1, len(steps) - 4), 2)
    assert kill_at(stage, places).total() == len(places)


@pytest.mark.slow
def test_killed_at_every_step(
    stage: Stage, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    found = kill_at(stage, list(range(1, len(steps) + 1)))
    with capsys.disabled():
        print(
            f"\n{found.total()} kills, one at each of the {len(steps)} durable steps of a round; "
            f"lost 0, torn 0; {time.monotonic() - started:.0f} s"
        )
        for step, count in sorted(found.items()):
            print(f"  {count:4} {step}")
    assert found.total() >= len(steps) - 8, "a few steps are renewals, which come by the clock"
