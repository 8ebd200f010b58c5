"""A run under a SuperLink: handed in as a Flower app, watched through the run's folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from coldmerge.core.errors import KINDS, UnavailableError
from coldmerge.core.progress import Progress
from coldmerge.demo.processes import Running
from coldmerge_simulation.coordinator.server_app import OUTCOME, PROGRESS
from coldmerge_simulation.engines.processes import POLL_SECONDS, Programs, ended
from coldmerge_simulation.folder import RunFolder

START_SECONDS = 300.0
"""How long a SuperLink, Ray and the first imports may take on a busy machine."""
END_SECONDS = 60.0

_APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "coldmerge-simulation"
version = "1.0.0"
description = "A simulation of coldmerge; the code is that of the installed package."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "coldmerge"

[tool.flwr.app.components]
serverapp = "coldmerge_simulation.coordinator.server_app:app"
clientapp = "coldmerge_simulation.contributors.client_app:app"

[tool.flwr.app.config]
run = {run}
share = "{share}"
at-a-time = 0
"""


def write_app(folder: RunFolder, share: str) -> Path:
    """The Flower app of a run: it names the installed package's two sides, and the run's folder."""
    place = folder.path / "flower" / "app"
    place.mkdir(parents=True, exist_ok=True)
    text = _APP.format(run=json.dumps(str(folder.path)), share=share)
    (place / "pyproject.toml").write_text(text, encoding="utf-8")
    return place


def write_connection(folder: RunFolder, address: str, certificate: Path | None = None) -> Path:
    """Flower's own configuration folder (FLWR_HOME), which names the SuperLink."""
    home = folder.path / "flower"
    home.mkdir(parents=True, exist_ok=True)
    trust = "insecure = true" if certificate is None else f'root-certificates = "{certificate}"'
    text = f'[superlink]\ndefault = "run"\n\n[superlink.run]\naddress = "{address}"\n{trust}\n'
    (home / "config.toml").write_text(text, encoding="utf-8")
    return home


def hand_in(programs: Programs, folder: RunFolder, app: Path, *options: str) -> Running:
    """Start the run; the program ends when the run does."""
    for name in (OUTCOME, PROGRESS):
        (folder.path / name).unlink(missing_ok=True)
    return programs.start("flwr-run", "flwr", "run", app, "run", "--stream", *options)


def watch(
    folder: RunFolder, running: Running, superlink: Running | None, progress: Progress
) -> None:
    """Follow the run to its end; None: the SuperLink is not ours.

    Raises:
        UnavailableError: the SuperLink ended, or the run did so without saying why.
        ColdmergeError: what ended the run.
    """
    deadline = time.monotonic() + START_SECONDS
    last: Any = None
    while (outcome := folder.read(OUTCOME)) is None:
        said = folder.read(PROGRESS)
        if said is not None and said != last:
            last = said
            progress(said["step"], said["done"], said["total"])
        if superlink is not None and superlink.handle.poll() is not None:
            raise ended(superlink, f"ended with status {superlink.handle.returncode}")
        if running.handle.poll() is not None and folder.read(OUTCOME) is None:
            raise ended(running, "says that the run ended before its end")
        if last is None and time.monotonic() > deadline:
            raise ended(running, f"had not started the run after {START_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    if outcome["error"] is not None:
        raise _error(outcome["error"], running)
    end = time.monotonic() + END_SECONDS
    while running.handle.poll() is None and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _error(said: dict[str, Any], running: Running) -> Exception:
    if said.get("kind") in KINDS:
        return KINDS[str(said["kind"])](
            str(said["code"]),
            str(said["message"]),
            hint=str(said["hint"]),
            expected=said["expected"],
            got=said["got"],
            **said["ids"],
        )
    return UnavailableError(
        "simulation.server_failed",
        f"The simulation ended with an error: {said.get('text')}",
        hint="Look at the log; `--resume` goes on from the last contribution.",
        log=running.log,
    )
