"""Merge coefficients learned from numbers: what is tried, what was said of it, what comes next.

A round with `merge.coefficients` makes *probes*: candidates with other coefficients, on each of
which contributors report one number. AdaMerging (arXiv 2310.02575), aTLAS (arXiv 2407.02880) and
Self-Positioning minimise such numbers where the data is; here the data stays where it is.

Whoever has several candidates can solve for what they are made of, so coefficients are not of
contributors but of *atoms*: contributors who always have the same one. Only who consented to it is
an atom of one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from statistics import median
from typing import Any, Self

from coldmerge.core.documents import Evaluation
from coldmerge.rounds import descent
from coldmerge.rounds.descent import Box, Point, Steps
from coldmerge.rounds.policy import CoefficientsPolicy

FEWEST_TO_CLIP = 3
"""Of fewer evaluators no median says who is far off."""

SMALLEST = 1e-6
"""What a coefficient of nought counts as: methods that take shares need one above it."""

_NUMBERED = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Probe:
    """A candidate that was measured: its number, its coefficients, and who reported what.

    `candidate` is its content digest. `slopes`, for each coefficient, are what was made of those
    that evaluators reported; None: none were asked for, or too few came.
    """

    number: int
    point: Point
    reports: Mapping[str, float]
    candidate: str = ""
    slopes: Point | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that `from_json` reads back."""
        return {
            "number": self.number,
            "point": list(self.point),
            "reports": dict(self.reports),
            "candidate": self.candidate,
            "slopes": None if self.slopes is None else list(self.slopes),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` wrote, also before there were slopes."""
        told = values.get("slopes")
        return cls(
            number=values["number"],
            point=tuple(values["point"]),
            reports=dict(values["reports"]),
            candidate=values.get("candidate", ""),
            slopes=None if told is None else tuple(told),
        )


@dataclass(frozen=True)
class Search:
    """Where a search stands.

    A point has a coefficient for each group of tensors of each atom: all groups of the first
    atom, then those of the second, … `groups` is ("",) where all tensors share one. `point` is
    that of the candidate at hand; once the search is `done`, the one that the gate judges.
    """

    atoms: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    point: Point
    probes: tuple[Probe, ...] = ()
    done: bool = False
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values that `from_json` reads back."""
        return {
            "atoms": [list(atom) for atom in self.atoms],
            "groups": list(self.groups),
            "point": list(self.point),
            "probes": [one.to_json() for one in self.probes],
            "done": self.done,
            "why": self.why,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(
            atoms=tuple(tuple(atom) for atom in values["atoms"]),
            groups=tuple(values["groups"]),
            point=tuple(values["point"]),
            probes=tuple(Probe.from_json(one) for one in values["probes"]),
            done=values["done"],
            why=values["why"],
        )

    def of(self, contributor: str, point: Point | None = None) -> dict[str, float]:
        """The contributor's coefficients at a point (by default the one at hand), by group."""
        chosen = self.point if point is None else point
        for place, atom in enumerate(self.atoms):
            if contributor in atom:
                start = place * len(self.groups)
                found = chosen[start : start + len(self.groups)]
                return dict(zip(self.groups, found, strict=True))
        return {}


def atoms(
    contributors: Collection[str], alone: Collection[str], least: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """Who shares coefficients with whom: those in `alone` with nobody, others in groups.

    A group has at least `least` members, in an order that the seed decides. Where fewer are left
    over, some who would do alone are drawn in; if there are too few of those, all are one group.
    """
    order = sorted(contributors, key=lambda name: _lot(seed, name))
    singles = [name for name in order if name in alone]
    others = [name for name in order if name not in alone]
    while others and len(others) < least and singles:
        others.append(singles.pop())
    count = max(1, len(others) // least) if others else 0
    groups = [tuple(sorted(others[place::count])) for place in range(count)]
    return tuple(sorted([*groups, *((name,) for name in singles)]))


def group_of(tensor: str) -> str:
    """The layer of a tensor: its name up to the first number, or else up to the first dot."""
    found = _NUMBERED.match(tensor)
    return found.group() if found else tensor.partition(".")[0]


def begin(
    policy: CoefficientsPolicy,
    contributors: Collection[str],
    alone: Collection[str],
    tensors: Iterable[str],
    seed: int,
) -> Search:
    """A search over what these contributors sent, of these tensors."""
    found = atoms(contributors, alone, policy.least, seed)
    by_layer = policy.granularity == "layer"
    groups = tuple(sorted({group_of(name) for name in tensors})) if by_layer else ("",)
    return Search(found, groups, (policy.initial,) * (len(found) * len(groups)))


def asked(policy: CoefficientsPolicy, evaluation: Evaluation) -> float | None:
    """What an evaluation says about a probe, candidate minus base: less is better.

    None: it does not hold the number that was asked for.
    """
    if policy.objective == "accuracy":
        return evaluation.base.accuracy - evaluation.candidate.accuracy
    kept = {str(name): value for name, value in evaluation.means.items()}
    pair = [kept.get(f"{which}_{policy.objective}") for which in ("candidate", "base")]
    return None if pair[0] is None or pair[1] is None else pair[0] - pair[1]


def values(reports: Sequence[Mapping[str, float]], clip: float) -> list[float]:
    """One value a probe, of what evaluators reported on each of them: less is better.

    What counts is how an evaluator's number has changed since its first report, and of that at
    most `clip` times what the median evaluator's changed by so far (from three evaluators on):
    whoever makes numbers up, while those are a minority, moves the mean of n by no more than
    that over n. Who comes later starts from the mean of the others, so that it matters little
    who is missing. A value depends on no later report.
    """
    origins: dict[str, float] = {}
    largest: dict[str, float] = {}
    found: list[float] = []
    for report in reports:
        changes = {n: v - origins[n] for n, v in sorted(report.items()) if n in origins}
        for name, change in changes.items():
            largest[name] = max(largest.get(name, 0.0), abs(change))
        bound = clip * median(largest.values()) if len(largest) >= FEWEST_TO_CLIP else None
        bounded = [
            change if bound is None else min(max(change, -bound), bound)
            for change in changes.values()
        ]
        mean = fsum(bounded) / len(bounded) if bounded else (found[-1] if found else 0.0)
        for name in report.keys() - origins.keys():
            origins[name] = report[name] - mean
        found.append(mean)
    return found


def advance(
    search: Search,
    policy: CoefficientsPolicy,
    number: int,
    reports: Mapping[str, float],
    seed: int,
    *,
    candidate: str = "",
    slopes: Point | None = None,
) -> Search:
    """The search after the probe at hand (candidate `number`) was measured: the next, or the end.

    The end is the best point that was measured, the first of equals: at worst where it began.
    """
    found = Probe(number, search.point, dict(sorted(reports.items())), candidate, slopes)
    measured = (*search.probes, found)
    after = replace(search, probes=measured)
    so_far = values([probe.reports for probe in measured], policy.clip)
    budget = policy.probes
    following = descent.replayed(_steps(after, policy, seed), so_far, budget)
    if following is not None:
        return replace(after, point=following)
    return _ended(after, policy, f"the best of {len(measured)} probes")


def stopped(search: Search, policy: CoefficientsPolicy, why: str) -> Search:
    """The search ends before its time, with the best that was measured."""
    return _ended(search, policy, f"the best of {len(search.probes)} probes: {why}")


def follows(search: Search, policy: CoefficientsPolicy, seed: int) -> bool:
    """Whether each probe, and what was chosen in the end, follows from the reports before it."""
    start = (policy.initial,) * len(search.point)
    at = replace(search, point=start, probes=(), done=False)
    for probe in search.probes:
        if at.done or at.point != probe.point:
            return False
        at = advance(
            at,
            policy,
            probe.number,
            probe.reports,
            seed,
            candidate=probe.candidate,
            slopes=probe.slopes,
        )
    if search.done and not at.done:
        at = stopped(at, policy, search.why)
    return (at.point, at.done) == (search.point, search.done)


def _ended(search: Search, policy: CoefficientsPolicy, why: str) -> Search:
    best = (policy.initial,) * len(search.point)
    if search.probes:
        found = values([probe.reports for probe in search.probes], policy.clip)
        best = search.probes[found.index(min(found))].point
    return replace(search, point=best, done=True, why=why)


def _steps(search: Search, policy: CoefficientsPolicy, seed: int) -> Steps:
    box = Box(
        start=(policy.initial,) * len(search.point),
        lower=policy.lower,
        upper=policy.upper,
        step=policy.step * (policy.upper - policy.lower),
        budget=policy.probes,
        seed=seed,
    )
    if policy.method == "fork":
        return descent.fork(box, _branches(search, policy))
    if policy.method == "gradient":
        told = {probe.point: probe.slopes for probe in search.probes if probe.slopes is not None}
        return descent.gradient(box, len(search.groups), told)
    return descent.spsa(box) if policy.method == "spsa" else descent.quadratic(box)


def _branches(search: Search, policy: CoefficientsPolicy) -> list[Point]:
    """For each atom a point: only its task vectors, or (`without`) all but those.

    The others' part goes to those who stay, as far as the bounds let it.
    """
    sizes = [len(atom) for atom in search.atoms]
    whole = sum(sizes)
    found = []
    for chosen, size in enumerate(sizes):
        staying = size if policy.branches == "each" else whole - size
        shared = policy.initial * whole / staying if staying else policy.initial
        none = max(policy.lower, min(0.0, policy.upper))
        point: list[float] = []
        for place in range(len(sizes)):
            stays = (place == chosen) == (policy.branches == "each")
            point += [shared if stays else none] * len(search.groups)
        found.append(tuple(point))
    return found


@dataclass(frozen=True)
class Weights:
    """What the inputs of a merge are multiplied by, by contributor and group of tensors.

    `by_layer` says whether groups are layers; without it, "" is the only group.
    """

    of: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def weight(self, contributor: str, group: str) -> float:
        """One coefficient, never nought; 1.0 for what none was learned for."""
        kept = self.of.get(contributor, {}).get(group, 1.0)
        return kept if abs(kept) >= SMALLEST else SMALLEST

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of tensors that have coefficients of their own, sorted."""
        return tuple(sorted({group for kept in self.of.values() for group in kept}))


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} atoms {name}".encode()).digest()
