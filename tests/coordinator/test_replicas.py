"""Parts of a coordinator as processes of their own, and as replicas on one database."""

from __future__ import annotations

import json
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

from coldmerge.core.errors import ConfigError
from coldmerge.rounds.state import State
from coldmerge_coordinator import replica as replicas
from coldmerge_coordinator.serve import serve
from coldmerge_coordinator.store import releases, rounds
from coldmerge_coordinator.store.models import Lease, Release
from coldmerge_coordinator.worker import TERM
from tests.backends import replica
from tests.support import until

if TYPE_CHECKING:
    from tests.coordinator.conftest import Bench

Process = subprocess.Popen[bytes]
Start = Callable[..., Process]
SERVE = (
    "import sys; from pathlib import Path; from coldmerge_coordinator.serve import serve;"
    "serve(Path(sys.argv[1]), only=sys.argv[2:])"
)


def log_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.log"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts parts, which do not outlive the test."""
    running: list[Process] = []

    def begin(folder: Path, part: str) -> Process:
        with log_of(folder, part).open("ab") as log:
            command = [sys.executable, "-c", SERVE, str(folder), part]
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
        until(f"the {part}", lambda: b"is ready" in log_of(folder, part).read_bytes())
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


@pytest.fixture
def folders(bench: Bench, tmp_path: Path) -> list[Path]:
    """The bench's folder and a replica beside it."""
    folder = bench.store.folder
    (folder / "ca").mkdir()
    return [folder, replica(folder, tmp_path / "beside")]


def sealed(bench: Bench, model: str, size: int, seed: int = 1) -> str:
    """A round that waits for a worker."""
    rng = np.random.default_rng(seed)
    bench.add_model({"w": rng.normal(size=size).astype(np.float32)}, model)
    opened = bench.open_round(model)
    bench.contribute(opened, "a", {"w": rng.normal(0, 1e-2, size).astype(np.float32)})
    return opened


def events(folders: list[Path], name: str) -> list[dict[str, str]]:
    """What the workers have logged under that name."""
    text = "".join(log_of(folder, "worker").read_text() for folder in folders)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def is_in(bench: Bench, round_id: str, *states: State) -> bool:
    return bench.round(round_id).state in states


def holder(bench: Bench, round_id: str) -> str | None:
    """Who works on the round now."""
    with bench.store.database.read() as session:
        lease = session.get(Lease, f"merge:{round_id}")
        return lease.holder if lease else None


def test_two_workers_merge_each_round_once(bench: Bench, folders: list[Path], start: Start) -> None:
    for folder in folders:
        start(folder, "worker")
    opened = [sealed(bench, f"m{n}", 20_000, n) for n in range(12)]
    for round_id in opened:
        until("the release", partial(is_in, bench, round_id, State.PUBLISHED))
    done = events(folders, "merge.done")
    assert sorted(line["round"] for line in done) == sorted(opened)
    assert len({line["candidate"] for line in done}) == 12
    with bench.store.database.read() as session:
        numbers = [row.number for row in session.query(Release)]
        attempts = [rounds.get(session, round_id).merge_attempts for round_id in opened]
    assert sorted(numbers) == [*[0] * 12, *[1] * 12]
    assert attempts == [0] * 12


def catch_merging(bench: Bench, folders: list[Path], start: Start) -> tuple[str, Process]:
    """A round, and the first folder's worker in the middle of its merge."""
    opened = sealed(bench, "m", 12_000_000)
    first = start(folders[0], "worker")
    until("the merge", partial(is_in, bench, opened, State.MERGING), every=0.002)
    return opened, first


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_another_worker_goes_on(
    bench: Bench, folders: list[Path], start: Start, kind: signal.Signals
) -> None:
    opened, first = catch_merging(bench, folders, start)
    first.send_signal(signal.SIGSTOP)
    start(folders[1], "worker")
    if kind == signal.SIGKILL:
        expire(bench, opened)
    first.send_signal(kind)
    first.send_signal(signal.SIGCONT)
    first.wait(20)
    until("the release", partial(is_in, bench, opened, State.PUBLISHED))
    if kind == signal.SIGTERM:
        assert len(events(folders, "merge.interrupted")) == 1
    (done,) = events(folders, "merge.done")
    assert "merge.done" in log_of(folders[1], "worker").read_text()
    assert bench.release(1).content_digest == done["candidate"]


def expire(bench: Bench, round_id: str) -> None:
    """Half a minute goes by for the lease on the round."""
    with bench.store.database.write() as session:
        lease = session.get_one(Lease, f"merge:{round_id}", with_for_update=True)
        lease.expires_at -= TERM


def test_a_worker_paused_past_its_term_writes_nothing(
    bench: Bench, folders: list[Path], start: Start
) -> None:
    opened, first = catch_merging(bench, folders, start)
    first.send_signal(signal.SIGSTOP)
    assert holder(bench, opened) == replicas.holder("worker", folders[0])
    expire(bench, opened)
    start(folders[1], "worker")
    until("the release", partial(is_in, bench, opened, State.PUBLISHED))
    before = bench.round(opened).version
    first.send_signal(signal.SIGCONT)
    until("the paused one's end", lambda: events(folders[:1], "merge.superseded"))
    assert bench.round(opened).version == before
    assert events(folders[:1], "merge.done") == []
    with bench.store.database.read() as session:
        assert [row.number for row in releases.list_releases(session, "m")] == [0, 1]


def test_names_of_replicas_differ(bench: Bench, folders: list[Path]) -> None:
    names = {replicas.holder(part, folder) for part in replicas.PARTS for folder in folders}
    assert len(names) == 2 * len(replicas.PARTS)
    assert all(len(name) <= 64 for name in names)
    again = replicas.holder("worker", Path(os.path.relpath(folders[0])))
    assert again in names


def test_a_part_runs_once_in_a_folder(folders: list[Path], start: Start) -> None:
    for part in ("driver", "worker"):
        start(folders[0], part)
        start(folders[1], part)
        command = [sys.executable, "-c", SERVE, str(folders[0]), part]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "serve.already_running" in second.stderr


def test_an_unknown_part_is_refused(folders: list[Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        serve(folders[0], only=["apy"])
    assert caught.value.code == "serve.unknown_part"


def test_a_driver_takes_over_from_one_that_ends(
    bench: Bench, folders: list[Path], start: Start
) -> None:
    def leader() -> str | None:
        with bench.store.database.read() as session:
            lease = session.get(Lease, "driver")
            return lease.holder if lease else None

    first = start(folders[0], "driver")
    until("the first driver", lambda: leader() == replicas.holder("driver", folders[0]))
    start(folders[1], "driver")
    first.terminate()
    assert first.wait(20) == 0
    until("the second driver", lambda: leader() == replicas.holder("driver", folders[1]))
