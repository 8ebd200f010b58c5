"""Runs side by side: what their releases are worth, and by how much one is better than another.

Two runs with the same data, model and seed are compared in pairs: each task is measured on the
same examples by the same probes, so that what tasks differ by among themselves drops out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from coldmerge.core.errors import DataError, NotFoundError

GROUPS = ("seen", "unseen")
OUTCOMES = ("accepted", "refused", "quarantined", "failed", "late", "dropped")
PAIRING = ("seed", "model", "data", "contributors")
"""Settings in which runs must agree to be compared in pairs."""


@dataclass(frozen=True)
class Run:
    """A run as it was written down: `result` is its result as JSON, `config` its settings."""

    label: str
    result: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, group: str) -> list[tuple[int, float]]:
        """(release, accuracy in points) of every release that was measured on these tasks."""
        return [
            (int(row["number"]), float(row[group]["mean"]))
            for row in self.result["releases"]
            if row.get(group) and row[group]["mean"] is not None
        ]

    def tasks(self, group: str) -> dict[str, float]:
        """Accuracy of the last measured release by task."""
        for row in reversed(self.result["releases"]):
            if row.get(group):
                return {str(task): float(value) for task, value in row[group]["tasks"].items()}
        return {}

    def count(self, outcome: str) -> int:
        """How many contributions came to this."""
        return sum(len(line.get(outcome, ())) for line in self.result["rounds"])


def load(path: Path, label: str | None = None) -> Run:
    """The run in a folder, or in a file that `coldmerge simulate --format json` printed.

    Raises:
        DataError: the file is not such a result.
        NotFoundError: there is none, or the run has not ended.
    """
    file = path / "result.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_bytes())
        settings = _config(path if path.is_dir() else Path(str(result["folder"])))
        run = Run(label or str(path), result, settings)
        summary(run)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            "simulation.no_result",
            f"There is no result of a simulation in {path}.",
            expected="the folder of a run that has ended",
            got="a run that has not ended" if (path / "simulation.json").exists() else None,
            hint="Let it end: `coldmerge simulate CONFIG --out DIR --resume`.",
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            "simulation.bad_result",
            f"{file} is not the result of a simulation.",
            expected="what `coldmerge simulate --format json` prints",
            got=f"{type(error).__name__}: {error}"[:200],
            hint="Name the folders of runs.",
        ) from error
    return run


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "simulation.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def summary(run: Run) -> dict[str, Any]:
    """One run as one row. Accuracies are in points; a gain is last minus first release."""
    result = run.result
    row: dict[str, Any] = {"run": run.label, "seed": result["seed"], "engine": result["engine"]}
    row["rounds"], row["releases"] = len(result["rounds"]), len(result["releases"]) - 1
    for group in GROUPS:
        curve = run.curve(group)
        row[group] = curve[-1][1] if curve else None
        row[f"{group}_gain"] = curve[-1][1] - curve[0][1] if curve else None
    row |= {outcome: run.count(outcome) for outcome in OUTCOMES}
    row |= {"seconds": result["seconds"], "peak_bytes": result["peak_bytes"]}
    return {**row, "digest": result["releases"][-1]["digest"]}


@dataclass(frozen=True)
class Difference:
    """How much better one mean is than another, over pairs; in points."""

    mean: float
    error: float | None
    wins: int
    losses: int
    pairs: int

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "mean": round(self.mean, 4),
            "standard_error": None if self.error is None else round(self.error, 4),
            "wins": self.wins,
            "losses": self.losses,
            "pairs": self.pairs,
        }

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.mean:+.1f}{spread} ({self.wins} up, {self.losses} down)"


def difference(values: Sequence[float]) -> Difference | None:
    """The mean of paired differences and its standard error; None without pairs."""
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    wins, losses = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return Difference(fmean(values), error, wins, losses, len(values))


def by_task(run: Run, reference: Run, group: str) -> dict[str, float]:
    """Accuracy of `run` minus that of `reference`, on each task that both have."""
    mine, theirs = run.tasks(group), reference.tasks(group)
    return {task: mine[task] - theirs[task] for task in mine if task in theirs}


def unlike(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings, with dots, in which runs differ: one value for each run."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = sorted({key for one in flat for key in one})
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {k: v for k, v in found.items() if any(value != v[0] for value in v)}


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        below = (_flat(one, f"{key}.{name}" if key else str(name)) for name, one in value.items())
        return [pair for pairs in below for pair in pairs]
    return [(key, value)]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything about runs side by side; differences are against the first one.

    `unpaired` names what keeps each run from being compared in pairs; empty is as it should be.
    """
    first = runs[0]
    answer: dict[str, Any] = {"runs": [summary(run) for run in runs], "settings": unlike(runs)}
    answer["differences"] = []
    for run in runs[1:]:
        groups: dict[str, Any] = {}
        for group in GROUPS:
            tasks = by_task(run, first, group)
            found = difference(list(tasks.values()))
            rounded = {task: round(value, 4) for task, value in tasks.items()}
            groups[group] = found and {**found.as_json(), "tasks": rounded}
        keys = [key for key in PAIRING if run.config.get(key) != first.config.get(key)]
        answer["differences"].append(
            {"run": run.label, "against": first.label, "unpaired": keys, **groups}
        )
    return answer
