"""Starting a simulation, going on with one, and what it came to."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import structlog

from coldmerge.core.errors import ColdmergeError, ConflictError
from coldmerge.core.files import make_folder
from coldmerge.core.progress import Progress, silent
from coldmerge_coordinator.logs import log_to_stderr
from coldmerge_coordinator.store import Store, releases
from coldmerge_simulation import data, engines, models
from coldmerge_simulation.config import SimulationConfig, difference
from coldmerge_simulation.contributors import conduct
from coldmerge_simulation.coordinator import hub
from coldmerge_simulation.coordinator.scoring import SCORES
from coldmerge_simulation.folder import CONFIG, LOCK, RunFolder

RESULT = "result.json"
_FREE = ("at_a_time", "patience", "supernodes")
"""Keys that a resumed run may have otherwise: no result depends on them."""


@dataclass(frozen=True)
class Simulation:
    """What a simulation came to. `folder` holds everything; `values` is the result as JSON."""

    folder: Path
    values: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The content digest of the last release."""
        return str(self.values["releases"][-1]["digest"])

    @cached_property
    def releases(self) -> Any:
        """A pandas data frame: a row for each release."""
        from pandas import DataFrame

        rows = [
            {
                **{key: value for key, value in row.items() if key not in ("seen", "unseen")},
                "seen": (row["seen"] or {}).get("mean"),
                "unseen": (row["unseen"] or {}).get("mean"),
            }
            for row in self.values["releases"]
        ]
        return DataFrame(rows)

    @cached_property
    def scores(self) -> Any:
        """A pandas data frame: a row for each release, task and whether somebody trains on it."""
        from pandas import DataFrame

        rows = [
            {"release": row["number"], "group": group, "task": task, "accuracy": value}
            for row in self.values["releases"]
            for group in ("seen", "unseen")
            for task, value in (row[group] or {"tasks": {}})["tasks"].items()
        ]
        return DataFrame(rows, columns=["release", "group", "task", "accuracy"])

    @cached_property
    def contributions(self) -> Any:
        """A pandas data frame: a row for each contributor in each round, and what came of it."""
        from pandas import DataFrame

        rows = [
            {"round": line["round"], "contributor": name, "outcome": outcome, "why": why}
            for line in self.values["rounds"]
            for outcome, name, why in _outcomes(line)
        ]
        return DataFrame(rows, columns=["round", "contributor", "outcome", "why"])


