"""Power cuts: nothing that was promised depends on what had not been synced.

The coordinator's file system calls are recorded while contributors contribute, take back and
judge, over several rounds. A model of the disk (`tests.crash.power`) then says what a power cut
would have left at each of those calls, without what was not synced, and with any part of it. On
each such folder everything that the contributors had been told by then must be true, and a
coordinator that is started on it goes on.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coldmerge_client.home import Home
from coldmerge_client.session import Session
from coldmerge_coordinator.identity import Authority
from coldmerge_coordinator.store import Store, contributions, models
from tests.crash.checks import check_folder, check_uploads
from tests.crash.host import Host, Opener
from tests.crash.members import MODEL, Crowd, Ledger, Member, Told, base_tensors
from tests.crash.power import Disk
from tests.crash.trace import Step, Trace, recording
from tests.federation import COLDMERGE, environment
from tests.support import until, write_model
from tests.zygote import Zygote

pytestmark = [
    pytest.mark.xdist_group("crash-power"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

NAMES = ("a", "b", "c")
ELEMENTS = 2000
SLOWER = "fsync,fdatasync:delay_enter=2000"
"""Whatever is said too early is heard before the fsync it should have waited for."""


@dataclass(frozen=True)
class Recorded:
    """A federation that was watched: its folder before, all calls, all that it said."""

    folder: Path
    before: Path
    steps: list[Step]
    ledger: Ledger
    homes: list[Home]
    fingerprint: str

    def host(self, zygote: Zygote) -> Host:
        """A coordinator on what is in the folder now."""
        return Host(self.folder, zygote, self.fingerprint)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Rounds until three releases are out and something was taken back."""
    folder = tmp_path_factory.mktemp("power")
    log, base = folder / "strace.log", base_tensors(ELEMENTS)
    zygote = Zygote(*recording(log, SLOWER))
    host = Host.make(folder / "hub", zygote, base)
    shutil.copytree(host.folder, folder / "before")
    host.start()
    ledger = Ledger(base)
    homes = [host.join(name) for name in NAMES]
    run(host, ledger, [Member(home, ledger, 5) for home in homes], releases=3)
    host.stop()
    zygote.close()
    steps = [step for step in Trace().read(log) if step.path.startswith(str(host.folder))]
    log.unlink()
    return Recorded(host.folder, folder / "before", steps, ledger, homes, host.fingerprint)


def run(host: Host, ledger: Ledger, members: list[Member], releases: int) -> None:
    """Let the federation go on until so many releases were made."""
    opener, crowd = Opener(host), Crowd(members, ledger)
    found: list[int] = []

    def enough() -> bool:
        assert ledger.failures == []
        with Session.open(members[0].session.home, timeout=5) as session:
            latest = session.release(MODEL)
        if latest.number not in found:
            found.append(latest.number)
            ledger.hears("release", latest.content_digest, size=latest.number)
        return found[-1] - found[0] >= releases

    try:
        until(f"{releases} releases", enough, every=0.1)
    finally:
        opener.stop()
        crowd.stop()


@dataclass(frozen=True)
class Cut:
    """A moment: after so many steps. `luck` seeds what survives of what was not synced."""

    after: int
    luck: int | None


def all_cuts(recorded: Recorded, lucky: int) -> list[Cut]:
    """Right after every call that makes durable, or that changes a folder's entries."""
    kinds = {"end", "rename", "remove", "create"}
    places = [n for n, step in enumerate(recorded.steps, 1) if step.kind in kinds]
    return [Cut(place, luck) for place in places for luck in (None, *range(lucky))]


def check_cut(recorded: Recorded, cut: Cut, disk: Disk) -> Ledger:
    """Materialize a cut in place of the folder, and see that nothing said by then is untrue."""
    shutil.rmtree(recorded.folder)
    draw = None if cut.luck is None else random.Random(f"{cut.after} {cut.luck}")
    disk.materialize(recorded.folder, draw)
    ledger = by_then(recorded.ledger, recorded.steps[cut.after - 1].at)
    check_folder(recorded.folder, ledger)
    with Store.open(recorded.folder) as store:
        check_uploads(store, ledger)
        check_told(store, ledger.told)
    return ledger


