"""Which round policy is best, said of sets that took no part in choosing it.

Whoever tries a dozen policies and reports the best one's score reports luck too. So the sets
are dealt into folds, seen ones and unseen ones each in turn; in each rotation the policy is
chosen on all folds but one, and on that one it is measured against the plain mean. Every set
is thus reported once, by a choice that did not know it. Sets that are named as held out take
part in no rotation: there the policy that all folds together prefer is reported, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchmarks.cold.comparison import GROUPS, Effort, Measurements, Place, signed
from benchmarks.cold.intervals import Differences, Interval, over_examples, points
from benchmarks.cold.outcome import MEAN

FOLDS = 4
PROTOCOL = "lp100"


@dataclass(frozen=True)
class Verdict:
    """What the chosen policies gain over the plain mean on sets that did not choose them.

    `mean` is the mean of the groups' means, in points; `gains` has every set's.
    """

    mean: float
    interval: Interval
    groups: Mapping[str, float]
    gains: Mapping[str, float]

    def __str__(self) -> str:
        by_group = ", ".join(f"{group} {signed(mean)}" for group, mean in self.groups.items())
        return f"{signed(self.mean)} {self.interval} ({by_group}; {len(self.gains)} sets)"


@dataclass(frozen=True)
class Choice:
    """The outcome of a choice among policies.

    Attributes:
        chosen: what all folds together prefer; the plain mean may win.
        standing: gain of each policy over the plain mean on the sets that choose (the mean of
            the groups' means), best first. Biased: the best is best by luck too.
        by_fold: the sets of each fold, and the policy that the others chose for it.
        rotated: the rotations' report.
        held: the report on the sets held out; None without such sets.
    """

    chosen: str
    standing: Mapping[str, float]
    by_fold: Sequence[tuple[Sequence[str], str]]
    rotated: Verdict
    held: Verdict | None

    @property
    def verdict(self) -> Verdict:
        """What counts: the sets held out, or else the rotations."""
        return self.held or self.rotated


def choose(
    measured: Measurements,
    policies: Sequence[str],
    effort: Mapping[Place, Effort] | None = None,
    *,
    held: Collection[str] = (),
    folds: int = FOLDS,
    protocol: str = PROTOCOL,
) -> Choice | None:
    """Choose among policies and the plain mean, by their last releases in pairs with the mean's.

    None where nothing but the mean was measured, or only one set.
    """
    pairs = {name: _over_mean(measured, name, effort or {}, protocol) for name in policies}
    pairs = {name: arrays for name, arrays in pairs.items() if arrays and name != MEAN}
    if not pairs:
        return None
    common = set.intersection(*({*arrays} for arrays in pairs.values()))
    pairs[MEAN] = {task: np.zeros((1, 1, 1)) for task in common}
    gains = {n: {task: points(a) for task, a in arrays.items()} for n, arrays in pairs.items()}
    choosing = {g: [t for t in measured.tasks(g) if t in common and t not in held] for g in GROUPS}
    dealt = _deal(choosing, folds)
    if len(dealt) < 2:
        return None
    by_fold: list[tuple[Sequence[str], str]] = []
    found: dict[str, Differences] = {}
    for fold in dealt:
        others = {g: [task for task in tasks if task not in fold] for g, tasks in choosing.items()}
        best = next(iter(_standing(gains, others)))
        by_fold.append((fold, best))
        found |= {task: pairs[best][task] for task in fold}
    standing = _standing(gains, choosing)
    chosen = next(iter(standing))
    out = {task: pairs[chosen][task] for task in sorted(common & set(held))}
    told = _verdict(out, measured) if out else None
    return Choice(chosen, standing, by_fold, _verdict(found, measured), told)


def _over_mean(
    measured: Measurements, name: str, effort: Mapping[Place, Effort], protocol: str
) -> dict[str, Differences]:
    last = measured.last(name, protocol)
    plain = measured.counterpart(last, effort, protocol)
    both = (measured.compare(last, plain, protocol, group) for group in GROUPS)
    return {task: array for found in both if found for task, array in found.sets.items()}


def _deal(choosing: Mapping[str, Sequence[str]], folds: int) -> list[list[str]]:
    """Like cards: each group's sets in turn, so that every fold has some of both."""
    ordered = [task for group in GROUPS for task in choosing[group]]
    dealt = [ordered[place::folds] for place in range(folds)]
    return [fold for fold in dealt if fold]


def _standing(
    gains: Mapping[str, Mapping[str, float]], choosing: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Mean of the groups' means of each policy, best first; of equal ones the plain mean."""
    means = {
        name: fmean(fmean(its[task] for task in tasks) for tasks in choosing.values() if tasks)
        for name, its in gains.items()
    }
    order = sorted(means.items(), key=lambda item: (-item[1], item[0] != MEAN, item[0]))
    return dict(order)


def _verdict(found: Mapping[str, Differences], measured: Measurements) -> Verdict:
    dealt = ((g, [task for task in measured.tasks(g) if task in found]) for g in GROUPS)
    groups = {group: tasks for group, tasks in dealt if tasks}
    gains = {task: points(found[task]) for tasks in groups.values() for task in tasks}
    means = {group: fmean(gains[task] for task in tasks) for group, tasks in groups.items()}
    weights = [1 / len(groups) / len(tasks) for tasks in groups.values() for _ in tasks]
    interval = over_examples([found[task] for task in gains], weights)
    return Verdict(fmean(means.values()), interval, means, gains)
