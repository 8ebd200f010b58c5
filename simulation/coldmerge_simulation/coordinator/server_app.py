"""The coordinator's side of a simulation, as a Flower ServerApp: rounds of the real coordinator.

Its run configuration: `run`, the folder of a run that `coldmerge simulate` made; `share`, `folder`
or `messages`; `at-a-time`. Without `run` it makes one: see `run_new`.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from coldmerge.core.errors import ColdmergeError
from coldmerge.core.progress import Progress
from coldmerge_simulation.config import SimulationConfig
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
        run_new(grid, context)
        return
    folder = RunFolder(Path(str(said["run"])))
    try:
        drive(grid, folder, setting_of(said), written(folder))
    except Exception as error:
        folder.write(OUTCOME, {"error": _about(error)})
        raise
    folder.write(OUTCOME, {"error": None})


def setting_of(said: Mapping[str, object]) -> Setting:
    """How nodes are reached, by the run configuration."""
    return Setting(
        said.get("share", "folder") == "folder", int(str(said.get("at-a-time", 0))) or None
    )


def run_new(grid: Grid, context: Context) -> None:
    """A run of its own, for `flwr run .`: what `config` names, or the digits of so many.

    Its folder is `out`, or a new one below `~/.coldmerge/simulations`; the log says which.
    """
    from coldmerge_simulation import run  # it knows the engines, which know this module

    said = context.run_config
    config = _config(said)
    name = f"{config.name}-{config.seed}-{context.run_id}"
    out = str(said.get("out") or Path.home() / ".coldmerge" / "simulations" / name)
    folder = RunFolder(Path(out).absolute())
    print(f"The run's folder is {folder.path}", flush=True)
    run.quiet()
    run.prepare(folder, config, resume=False)
    drive(grid, folder, setting_of(said), printed())
    values = run.result(folder, "flower")
    folder.write(run.RESULT, values)
    for row in values["releases"]:
        means = (f"{group} {row[group]['mean']:.1f}" for group in ("seen", "unseen") if row[group])
        print(f"Release {row['number']} ({row['digest'][:12]}): {', '.join(means)}", flush=True)


def _config(said: Mapping[str, object]) -> SimulationConfig:
    if said.get("config"):
        return SimulationConfig.load(Path(str(said["config"])))
    plain = {key: said[key] for key in ("rounds", "contributors", "seed") if key in said}
    return SimulationConfig.parse({"name": "digits", "train": {"epochs": 4}, **plain})


def printed() -> Progress:
    """Progress for who reads the log: a line when a step begins, and when it is done."""
    last = ""

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last
        line = f"{step}: {done} of {total}"
        if line != last and (done == total or not last.startswith(step)):
            last = line
            print(line, flush=True)

    return progress


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
