"""Sweeps: one simulation under several settings and seeds, with one table at the end.

Every run has a folder of its own, `OUT/<variant>/seed-<n>`. A sweep that was interrupted goes
on where it stopped; with more variants or seeds than before, only what is new is run.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from coldmerge.core import yaml_file
from coldmerge.core.errors import ColdmergeError, ConfigError, ConflictError
from coldmerge.core.progress import Progress, silent
from coldmerge.merging import merger_class
from coldmerge.report.runs import RunPoint
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.results.comparing import (
    GROUPS,
    Difference,
    Run,
    difference,
    load,
    summary,
)
from coldmerge_simulation.run import simulate

Variants = Mapping[str, Mapping[str, Any]]
"""What each variant is called, and the settings (with dots) in which it is another."""

MAX_RUNS = 10_000


def variants(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `round.merge.method=mean,ties`: with several of them, all combinations.

    Values are YAML, separated by commas.

    Raises:
        ConfigError: a text is not like that.
    """
    axes: list[list[tuple[str, Any]]] = []
    for text in texts:
        key, sign, said = text.partition("=")
        try:
            values = yaml.safe_load(f"[{said}]") if sign and key.strip() else None
        except yaml.YAMLError:
            values = None
        if not values:
            raise ConfigError(
                "simulation.bad_sweep",
                "A sweep cannot be read.",
                expected="KEY=VALUE,VALUE,… such as round.merge.method=mean,ties",
                got=text,
                hint="Keys are those of the simulation's file, with dots between levels.",
            )
        axes.append([(key.strip(), value) for value in values])
    return {_label(some, axes): dict(some) for some in itertools.product(*axes)}


