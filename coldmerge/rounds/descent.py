"""How merge coefficients are searched with values, or slopes: which point is measured next.

Each search is a generator: it yields the points that it wants measured, is sent the value of
each (smaller is better), and ends when it has no more questions. Whoever replays the values
comes to the same points, so a search is resumed from what was measured. Points are rounded, so
that they are the same wherever they are computed again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, ...]
Steps = Generator[Point, float, None]

DIGITS = 6
"""Decimals of a coefficient."""

MOMENTUM, SCALE = 0.8, 0.95
"""How slowly the two averages of SPSA's gradients forget (Adam's β₁ and β₂)."""

FIRST, SECOND = 0.9, 0.999
"""The same where slopes are told: those of AdaMerging, and of Adam's paper."""

DECAY = 0.101
"""How fast SPSA's perturbations shrink, as Spall (1998) advises."""

SHARES = (0.25, 0.5, 0.75)
"""What a further branch of ForkMerge is tried with."""


@dataclass(frozen=True)
class Box:
    """Where points lie: `start`, in the cube from `lower` to `upper`; `step` is a length.

    `budget`: how many points may be measured. `seed` decides what is random.
    """

    start: Point
    lower: float
    upper: float
    step: float
    budget: int
    seed: int = 0

    def inside(self, values: Sequence[float]) -> Point:
        """The nearest point of the cube, rounded."""
        return tuple(round(min(max(v, self.lower), self.upper), DIGITS) for v in values)


