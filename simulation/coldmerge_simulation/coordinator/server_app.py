"""The coordinator's side of a simulation, as a Flower ServerApp: rounds of the real coordinator.

Its run configuration: `run`, the run's folder; `share`, `folder` or `messages`; `at-a-time`.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path

from coldmerge.core.errors import ColdmergeError, ConfigError
from coldmerge.core.progress import Progress
from coldmerge_simulation.coordinator.driver import Setting, drive
from coldmerge_simulation.flower.compat import Context, Grid, ServerApp
from coldmerge_simulation.folder import RunFolder

app = ServerApp()

PROGRESS, OUTCOME = "progress.json", "outcome.json"
EVERY_SECONDS = 0.2


def main(grid: Grid, context: Context) -> None:
    """Run the rounds that are left; what came of it stands in the run's folder."""
    said = context.run_config
    if not said.get("run"):
        raise ConfigError(
            "simulation.no_folder",
            "The run configuration names no run folder.",
            expected="--run-config 'run=\"/path/of/the/run\"'",
            hint="Start it with `coldmerge simulate CONFIG`, which makes the folder.",
        )
    folder = RunFolder(Path(str(said["run"])))
    at_a_time = int(str(said.get("at-a-time", 0))) or None
    setting = Setting(str(said.get("share", "folder")) == "folder", at_a_time)
    try:
        drive(grid, folder, setting, written(folder))
    except Exception as error:
        folder.write(OUTCOME, {"error": _about(error)})
        raise
    folder.write(OUTCOME, {"error": None})


def written(folder: RunFolder) -> Progress:
    """Progress as a file that whoever waits for the run may read."""
    last = 0.0

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0, total) or now - last >= EVERY_SECONDS:
            last = now
            folder.write(PROGRESS, {"step": step, "done": done, "total": total})

    return progress


def _about(error: Exception) -> dict[str, object]:
    if isinstance(error, ColdmergeError):
        found: dict[str, object] = json.loads(json.dumps(error.as_dict(), default=str))
        return found
    return {"text": "".join(traceback.format_exception_only(error)).strip()}


app.main()(main)
