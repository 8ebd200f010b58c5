"""What a demo found: one row for each release or rejected candidate, in points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from coldmerge.demo.scores import Measure, Scores, across, measure


@dataclass(frozen=True)
class Row:
    """A release, or what a round made instead of one.

    Attributes:
        number: of the release; of the one it would have been, when rejected.
        digest: its content digest; None when there was no candidate.
        state: of its round; release 0 is PUBLISHED without one.
        contributions: how many were merged.
        bytes_shipped: what all of them sent.
        round: id of the round.
        reason: why the round ended as it did.
        scores: None when it could not be measured.

    """

    number: int
    digest: str | None
    state: str
    contributions: int = 0
    bytes_shipped: int = 0
    round: str | None = None
    reason: str | None = None
    scores: Scores | None = None

    @property
    def seen(self) -> Measure | None:
        """Mean over the seen tasks."""
        return across(self.scores.seen) if self.scores else None

    @property
    def unseen(self) -> Measure | None:
        """Mean over the unseen tasks; None without any."""
        return across(self.scores.unseen) if self.scores and self.scores.unseen else None

    @property
    def tasks(self) -> dict[str, Measure]:
        """Each task's mean and spread over draws."""
        both = (*self.scores.seen, *self.scores.unseen) if self.scores else ()
        return {score.task: score.measure for score in both}


@dataclass(frozen=True)
class Run:
    """One seed's rows, in the order of its rounds."""

    seed: int
    rows: tuple[Row, ...]
    seconds: float

    @property
    def last(self) -> Row:
        """The latest release."""
        return [row for row in self.rows if row.state == "PUBLISHED"][-1]


@dataclass(frozen=True)
class Gains:
    """How the last release differs from the first on a group of tasks, in points.

    `tasks` is signed, one mean over seeds each; `error` is the standard error over tasks.
    """

    tasks: Mapping[str, float]
    mean: float
    median: float
    wins: int
    error: float


@dataclass(frozen=True)
class DemoResult:
    """All runs. `spread_over` says what the spreads are over: draws, or seeds if several."""

    model: str
    model_bytes: int
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    runs: tuple[Run, ...]
    seconds: float
    folder: Path | None = None
    report: Path | None = None
    next_command: str = ""
    commands: tuple[str, ...] = field(default=())

    @property
    def spread_over(self) -> str:
        """`draws` of the probe's examples, or `seeds` when there are several."""
        return "seeds" if len(self.runs) > 1 else "draws"

    def rows(self) -> list[dict[str, Any]]:
        """The rows, means over seeds; what is not a number is the first seed's."""
        return [_merged(rows) for rows in zip(*(run.rows for run in self.runs), strict=True)]

    def gains(self, names: Sequence[str]) -> Gains:
        """Latest release minus release 0 on these tasks."""
        found = {
            name: fmean(
                run.last.tasks[name].mean - run.rows[0].tasks[name].mean for run in self.runs
            )
            for name in names
        }
        values = list(found.values()) or [0.0]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        wins = sum(value > 0 for value in found.values())
        return Gains(found, fmean(values), median(values), wins, error)

    def as_json(self) -> dict[str, Any]:
        """What `--format json` prints. Accuracies are in points, 0 to 100."""
        return {
            "model": self.model,
            "model_bytes": self.model_bytes,
            "seen": list(self.seen),
            "unseen": list(self.unseen),
            "seeds": [run.seed for run in self.runs],
            "spread_over": self.spread_over,
            "releases": self.rows(),
            "gains": {
                group: _rounded_gains(self.gains(names))
                for group, names in (("seen", self.seen), ("unseen", self.unseen))
            },
            "runs": [
                {
                    "seed": run.seed,
                    "seconds": round(run.seconds, 1),
                    "releases": [_merged([row]) for row in run.rows],
                }
                for run in self.runs
            ],
            "seconds": round(self.seconds, 1),
            "report": str(self.report) if self.report else None,
            "folder": str(self.folder) if self.folder else None,
            "next": self.next_command,
        }


def _merged(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    seen, unseen = _together([row.seen for row in rows]), _together([row.unseen for row in rows])
    return {
        "number": first.number,
        "digest": first.digest,
        "state": first.state,
        "contributions": first.contributions,
        "bytes_shipped": first.bytes_shipped,
        "seen": _rounded(seen.mean if seen else None),
        "unseen": _rounded(unseen.mean if unseen else None),
        "seen_spread": _rounded(seen.spread if seen else None),
        "unseen_spread": _rounded(unseen.spread if unseen else None),
        "tasks": {
            name: _rounded(fmean(row.tasks[name].mean for row in rows if name in row.tasks))
            for name in first.tasks
        },
        "round": first.round,
        "reason": first.reason,
    }


def _together(found: Sequence[Measure | None]) -> Measure | None:
    known = [one for one in found if one is not None]
    return known[0] if len(known) == 1 else measure([o.mean for o in known]) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _rounded_gains(gains: Gains) -> dict[str, Any]:
    return {
        "mean": _rounded(gains.mean),
        "median": _rounded(gains.median),
        "standard_error": _rounded(gains.error),
        "wins": gains.wins,
        "tasks": {name: _rounded(points) for name, points in gains.tasks.items()},
    }