def _outcomes(line: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    plain = ("accepted", "quarantined", "late", "dropped")
    found = [(kind, name, "") for kind in plain for name in line[kind]]
    return found + [
        (kind, item["contributor"], item["code"])
        for kind in ("refused", "failed")
        for item in line[kind]
    ]


def simulate(
    config: SimulationConfig | Mapping[str, Any] | Path | str,
    *,
    engine: str = "local",
    seed: int | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Simulation:
    """Run a simulation to its end; `config` is a file, or what would stand in one.

    `seed` takes the place of the configuration's. `out` defaults to `runs/<name>-<seed>`. With
    `resume` a run that is there goes on (one that has ended is only read).

    Raises:
        ConfigError: the configuration or the engine is wrong.
        ConflictError: the folder is in use, holds something else, or another simulation.
        ColdmergeError: what the engine says.
    """
    chosen = _config(config, seed)
    start = engines.engine(engine)
    folder = RunFolder(Path(out or Path("runs") / f"{chosen.name}-{chosen.seed}").absolute())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not structlog.is_configured():
        quiet()
    prepare(folder, chosen, resume=resume)
    if len(folder.journal()) < chosen.rounds:
        start(folder, chosen.contributors, progress)
    values = result(folder, engine)
    folder.write(RESULT, values)
    return Simulation(folder.path, values)


def quiet() -> None:
    """Let the coordinator's log say what is wrong, and nothing else."""
    log_to_stderr(logging.WARNING)


def _config(
    given: SimulationConfig | Mapping[str, Any] | Path | str, seed: int | None
) -> SimulationConfig:
    if isinstance(given, Path | str):
        found = SimulationConfig.load(Path(given))
    elif isinstance(given, SimulationConfig):
        found = given
    else:
        found = SimulationConfig.parse(dict(given))
    return found if seed is None else SimulationConfig.parse({**found.to_json(), "seed": seed})


def prepare(folder: RunFolder, config: SimulationConfig, *, resume: bool) -> None:
    """Make what a run starts from: model, data, hub. What is there already stays.

    Raises:
        ConflictError: the folder is in use, holds something else, or another simulation.
        ColdmergeError: it cannot be made of this configuration; a new folder is left empty.
    """
    _check_new(folder, resume=resume)
    make_folder(folder.path)
    with folder.alone():  # what another process works with is not to be tidied up
        new = not _has_something(folder.path)
        try:
            _claim(folder, config)
            _make(folder, config)
        except ColdmergeError:
            if new:  # nothing was begun: the corrected command is to find it empty
                _empty(folder.path)
            raise


def _empty(path: Path) -> None:
    for each in path.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()


def _make(folder: RunFolder, config: SimulationConfig) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models.place(config, folder.base)
    finally:
        torch.set_num_threads(threads)
    shares = data.make(config.data, config.contributors, config.seed, folder.data)
    conduct.plan(config.participation, config.attackers, config.seed, 1, shares.names)
    hub.found(folder, config, shares.names)


def _check_new(folder: RunFolder, *, resume: bool) -> None:
    path = folder.path
    if path.exists() and not path.is_dir():
        raise ConflictError(
            "simulation.no_folder_there",
            f"{path} is not a folder.",
            expected="a new or empty folder",
            hint="Choose another with --out.",
        )
    if _has_something(path) and not resume:
        raise ConflictError(
            "simulation.folder_not_empty",
            f"{path} is not empty.",
            expected="a new or empty folder",
            hint="Go on with the simulation in it by --resume, or choose another with --out.",
        )


def _has_something(path: Path) -> bool:
    return path.exists() and any(each.name != LOCK for each in path.iterdir())


def _claim(folder: RunFolder, config: SimulationConfig) -> None:
    path, wanted = folder.path, config.to_json()
    if not _has_something(path):
        folder.write(CONFIG, {"config": wanted})
        return
    frozen = folder.config()["config"]
    kept, asked = ({k: v for k, v in one.items() if k not in _FREE} for one in (frozen, wanted))
    key = difference(kept, asked)
    if key is not None:
        raise ConflictError(
            "simulation.other_config",
            f"The run in {path} was started with another {key}.",
            expected=_at(frozen, key),
            got=_at(wanted, key),
            hint="Resume it with the configuration that it was started with, or choose another "
            "folder with --out.",
            key=key,
        )
    shutil.rmtree(path / "outbox", ignore_errors=True)
    folder.write(CONFIG, {"config": wanted})


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def result(folder: RunFolder, engine: str) -> dict[str, Any]:
    """What a run has come to so far, as JSON-ready values."""
    config = SimulationConfig.parse(folder.config()["config"])
    lines, scores = folder.journal(), folder.read(SCORES) or {}
    by_release = {line["release"]: line for line in lines if line["release"] is not None}
    with Store.open(folder.hub) as store, store.database.read() as session:
        rows = sorted(releases.list_releases(session, config.name), key=lambda row: row.number)
    return {
        "name": config.name,
        "engine": engine,
        "seed": config.seed,
        "folder": str(folder.path),
        "seconds": round(sum(line["seconds"] for line in lines), 3),
        "peak_bytes": max((line["peak_bytes"] for line in lines), default=0),
        "releases": [
            {
                "number": row.number,
                "digest": row.content_digest,
                "round": by_release.get(row.number, {}).get("round"),
                "accepted": len(by_release.get(row.number, {}).get("accepted", ())),
                "refused": len(by_release.get(row.number, {}).get("refused", ())),
                "seen": scores.get(str(row.number), {}).get("seen"),
                "unseen": scores.get(str(row.number), {}).get("unseen"),
            }
            for row in rows
        ],
        "rounds": lines,
    }
