"""A simulation that is killed goes on from where it was, and comes to the same digests."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from coldmerge_simulation import simulate
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


def killed_and_resumed(tmp_path: Path, engine: str, after: int) -> tuple[list[str], list[str]]:
    """Digests of a run that was killed after so many contributions, and of one that was not."""
    values = settings(rounds=ROUNDS, train={"epochs": 2})
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(json.dumps(values))
    process = start(config, run, engine)
    until("contributions", lambda: contributions(run) >= after, patience=400)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len((run / "rounds.jsonl").read_text().splitlines()) < ROUNDS
    again = start(config, run, engine)
    assert again.wait(400) == 0
    whole = simulate(values, out=tmp_path / "whole")
    resumed = json.loads((run / "result.json").read_text())
    assert [line["round"] for line in resumed["rounds"]] == [1, 2, 3]
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
