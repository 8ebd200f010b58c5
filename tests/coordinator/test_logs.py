"""The log that nobody can write must not stop the work it tells of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SAYING = """
import structlog
from coldmerge_coordinator.logs import log_to_stderr
log_to_stderr()
log = structlog.get_logger("coordinator")
for number in range(5000):
    log.info("call.refused", number=number)
print("went on")
"""


def said(stderr: Path) -> subprocess.CompletedProcess[str]:
    with stderr.open("w") as file:
        command = [sys.executable, "-c", SAYING]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)


def test_a_full_disk_under_the_log_stops_nothing() -> None:
    assert said(Path("/dev/full")).stdout == "went on\n"


def test_each_line_is_one_object(tmp_path: Path) -> None:
    assert said(tmp_path / "log").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(5000))
    assert {line["event"] for line in lines} == {"call.refused"}