def quadratic(box: Box) -> Steps:
    """A parabola along each axis through three values; then to the lowest point of all of them.

    A sweep measures two points on each axis, and the point that the parabolas promise, no
    further than two steps away. The best of them is the next centre. The steps halve where a
    sweep finds nothing better, and nearly so where it does. When the budget is too small for all
    axes, the next sweep takes up where the last one ended.
    """
    centre, step, left = box.start, box.step, box.budget - 1
    value = yield centre
    order = _shuffled(box)
    while left >= 3:
        axes = order[: (left - 1) // 2]
        order = order[len(axes) :] + axes
        measured = [(value, centre)]
        promised = list(centre)
        for axis in axes:
            sides = [(centre[axis], value)]
            for offset in (-step, step):
                side = box.inside(_moved(centre, axis, offset))
                if side == centre:
                    continue
                sides.append((side[axis], (yield side)))
                measured.append((sides[-1][1], side))
                left -= 1
            promised[axis] = _lowest(sides, centre[axis], 2 * step)
        target = box.inside(promised)
        if target != centre:
            measured.append(((yield target), target))
            left -= 1
        if len(measured) == 1:
            return  # the steps are smaller than what a coefficient is rounded to
        best, at = min(measured, key=lambda one: one[0])
        step *= 0.7 if best < value else 0.5
        value, centre = best, at


def spsa(box: Box) -> Steps:
    """Simultaneous perturbation (Spall 1998) under Adam: two values a step, however many axes.

    All coordinates are moved at once, up or down at random, and back; the difference of the two
    values says where to go. The last point measured is where the steps have led.
    """
    point, count = box.start, len(box.start)
    adam = _Adam(count, MOMENTUM, SCALE)
    yield point
    steps = max(1, (box.budget - 2) // 2)
    for number in range(steps):
        size = box.step / (number + 1) ** DECAY
        signs = _signs(box.seed, number, count)
        high = box.inside([p + size * s for p, s in zip(point, signs, strict=True)])
        low = box.inside([p - size * s for p, s in zip(point, signs, strict=True)])
        rise = (yield high) - (yield low)
        slopes = [
            rise / (above - below) if above != below else 0.0
            for above, below in zip(high, low, strict=True)
        ]
        by = adam.steps(slopes, box.step * (1 - number / (steps + 1)))
        point = box.inside([p - b for p, b in zip(point, by, strict=True)])
    yield point


def gradient(box: Box, groups: int, slopes: Mapping[Point, Sequence[float]]) -> Steps:
    """Adam along slopes that are told (AdaMerging, arXiv 2310.02575): one point a step.

    First the start is measured, and a step from it along each atom's `groups` coefficients at
    once: what those points differ by is what slopes are later told along, and what their values
    differ by are the first slopes. From then on `slopes` has those of each point that was
    measured; at one that it lacks the search ends.
    """
    point, count = box.start, len(box.start)
    origin = yield point
    first_ones = {point}
    told: Sequence[float] = [0.0] * count
    for first in range(0, count, groups):
        along = aside(box, first, groups)
        rise = (yield along) - origin
        first_ones.add(along)
        here = rise / (along[first] - point[first]) / groups
        told = [*told[:first], *([here] * groups), *told[first + groups :]]
    adam = _Adam(count, FIRST, SECOND)
    steps = max(1, box.budget - 1 - count // groups)
    for number in range(steps):
        by = adam.steps(told, box.step * (1 - number / (steps + 1)))
        point = box.inside([p - b for p, b in zip(point, by, strict=True)])
        yield point
        if point in slopes:
            told = slopes[point]
        elif point not in first_ones:
            return


def aside(box: Box, first: int, count: int) -> Point:
    """The start with `count` coordinates from `first` on moved by the step: up, where it fits."""
    by = box.step if box.start[first] + box.step <= box.upper else -box.step
    return box.inside(
        [v + by * (first <= place < first + count) for place, v in enumerate(box.start)]
    )


class _Adam:
    """Averages of slopes and of their squares, and the steps that follow from them."""

    def __init__(self, count: int, momentum: float, scale: float) -> None:
        self._first, self._second = [0.0] * count, [0.0] * count
        self._momentum, self._scale, self._number = momentum, scale, 0

    def steps(self, slopes: Sequence[float], length: float) -> list[float]:
        """How far to go down each axis after these slopes, about `length` where they agree."""
        self._number += 1
        found = []
        for i, slope in enumerate(slopes):
            self._first[i] = self._momentum * self._first[i] + (1 - self._momentum) * slope
            self._second[i] = self._scale * self._second[i] + (1 - self._scale) * slope * slope
            mean = self._first[i] / (1 - self._momentum**self._number)
            spread = math.sqrt(self._second[i] / (1 - self._scale**self._number))
            found.append(length * mean / spread if spread else 0.0)
        return found


def fork(box: Box, branches: Sequence[Point]) -> Steps:
    """ForkMerge (arXiv 2301.12618): branches, and a greedy mixture of them from the best on.

    The start and each branch are measured; then each further branch, in the order of its value,
    is mixed in with the share that measures best, or not at all.
    """
    left = box.budget
    measured: list[tuple[float, Point]] = []
    for branch in dict.fromkeys((box.start, *map(box.inside, branches))):
        if left < 1:
            return
        measured.append(((yield branch), branch))
        left -= 1
    measured.sort(key=lambda one: one[0])
    value, mixed = measured[0]
    for _, branch in measured[1:]:
        tried = [(value, mixed)]
        for share in SHARES:
            if left < 1:
                return
            pairs = zip(mixed, branch, strict=True)
            point = box.inside([(1 - share) * one + share * other for one, other in pairs])
            tried.append(((yield point), point))
            left -= 1
        value, mixed = min(tried, key=lambda one: one[0])


def replayed(steps: Steps, values: Sequence[float], budget: int) -> Point | None:
    """What a search asks for next, after these values; None: nothing any more.

    A point that was measured is not measured again.
    """
    if len(values) >= budget:
        return None
    known: dict[Point, float] = {}
    try:
        point = next(steps)
        for value in values:
            known[point] = value
            while point in known:
                point = steps.send(known[point])
    except StopIteration:
        return None
    return point


def _moved(point: Point, axis: int, by: float) -> list[float]:
    return [value + by * (place == axis) for place, value in enumerate(point)]


def _lowest(sides: Sequence[tuple[float, float]], centre: float, most: float) -> float:
    """Where the parabola through the (place, value) pairs is lowest, no further than `most`.

    With fewer than three, or where it opens downwards: that way from the lowest of them.
    """
    best = min(sides, key=lambda side: side[1])[0]
    if len(sides) == 3:
        (x0, y0), (x1, y1), (x2, y2) = sides
        left, right = (y1 - y0) / (x1 - x0), (y2 - y0) / (x2 - x0)
        bend = (left - right) / (x1 - x2)
        if bend > 0:
            slope = left - bend * (x1 - x0)
            best = x0 - slope / (2 * bend)
    return min(max(best, centre - most), centre + most)


def _shuffled(box: Box) -> list[int]:
    return sorted(range(len(box.start)), key=lambda axis: _hash(box.seed, "axis", axis))


def _signs(seed: int, number: int, count: int) -> list[int]:
    return [1 if _hash(seed, "sign", number, axis)[0] & 1 else -1 for axis in range(count)]


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