def _label(some: Sequence[tuple[str, Any]], axes: Sequence[Sequence[tuple[str, Any]]]) -> str:
    last = [axis[0][0].rpartition(".")[2] for axis in axes]
    short = len(set(last)) == len(last)
    named = [(key.rpartition(".")[2] if short else key, value) for key, value in some]
    return " ".join(f"{key}={_words(value)}" for key, value in named)


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass(frozen=True)
class Cell:
    """One variant: its runs by seed, and the errors of the seeds that failed."""

    label: str
    values: Mapping[str, Any]
    runs: dict[int, Run]
    failed: dict[int, ColdmergeError]

    def last(self, group: str) -> dict[int, float]:
        """Accuracy of each seed's last release, in points."""
        found = {seed: run.curve(group) for seed, run in self.runs.items()}
        return {seed: curve[-1][1] for seed, curve in found.items() if curve}

    def gains(self, group: str) -> list[float]:
        """What each seed gained, from its first release to its last."""
        curves = (run.curve(group) for run in self.runs.values())
        return [curve[-1][1] - curve[0][1] for curve in curves if curve]

    def against(self, other: Cell, group: str) -> Difference | None:
        """How much better this variant is, in pairs of one seed."""
        mine, theirs = self.last(group), other.last(group)
        return difference([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to. Differences are against the first variant."""

    folder: Path
    cells: tuple[Cell, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each variant, as people read it; points, ± one deviation over seeds."""
        return [self._row(cell) for cell in self.cells]

    def _row(self, cell: Cell) -> dict[str, Any]:
        row: dict[str, Any] = {"variant": cell.label, "seeds": len(cell.runs)}
        for group in GROUPS:
            row[group] = _spread(list(cell.last(group).values()))
            row[f"{group} gain"] = _spread(cell.gains(group), sign="+")
            found = cell.against(self.cells[0], group) if cell is not self.cells[0] else None
            row[f"{group} against first"] = str(found) if found else None
        for outcome in ("accepted", "refused"):
            row[outcome] = sum(run.count(outcome) for run in cell.runs.values())
        row["seconds"] = round(sum(run.result["seconds"] for run in cell.runs.values()), 1)
        row["failed"] = ", ".join(sorted({error.code for error in cell.failed.values()})) or None
        return {key: value for key, value in row.items() if self._says(key)}

    def _says(self, key: str) -> bool:
        """Leave out columns that would be empty for every variant."""
        if key.startswith("unseen"):
            return any(cell.last("unseen") for cell in self.cells)
        if key == "failed":
            return any(cell.failed for cell in self.cells)
        return not key.endswith("against first") or len(self.cells) > 1

    def points(self) -> list[RunPoint]:
        """The curves: for each variant the mean over seeds of each release, and its spread."""
        found = []
        for cell, group in itertools.product(self.cells, GROUPS):
            by_release: dict[int, list[float]] = {}
            for run in cell.runs.values():
                for number, mean in run.curve(group):
                    by_release.setdefault(number, []).append(mean)
            for number, means in sorted(by_release.items()):
                spread = stdev(means) if len(means) > 1 else 0.0
                found.append(RunPoint(cell.label, group, number, fmean(means), spread))
        return found

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, with every run's own numbers."""
        return {
            "folder": str(self.folder),
            "variants": [
                {
                    "variant": cell.label,
                    "settings": dict(cell.values),
                    "runs": [
                        {**summary(run), "folder": run.result["folder"]}
                        for run in cell.runs.values()
                    ],
                    "failed": [
                        {"seed": seed, "error": error.as_dict()}
                        for seed, error in cell.failed.items()
                    ],
                    "against_first": {
                        group: found.as_json()
                        for group in GROUPS
                        if cell is not self.cells[0]
                        and (found := cell.against(self.cells[0], group)) is not None
                    },
                }
                for cell in self.cells
            ],
        }

    @property
    def frame(self) -> Any:
        """A pandas data frame: a row for each run of each variant."""
        from pandas import DataFrame

        return DataFrame(
            [
                {"variant": cell.label, **cell.values, **summary(run)}
                for cell in self.cells
                for run in cell.runs.values()
            ]
        )


def _spread(values: Sequence[float], sign: str = "") -> str | None:
    if not values:
        return None
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.1f}{spread}"


def sweep(
    config: Mapping[str, Any] | Path | str,
    chosen: Variants,
    *,
    seeds: Sequence[int] | int = 1,
    first_seed: int | None = None,
    engine: str = "local",
    out: Path | str | None = None,
    progress: Progress = silent,
) -> Sweep:
    """Run every variant with every seed: those given, or so many from `first_seed` on.

    Without `first_seed` they begin with the configuration's own.

    What a folder has already is not run again. A run that fails is written down, and the
    others are run all the same.

    Raises:
        ConfigError: a variant's settings are wrong: found before anything is run.
        ConflictError: a folder holds a run of other settings.
    """
    raw, folder = _raw(config)
    configs = {
        label: SimulationConfig.parse(changed(raw, values), folder)
        for label, values in chosen.items()
    }
    first = next(iter(configs.values()), None)
    if first is None:
        raise _too_many(0)
    start = first.seed if first_seed is None else first_seed
    numbers = list(range(start, start + seeds)) if isinstance(seeds, int) else list(seeds)
    if not 0 < len(numbers) * len(configs) <= MAX_RUNS:
        raise _too_many(len(numbers) * len(configs))
    for one in configs.values():  # an unknown method ends the sweep before its first run
        merger_class(one.round.merge.method)
    place = Path(out or Path("runs") / f"{first.name}-sweep").absolute()
    folders = _folders(place, list(configs))
    cells = {label: Cell(label, chosen[label], {}, {}) for label in configs}
    jobs = [(label, seed) for seed in numbers for label in configs]
    for turn, (label, seed) in enumerate(jobs, 1):
        said = _said(progress, f"{turn} of {len(jobs)}, {label}, seed {seed}: ")
        where = folders[label] / f"seed-{seed}"
        try:
            settings = SimulationConfig.parse({**configs[label].to_json(), "seed": seed})
            simulate(settings, engine=engine, out=where, resume=where.exists(), progress=said)
            cells[label].runs[seed] = load(where, label)
        except ConflictError:
            raise
        except ColdmergeError as error:
            cells[label].failed[seed] = error
    return Sweep(place, tuple(cells.values()))


def _said(progress: Progress, prefix: str) -> Progress:
    return lambda step, done, total: progress(prefix + step, done, total)


def _raw(config: Mapping[str, Any] | Path | str) -> tuple[dict[str, Any], Path]:
    if not isinstance(config, Path | str):
        return copy.deepcopy(dict(config)), Path.cwd()
    SimulationConfig.load(Path(config))  # says what is wrong with the file itself
    return dict(yaml_file.load(Path(config)) or {}), Path(config).resolve().parent


def changed(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some put in their places; `attackers.0.count` counts into lists.

    Raises:
        ConfigError: there is no such place.
    """
    found = copy.deepcopy(dict(raw))
    for key, value in values.items():
        *path, last = key.split(".")
        place: Any = found
        for step in path:
            place = _below(place, step, key)
        if isinstance(place, list):
            place[_index(place, last, key)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise _no_place(key)
    return found


def _below(place: Any, step: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, step, key)]
    if not isinstance(place, dict):
        raise _no_place(key)
    if place.get(step) is None:
        place[step] = {}
    elif isinstance(place[step], str):  # the short form, such as `partition: iid`
        raise _no_place(key)
    return place[step]


def _index(place: list[Any], step: str, key: str) -> int:
    if not step.isdecimal() or int(step) >= len(place):
        raise _no_place(key)
    return int(step)


def _no_place(key: str) -> ConfigError:
    return ConfigError(
        "simulation.no_place_to_sweep",
        f"The simulation has no place for {key}.",
        expected="a key of the file, with dots between levels; numbers count into lists from 0",
        got=key,
        hint="Write the section out in the file, then sweep one of its keys.",
    )


def _too_many(count: int) -> ConfigError:
    return ConfigError(
        "simulation.bad_sweep_size",
        "This sweep has no run, or too many.",
        expected=f"1 to {MAX_RUNS} runs",
        got=count,
        hint="Name at least one variant and one seed.",
    )


def _folders(place: Path, labels: Sequence[str]) -> dict[str, Path]:
    """A folder for each variant, called as it is."""
    names = [re.sub(r"[^\w.=,+-]+", "_", label)[:120] for label in labels]
    if len(set(names)) < len(names):
        names = [f"{number:02d}-{name}" for number, name in enumerate(names, 1)]
    return {label: place / name for label, name in zip(labels, names, strict=True)}
