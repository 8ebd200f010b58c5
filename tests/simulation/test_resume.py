"""A simulation that is killed goes on from where it was, and comes to the same digests."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coldmerge.core.errors import ConflictError
from coldmerge_coordinator.store import Store, releases
from coldmerge_simulation import Simulation, SimulationConfig, simulate
from coldmerge_simulation.folder import RunFolder
from coldmerge_simulation.run import prepare
from tests.simulation.settings import digests, settings
from tests.support import until

ROUNDS = 3


def start(config: Path, out: Path, engine: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "coldmerge", "simulate", str(config), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--engine", engine, "--resume"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def contributions(run: Path) -> int:
    """How many were admitted so far, seen from outside."""
    try:
        with sqlite3.connect(f"file:{run}/hub/coldmerge.db?mode=ro", uri=True) as database:
            return int(database.execute("SELECT count(*) FROM contribution").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def killed_and_resumed(
    tmp_path: Path, engine: str, after: int, *, count: int = ROUNDS, patience: float = 400
) -> tuple[list[str], list[str]]:
    """Digests of a run that was killed after so many contributions, and of one that was not."""
    values = settings(rounds=count, train={"epochs": 2})
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(values))
    process = start(config, run, engine)
    until("contributions", lambda: contributions(run) >= after, patience=patience)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len((run / "rounds.jsonl").read_text().splitlines()) < count
    again = start(config, run, engine)
    assert again.wait(patience) == 0
    whole = simulate(values, out=tmp_path / "whole")
    resumed = json.loads((run / "result.json").read_text())
    assert [line["round"] for line in resumed["rounds"]] == [*range(1, count + 1)]
    assert all(
        line["accepted"] == whole.values["rounds"][0]["accepted"] for line in resumed["rounds"]
    )
    return [row["digest"] for row in resumed["releases"]], digests(whole)


def test_local_killed_within_a_round(tmp_path: Path) -> None:
    resumed, whole = killed_and_resumed(tmp_path, "local", after=6)
    assert resumed == whole


@pytest.mark.slow
def test_ray_killed_within_a_round(tmp_path: Path) -> None:
    resumed, whole = killed_and_resumed(tmp_path, "ray", after=6)
    assert resumed == whole


@pytest.mark.slow
def test_a_federation_killed_within_a_round(tmp_path: Path) -> None:
    """With the SuperLink and the SuperNodes, which end with it."""
    resumed, whole = killed_and_resumed(tmp_path, "federation", after=5, count=2, patience=900)
    assert resumed == whole


class Interrupted(Exception):  # noqa: N818 - stands for what ends a process
    """The simulation ends here."""


def interrupted_and_resumed(tmp_path: Path, values: dict[str, Any], after: int) -> Simulation:
    """A run that ends after so many reports of progress, and goes on."""
    heard = 0

    def progress(step: str, done: int, total: int) -> None:
        nonlocal heard
        heard += 1
        if heard == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        simulate(values, out=tmp_path / "run", progress=progress)
    return simulate(values, out=tmp_path / "run", resume=True)


GATED = {"min_contributions": 3, "gate": {"max_loss": 100, "min_mean_gain": -100}}
BEHAVIOUR = {
    "participation": {"dropout": 0.2, "duration": {"distribution": "exponential"}},
    "attackers": [{"count": 1, "kind": "nan"}],
}
CONTINUOUS = {"min_contributions": 2, "continuous": {"max_staleness": 2}, "gate": None}


@pytest.mark.parametrize("policy", [GATED, CONTINUOUS], ids=["windowed", "continuous"])
def test_wherever_a_run_is_interrupted_it_comes_to_the_same_end(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    values = settings(rounds=3, contributors=5, round=policy, **BEHAVIOUR)
    whole = simulate(values, out=tmp_path / "whole")
    assert len(digests(whole)) > 2
    for after in (2, 5, 7, 11):  # see below for the moments at which releases are measured
        resumed = interrupted_and_resumed(tmp_path / str(after), values, after)
        assert digests(resumed) == digests(whole)
        assert told(resumed) == told(whole)


def told(found: Simulation) -> list[dict[str, Any]]:
    """The journal, without what may differ: time and memory of the machine."""
    free = {"seconds", "peak_bytes"}
    return [{k: v for k, v in line.items() if k not in free} for line in found.values["rounds"]]


def test_simulated_time_goes_on_from_a_release_that_was_not_measured_yet(tmp_path: Path) -> None:
    steps: list[str] = []
    values = settings(rounds=3, contributors=5, round=CONTINUOUS, evaluate={"every": 1})
    values["participation"] = BEHAVIOUR["participation"]
    whole = simulate(values, out=tmp_path / "whole", progress=lambda step, *_: steps.append(step))
    after = steps.index("release 2: measuring") + 1
    resumed = interrupted_and_resumed(tmp_path, values, after)
    assert told(resumed) == told(whole)
    assert digests(resumed) == digests(whole)


def test_a_second_process_changes_nothing_of_a_run_under_way(tmp_path: Path) -> None:
    values, folder = settings(), RunFolder(tmp_path / "run")
    prepare(folder, SimulationConfig.parse(values), resume=False)
    waiting = folder.outbox("round-1") / "org-1.safetensors"
    waiting.parent.mkdir(parents=True)
    waiting.write_bytes(b"signed")
    with folder.alone(), pytest.raises(ConflictError, match=r"simulation\.running"):
        simulate(values, out=folder.path, resume=True)
    assert waiting.read_bytes() == b"signed"


def test_continuous_rounds_merge_stale_contributions_for_less(tmp_path: Path) -> None:
    values = settings(rounds=4, contributors=5, round=CONTINUOUS, **BEHAVIOUR)
    found = simulate(values, out=tmp_path / "run")
    with Store.open(tmp_path / "run" / "hub") as store, store.database.read() as session:
        records = [releases.get_record(row) for row in releases.list_releases(session, "tiny")]
    factors = [
        value
        for record in records
        for key, value in record.recipe.items()
        if key.startswith("continuous.factor.")
    ]
    assert factors
    assert all(isinstance(value, float) and 0 < value < 1 for value in factors)
    assert all(len(line["accepted"]) == 2 for line in found.values["rounds"])
