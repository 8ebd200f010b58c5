"""The worker as a process: asked to end, killed, orphaned, started twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coldmerge.rounds.state import State
from coldmerge_coordinator.store import Store, releases, rounds
from coldmerge_coordinator.worker import run_once
from tests.backends import copy_coordinator, needs_disk
from tests.support import until

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench
    from tests.support import FixedClock

pytestmark = needs_disk

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Workers that do not outlive the test."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(folder: Path, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "coldmerge_coordinator.worker", str(folder), *options]
        log = (folder / "worker.log").open("ab")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path}
        running.append(subprocess.Popen(command, stderr=log, env=environment))
        log.close()
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def sealed(bench: Bench, tensors: int = 6, size: int = 2_000_000, outer: str = "none") -> str:
    """A round with enough to merge to be caught in the middle; with `outer`, not the first."""
    rng = np.random.default_rng(1)
    names = [f"layer.{number}.weight" for number in range(tensors)]
    bench.add_model({name: rng.normal(size=size).astype(np.float32) for name in names})
    merge = {"outer": {"method": outer}}
    if outer != "none":
        first = bench.open_round(merge=merge)
        bench.contribute(first, "a", {names[0]: rng.normal(size=size).astype(np.float32)})
        assert run_once(bench.store, bench.clock)
    round_id = bench.open_round(min_contributions=2, merge=merge)
    for contributor in ("a", "b"):
        deltas = {name: rng.normal(0, 1e-2, size).astype(np.float32) for name in names}
        bench.contribute(round_id, contributor, deltas)
    return round_id


def state(folder: Path, round_id: str) -> str:
    with Store.open(folder) as store, store.database.read() as session:
        return rounds.get(session, round_id).state


def latest(folder: Path) -> tuple[str, str, str | None]:
    """Content, master and state digest of the newest release."""
    with Store.open(folder) as store, store.database.read() as session:
        release = releases.latest_release(session, "m")
        return release.content_digest, release.master_digest, release.state_digest


def undisturbed(folder: Path, copy: Path, clock: FixedClock) -> tuple[str, str, str | None]:
    """What the same folder comes to when nobody kills anything."""
    copy_coordinator(folder, copy)
    with Store.open(copy) as store:
        assert run_once(store, clock)
    return latest(copy)


def merging(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether this process is writing a blob."""
    return any((folder / "blobs" / "incoming").glob(f"{process.pid}-*"))


def has_blobs(folder: Path, count: int) -> bool:
    return len(list(folder.glob("blobs/??/*"))) >= count


@pytest.mark.parametrize("outer", [pytest.param("none", marks=pytest.mark.slow), "nesterov"])
def test_killed_at_any_moment_it_comes_to_the_same_release(
    bench: Bench, start: Start, tmp_path: Path, outer: str
) -> None:
    round_id = sealed(bench, tensors=12, size=1_000_000, outer=outer)
    folder = bench.store.folder
    bench.store.close()
    expected = undisturbed(folder, tmp_path / "undisturbed", bench.clock)
    before = len(list(folder.glob("blobs/??/*")))
    interrupted = 0
    for finished in (0, 1, 5):
        process = start(folder)
        until("the merge", partial(merging, folder, process), every=0.005)
        until("finished blobs", partial(has_blobs, folder, before + finished), every=0.005)
        process.kill()
        process.wait()
        interrupted += state(folder, round_id) == State.MERGING
    assert interrupted
    start(folder)
    until("the release", lambda: state(folder, round_id) == State.PUBLISHED, every=0.005)
    assert latest(folder) == expected
    assert (expected[2] is None) == (outer == "none")


def test_sigterm_in_the_middle_ends_cleanly_and_soon(bench: Bench, start: Start) -> None:
    round_id = sealed(bench)
    folder = bench.store.folder
    process = start(folder)
    until("the merge", partial(merging, folder, process), every=0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert not merging(folder, process), "its unfinished blob is gone"
    assert state(folder, round_id) == State.MERGING
    with bench.store.database.read() as session:
        assert rounds.get(session, round_id).merge_attempts == 0
    start(folder)
    until("the release", lambda: state(folder, round_id) == State.PUBLISHED, every=0.005)


def test_an_idle_worker_ends_on_sigterm(bench: Bench, start: Start) -> None:
    lock = bench.store.folder / "worker.lock"
    process = start(bench.store.folder)
    until("the lock", lock.exists, every=0.005)
    process.terminate()
    assert process.wait(5) == 0


def test_a_second_worker_on_a_folder_waits_for_the_first(bench: Bench, start: Start) -> None:
    folder = bench.store.folder
    first = start(folder)
    until("the lock", (folder / "worker.lock").exists, every=0.005)
    second = start(folder)
    round_id = sealed(bench, tensors=1, size=10)
    until("the release", lambda: state(folder, round_id) == State.PUBLISHED, every=0.005)
    assert first.poll() is None
    assert second.poll() is None
    first.kill()
    first.wait()
    again = bench.open_round()
    bench.contribute(again, "a", {"layer.0.weight": np.ones(10, np.float32)})
    until("the second one's release", lambda: state(folder, again) == State.PUBLISHED, every=0.005)


def test_an_orphan_ends(bench: Bench, start: Start) -> None:
    process = start(bench.store.folder, "--parent", "1")
    assert process.wait(20) == 0
