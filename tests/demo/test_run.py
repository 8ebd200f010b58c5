"""The tiny demo, whole: real processes, real sockets, and none of them left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ResourceError, UnavailableError
from coldmerge.demo import stage
from coldmerge.demo.plan import Options, Plan
from coldmerge.demo.run import run

PATIENCE = 120.0


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder) in words and int(entry.parent.name) != os.getpid():
            found.append(words)
    return found


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        pause.wait(0.1)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "kept"
    yield folder
    wait_for(lambda: not processes_of(folder), "the demo's processes to end")


def test_the_tiny_demo_improves_what_it_trains_on(kept: Path) -> None:
    told: list[str] = []
    result = run(Options(tiny=True, rounds=2, keep=kept), told.append)
    assert processes_of(kept) == []
    found = json.loads(json.dumps(result.as_json()))
    releases = found["releases"]
    published = [row for row in releases if row["state"] == "PUBLISHED"]
    assert [row["number"] for row in published] == list(range(len(published)))
    assert len({row["digest"] for row in releases}) == len(releases) == 3
    assert [row["contributions"] for row in releases] == [0, 3, 3]
    assert all(0 < row["bytes_shipped"] <= 3 * found["model_bytes"] for row in releases[1:])
    assert published[-1]["seen"] > published[0]["seen"] + 10
    assert any("joined" in line for line in told)
    assert any(line.startswith("round 2: ") for line in told)
    page = (kept / "report.html").read_text()
    assert all(row["digest"][:8] in page for row in releases)
    assert (kept / "releases" / "1" / "coldmerge-release.json").is_file()
    assert (kept / "releases" / "1" / "README.md").is_file()


def test_the_log_of_a_process_that_fails_is_shown(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Plan.train_config

    def broken(self: Plan, *given: Any) -> dict[str, Any]:
        return {**whole(self, *given), "trainer": "nothing_of_this_name:create"}

    monkeypatch.setattr(Plan, "train_config", broken)
    with pytest.raises(UnavailableError) as caught:
        run(Options(tiny=True, rounds=1, keep=kept))
    assert caught.value.code == "demo.process_failed"
    assert "nothing_of_this_name" in caught.value.message
    assert processes_of(kept) == []


@pytest.mark.slow
def test_a_gate_that_rejects_leaves_the_release_and_measures_the_candidate(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(organizations: int) -> dict[str, Any]:
        policy = stage.round_policy(organizations)
        return {**policy, "gate": {**policy["gate"], "min_mean_gain": 99.0}}

    monkeypatch.setattr(stage.Stage, "policy", staticmethod(strict))
    found = run(Options(tiny=True, rounds=2, keep=kept)).as_json()
    first, *rejected = found["releases"]
    assert [row["state"] for row in rejected] == ["REJECTED", "REJECTED"]
    assert [row["number"] for row in rejected] == [1, 1]
    assert all(row["contributions"] == 3 and row["bytes_shipped"] > 0 for row in rejected)
    assert all(row["seen"] is not None and "gain" in row["reason"] for row in rejected)
    assert found["gains"]["seen"]["mean"] == 0.0
    assert first["digest"] not in {row["digest"] for row in rejected}


def test_a_small_disk_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(ResourceError) as caught:
        run(Options(tiny=True, report=tmp_path / "report.html"))
    assert caught.value.code == "demo.disk_too_small"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_however_it_is_ended_no_process_stays(kept: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "coldmerge", "demo", "--tiny", "--keep", str(kept)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        serving = kept / "coordinator" / "run.json"
        wait_for(lambda: serving.exists() or demo.poll() is not None, "the coordinator")
        wait_for(lambda: len(processes_of(kept)) > 1, "a second process")
        demo.send_signal(number)
        assert demo.wait(PATIENCE) != 0
    if number != signal.SIGKILL:
        assert processes_of(kept) == []


def test_an_interrupt_that_a_finalizer_swallows_ends_the_demo_at_its_next_step(kept: Path) -> None:
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == 1:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(Options(tiny=True, rounds=1, keep=kept), tell)
    assert len(told) == 1
    assert processes_of(kept) == []
