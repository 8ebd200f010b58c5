"""Two releases on the same sets, example by example: what a table's row is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

from benchmarks.cold.intervals import (
    Differences,
    Interval,
    over_examples,
    over_runs,
    over_sets,
    points,
    standard_error,
)
from benchmarks.cold.outcome import BASE, MEAN, Hits, Run, Score
from coldmerge.core.errors import DataError

GROUPS = ("seen", "unseen")
PROTOCOLS = {
    "lp100": "linear probe, 100 examples",
    "frozen": "linear probe, up to 500 examples",
    "ft100": "fine-tuning, 100 examples",
    "full": "fine-tuning, up to 500 examples",
}


class Place(NamedTuple):
    """A release of a variant."""

    variant: str
    release: int

    def __str__(self) -> str:
        return self.variant if self.variant == BASE else f"{self.variant} {self.release}"


PRETRAINED = Place(BASE, 0)

Cells = dict[int, dict[int, Score]]
"""Measurements of one release on one set, by seed and draw."""


@dataclass(frozen=True)
class Comparison:
    """How much better one release is than another, over the sets of one group; in points.

    `sets` has an array [seeds, draws, n] for each set; all have the seeds of `seeds`, in order.
    """

    of: Place
    against: Place
    protocol: str
    group: str
    seeds: tuple[int, ...]
    sets: Mapping[str, Differences]

    @cached_property
    def gains(self) -> dict[str, float]:
        """The mean of each set."""
        return {task: points(values) for task, values in self.sets.items()}

    @property
    def mean(self) -> float:
        """Over sets, each counting alike."""
        return fmean(self.gains.values())

    @property
    def median(self) -> float:
        """Over sets."""
        return median(self.gains.values())

    @property
    def wins(self) -> int:
        """Sets with a gain."""
        return sum(gain > 0 for gain in self.gains.values())

    @property
    def losses(self) -> int:
        """Sets with a loss."""
        return sum(gain < 0 for gain in self.gains.values())

    @property
    def error(self) -> float:
        """Standard error over sets; nan for one."""
        return standard_error(list(self.gains.values()))

    @property
    def draws(self) -> int:
        """The fewest draws of training examples that a set has."""
        return min(int(values.shape[1]) for values in self.sets.values())

    @cached_property
    def interval(self) -> Interval:
        """Over examples, within these sets."""
        return over_examples(list(self.sets.values()))

    @cached_property
    def runs_interval(self) -> Interval:
        """Over examples, draws and seeds, within these sets."""
        return over_runs(list(self.sets.values()))

    @property
    def sets_interval(self) -> Interval | None:
        """Across sets."""
        return over_sets(list(self.gains.values()))

    @property
    def by_seed(self) -> dict[int, float]:
        """The mean over sets of each seed."""
        return {
            seed: fmean(points(values[place]) for values in self.sets.values())
            for place, seed in enumerate(self.seeds)
        }

    def of_set(self, task: str) -> Interval:
        """The interval over examples of one set."""
        return over_examples([self.sets[task]])

    def only(self, tasks: Iterable[str]) -> Comparison | None:
        """The same on some of the sets; None if it has none of them."""
        kept = {task: self.sets[task] for task in sorted(tasks) if task in self.sets}
        if not kept:
            return None
        return Comparison(self.of, self.against, self.protocol, self.group, self.seeds, kept)

    def __str__(self) -> str:
        return f"{signed(self.mean)} {self.interval}"


class Effort(NamedTuple):
    """What came before a release, all contributors together; the mean over seeds."""

    steps: float
    seconds: float
    bytes: float


def efforts(runs: Iterable[Run]) -> dict[Place, Effort]:
    """What each release took; the parts of one (each contributor alone) are added up."""
    found: dict[Place, dict[int, list[Run]]] = {}
    for run in runs:
        place = Place(run.variant, run.release)
        found.setdefault(place, {}).setdefault(run.seed, []).append(run)
    return {
        place: Effort(
            fmean(sum(run.steps for run in parts) for parts in by_seed.values()),
            fmean(sum(run.train_seconds for run in parts) for parts in by_seed.values()),
            fmean(sum(run.bytes for run in parts) for parts in by_seed.values()),
        )
        for place, by_seed in found.items()
    }


class Accuracy(NamedTuple):
    """Of one release on a group: the mean over sets and seeds, and its spread over seeds."""

    mean: float
    spread: float
    seeds: int
    sets: int


def signed(value: float) -> str:
    """`+1.5`; never `-0.0`, and the same for what JSON has with four digits."""
    return f"{round(round(value, 4), 1) + 0:+.1f}"


class Measurements:
    """All scores of a folder, by what they measure."""

    def __init__(self, scores: Iterable[Score]) -> None:
        self._cells: dict[tuple[Place, str, str], Cells] = {}
        self._groups: dict[str, str] = {}
        self._hits: dict[tuple[object, ...], Hits] = {}
        self._compared: dict[tuple[Place, Place, str, str], Comparison | None] = {}
        for score in scores:
            place = Place(score.variant, score.release)
            cells = self._cells.setdefault((place, score.protocol, score.task), {})
            cells.setdefault(score.seed, {})[score.draw] = score
            self._groups[score.task] = score.group

    @property
    def variants(self) -> list[str]:
        """Those measured, in the order of their first measurement."""
        return list(dict.fromkeys(place.variant for place, _, _ in self._cells))

    def tasks(self, group: str) -> list[str]:
        """The sets of a group, sorted."""
        return sorted(task for task, its in self._groups.items() if its == group)

    def releases(self, variant: str, protocol: str, group: str | None = None) -> list[int]:
        """Releases that were measured like that on at least one set, sorted."""
        found = {
            place.release
            for place, how, task in self._cells
            if (place.variant, how) == (variant, protocol)
            and (group is None or self._groups[task] == group)
        }
        return sorted(found)

    def last(self, variant: str, protocol: str, group: str | None = None) -> Place | None:
        """The last release that was measured on all sets on which the variant was measured."""
        wanted = {
            task
            for place, how, task in self._cells
            if (place.variant, how) == (variant, protocol)
            and (group is None or self._groups[task] == group)
        }
        for release in reversed(self.releases(variant, protocol, group)):
            place = Place(variant, release)
            if all((place, protocol, task) in self._cells for task in wanted):
                return place
        return None

    def compare(
        self, of: Place | None, against: Place | None, protocol: str, group: str
    ) -> Comparison | None:
        """Pair two releases on every set of a group that both were measured on; None without.

        Seeds that lack a set are left out, as are draws that a seed lacks.
        """
        if of is None or against is None:
            return None
        key = (of, against, protocol, group)
        if key not in self._compared:
            self._compared[key] = self._compare(*key)
        return self._compared[key]

    def _compare(self, of: Place, against: Place, protocol: str, group: str) -> Comparison | None:
        pairs = {task: self._pairs(of, against, protocol, task) for task in self.tasks(group)}
        pairs = {task: by_seed for task, by_seed in pairs.items() if by_seed}
        seeds = _complete([set(by_seed) for by_seed in pairs.values()])
        sets: dict[str, Differences] = {}
        for task, by_seed in pairs.items():
            if not seeds or not set(seeds) <= set(by_seed):
                continue
            draws = sorted(set.intersection(*(set(by_seed[seed]) for seed in seeds)))
            rows = [np.stack([by_seed[seed][draw] for draw in draws]) for seed in seeds if draws]
            if rows:
                sets[task] = np.stack(rows)
        return Comparison(of, against, protocol, group, seeds, sets) if sets else None

    def accuracy(self, of: Place | None, protocol: str, group: str) -> Accuracy | None:
        """Mean accuracy over the sets of a group, in points; None if it was not measured."""
        if of is None:
            return None
        cells = [self._cells.get((of, protocol, task)) for task in self.tasks(group)]
        found = [by_seed for by_seed in cells if by_seed]
        seeds = _complete([set(by_seed) for by_seed in found])
        means = [
            fmean(_mean(by_seed[seed]) for by_seed in found if seed in by_seed) for seed in seeds
        ]
        if not means:
            return None
        return Accuracy(
            fmean(means), stdev(means) if len(means) > 1 else 0.0, len(means), len(found)
        )

    def of_set(self, of: Place, protocol: str, task: str) -> float | None:
        """Mean accuracy on one set over seeds and draws, in points."""
        cells = self._cells.get((of, protocol, task))
        return fmean(_mean(draws) for draws in cells.values()) if cells else None

    def counterpart(
        self, of: Place | None, effort: Mapping[Place, Effort], protocol: str
    ) -> Place | None:
        """The plain mean's release to hold another against: the one nearest to it in steps.

        Where steps are not known, the one of as many rounds, or else the last one.
        """
        if of is None:
            return None
        numbers = self.releases(MEAN, protocol)
        steps = {n: effort[Place(MEAN, n)].steps for n in numbers if Place(MEAN, n) in effort}
        if of in effort and steps:
            far = {number: abs(taken - effort[of].steps) for number, taken in steps.items()}
            return Place(MEAN, min(far, key=lambda number: (far[number], -number)))
        same = Place(MEAN, of.release)
        return same if of.release in numbers else self.last(MEAN, protocol)

    def _pairs(
        self, of: Place, against: Place, protocol: str, task: str
    ) -> dict[int, dict[int, Differences]]:
        mine = self._cells.get((of, protocol, task), {})
        theirs = self._cells.get((against, protocol, task), {})
        found: dict[int, dict[int, Differences]] = {}
        for seed, draws in mine.items():
            others = theirs.get(seed, {})
            if against.release == 0 and theirs and not others:
                # The pretrained base is the same for every seed: once measured is enough.
                others = theirs[min(theirs)]
            both = {
                draw: self._minus(draws[draw], others[draw]) for draw in draws if draw in others
            }
            if both:
                found[seed] = both
        return found

    def _minus(self, one: Score, other: Score) -> Differences:
        if one.n != other.n:
            raise DataError(
                "cold.unpaired",
                f"Two measurements of {one.task} are not of the same test examples.",
                expected=f"n = {other.n}, as for {other.variant} {other.release}",
                got=f"n = {one.n} for {one.variant} {one.release}",
                hint="Measure in a new folder: --out.",
            )
        return self._of(one).astype(np.float64) - self._of(other)

    def _of(self, score: Score) -> Hits:
        if score.key not in self._hits:
            self._hits[score.key] = score.hits()
        return self._hits[score.key]


def _mean(draws: Mapping[int, Score]) -> float:
    return 100 * fmean(score.accuracy for score in draws.values())


def _complete(found: Sequence[set[int]]) -> tuple[int, ...]:
    """What is in all of them; where nothing is, what is in most of them, the smallest."""
    if not found:
        return ()
    common = set.intersection(*found)
    every = sorted(set.union(*found))
    most = sorted(every, key=lambda one: -sum(one in some for some in found))[:1]
    return tuple(sorted(common or most))