def by_then(ledger: Ledger, moment: float) -> Ledger:
    """What was known at a moment."""
    told = [each for each in ledger.told if each.at <= moment]
    receipts = {each.what[0] for each in told if each.kind == "receipt"}
    return Ledger(
        ledger.base,
        seeds=ledger.seeds,
        receipts={key: ledger.receipts[key] for key in receipts},
        given_up={each.what[0] for each in told if each.kind == "asked"},
        told=told,
    )


def check_told(store: Store, told: list[Told]) -> None:
    """Withdrawals, evaluations and releases that were heard of are there."""
    with store.database.read() as session:
        for each in told:
            if each.kind == "withdrawn":
                row = session.get_one(models.Contribution, each.what[0])
                assert row.state == contributions.WITHDRAWN
            elif each.kind == "evaluation":
                round_id, contributor = each.what
                assert (
                    session.query(models.Evaluation)
                    .filter_by(round=round_id, contributor=contributor)
                    .count()
                )
            elif each.kind == "release":
                release = session.get_one(models.Release, (MODEL, each.size))
                assert release.content_digest == each.what[0]


def check_goes_on(recorded: Recorded, ledger: Ledger, zygote: Zygote) -> None:
    """Started on what is left, the coordinator serves, and a release more comes out."""
    host = recorded.host(zygote)
    (host.folder / "run.json").unlink(missing_ok=True)
    try:
        host.start()
        run(host, ledger, [Member(home, ledger, 6) for home in recorded.homes], releases=1)
        host.stop()
    finally:
        host.close()
    check_folder(host.folder, ledger)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


Follow = Callable[[list[Cut], int], int]


@pytest.fixture
def follow(recorded: Recorded, zygote: Zygote) -> Follow:
    """Check cuts in their order; at every so many the coordinator goes on."""

    def go(cuts: list[Cut], every: int) -> int:
        disk, done, began = Disk(recorded.folder, recorded.before), 0, start_of(recorded)
        for number, cut in enumerate(sorted(cuts, key=lambda each: each.after), 1):
            disk.follow(recorded.steps[done : cut.after])
            done = cut.after
            ledger = check_cut(recorded, cut, disk)
            if number % every == 0 and cut.after > began:
                check_goes_on(recorded, ledger, zygote)
        return len(cuts)

    return go


def start_of(recorded: Recorded) -> int:
    """The step from which on all had joined."""
    first = min(each.at for each in recorded.ledger.told)
    return next(n for n, step in enumerate(recorded.steps, 1) if step.at > first)


def test_the_power_goes_at_some_moments(recorded: Recorded, follow: Follow, seed: int) -> None:
    cuts = random.Random(seed).sample(all_cuts(recorded, lucky=2), 16)
    assert follow(cuts, 8) == 16


@pytest.mark.slow
def test_the_power_goes_at_every_moment(
    recorded: Recorded, follow: Follow, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = all_cuts(recorded, lucky=2)
    count = follow(cuts, 40)
    steps = sum(step.kind == "end" for step in recorded.steps)
    with capsys.disabled():
        print(
            f"\n{count} power cuts at {len(cuts) // 3} moments ({steps} fsyncs) of "
            f"{len(recorded.steps)} calls: {len(recorded.ledger.receipts)} contributions "
            f"acknowledged, lost 0, torn 0"
        )


def test_what_a_command_made_is_there_when_it_has_ended(tmp_path: Path) -> None:
    """`coordinator init` and `model add`: the keys are worth more than anything after them."""
    root, log = tmp_path / "made" / "hub", tmp_path / "log"
    root.parent.mkdir()
    source = write_model(tmp_path / "source", base_tensors(ELEMENTS))
    disk, trace = Disk(root.parent), Trace()
    made = ("coordinator", "init", str(root)), ("model", "add", MODEL, "--from", str(source))
    for command in made:
        env = environment(COLDMERGE_DIR=str(root))
        subprocess.run([*recording(log), *COLDMERGE, *command], env=env, check=True)
        disk.follow(trace.read(log))
    keys = {path.name: path.read_bytes() for path in root.rglob("*.key")}
    for luck in (None, 1, 2):
        shutil.rmtree(root.parent)
        disk.materialize(root.parent, None if luck is None else random.Random(luck))
        assert check_folder(root, Ledger(base_tensors(ELEMENTS))).releases == 1
        assert {path.name: path.read_bytes() for path in root.rglob("*.key")} == keys
        with Store.open(root) as store:
            assert store.signer.federation == "hub"
            Authority.open(root, store.federation)
