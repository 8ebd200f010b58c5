"""The worker on a full disk, and with a model much larger than a block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from coldmerge_coordinator.worker import run_once

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}

_SMALL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", sys.argv[1]], check=True)
from datetime import timedelta
import numpy as np
from sqlalchemy import select
from coldmerge_coordinator.merging import candidate
from coldmerge_coordinator.store.models import Notice
from coldmerge_coordinator.worker import RETRY_FULL, Worker
from tests.coordinator.conftest import Bench, make_store
from tests.support import FixedClock
import structlog
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

folder = Path(sys.argv[1])
filler = folder / "filler"

def fill(leave):
    filler.unlink(missing_ok=True)
    filler.touch()
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - leave))

def report(what):
    row = bench.round(round_id)
    left = len(list((bench.store.blobs.folder / "incoming").iterdir()))
    with bench.store.database.read() as session:
        notices = len(session.scalars(select(Notice)).all())
    print(what, row.state, row.merge_attempts, left, notices, bench.release().number, row.reason)

bench = Bench(make_store(folder / "coordinator"), FixedClock(), folder)
bench.add_model({"a": np.ones(2_000_000, "<f4"), "b": np.ones(2_000_000, "<f4") * 2})
shutil.rmtree(folder / "source-m")
round_id = bench.open_round(webhook="http://127.0.0.1:9/hook")
bench.contribute(round_id, "x", {n: np.full(2_000_000, 0.5, "<f4") for n in ("a", "b")})
worker = Worker(bench.store, bench.clock)

fill(12_000_000)
worker.run_once()
report("before")
bench.clock.advance(RETRY_FULL)
worker.run_once()
report("again")
filler.unlink()

check_room = candidate.check_room
def late(*arguments):
    check_room(*arguments)
    fill(10_000_000)
candidate.check_room = late
bench.clock.advance(RETRY_FULL)
worker.run_once()
report("within")
candidate.check_room = check_room
filler.unlink()
assert not worker.run_once()
bench.clock.advance(RETRY_FULL)
worker.run_once()
report("after")
"""


def test_a_full_disk_is_noted_and_the_merge_goes_on_when_there_is_room(tmp_path: Path) -> None:
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("user namespaces are not allowed here")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", _SMALL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    small = "the merge waits: The coordinator's disk is too small for the candidate and its "
    full = "the merge waits: The disk is full: No space left on device."
    assert done.stdout.splitlines() == [
        f"before MERGING 0 0 1 0 {small}fp32 master.",
        f"again MERGING 0 0 1 0 {small}fp32 master.",
        f"within MERGING 0 0 2 0 {full}",
        "after PUBLISHED 0 0 3 1 the round has no gate",
    ]


_MEASURE = """
import sys, threading
from pathlib import Path
from coldmerge.core.clock import SystemClock
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.worker import run_once
def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.02):
        peak = max(peak, private())
watcher = threading.Thread(target=watch)
watcher.start()
with Store.open(Path(sys.argv[1])) as store:
    assert run_once(store, SystemClock())
stop.set()
watcher.join()
sys.stderr.write(f"{peak * 1024}")
"""


def private_peak(bench: Bench, nbytes: int, contributions: int, **merge: object) -> int:
    """Peak private memory of merging a model of `nbytes` of fp32 in two tensors."""
    rng = np.random.default_rng(1)
    shape = (nbytes // 8 // 1024, 1024)
    names = ("a.weight", "b.weight")
    bench.add_model({name: rng.random(shape, np.float32) for name in names})
    round_id = bench.open_round(min_contributions=contributions, merge=merge)
    for number in range(contributions):
        delta = rng.random(shape, np.float32)
        bench.contribute(round_id, f"org-{number}", dict.fromkeys(names, delta))
    command = [sys.executable, "-c", _MEASURE, str(bench.store.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert bench.round(round_id).state == "PUBLISHED"
    assert not run_once(bench.store, bench.clock)
    return int(done.stderr)


TIES = {"method": "ties", "parameters": {"density": 0.2}}


@pytest.mark.parametrize(
    "merge",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(TIES, marks=pytest.mark.slow),
        {**TIES, "outer": {"method": "adam"}},
    ],
)
def test_memory_does_not_grow_with_the_model(bench: Bench, merge: dict[str, object]) -> None:
    assert private_peak(bench, 128 * 2**20, contributions=3, **merge) < 200 * 2**20


@pytest.mark.slow
def test_merging_two_gigabytes_of_four_contributors_takes_less_than_400_mb(bench: Bench) -> None:
    assert private_peak(bench, 2 * 2**30, contributions=4) < 400 * 2**20
