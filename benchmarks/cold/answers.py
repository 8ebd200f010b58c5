"""What becomes of a claim: figures, a verdict, and words about how far they reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.cold.comparison import Comparison, signed
from benchmarks.cold.intervals import LEVEL, Interval, over_examples
from benchmarks.cold.outcome import MEAN, ONESHOT
from benchmarks.cold.records import LP100, Records

HOLDS, FAILS, UNCLEAR, UNMEASURED = "holds", "fails", "unclear", "not measured"
SEEDS, SETS = 3, 8
UNEQUAL = 0.05
"""Share of steps by which two runs may differ and be called equal."""
ALIKE = 1.0
"""Points that two means may differ by and be called alike."""


@dataclass(frozen=True)
class Answer:
    """A verdict on the way: figures, then words."""

    verdict: str
    mean: float | None = None
    interval: Interval | None = None
    figure: str = "–"
    notes: Sequence[str] = field(default_factory=tuple)


def missing(what: str) -> Answer:
    """There is nothing to answer from, because of `what`."""
    return Answer(UNMEASURED, notes=[what])


def short(found: Comparison, *, seeds: int = SEEDS, sets: int = SETS, draws: int = 1) -> list[str]:
    """Where a comparison rests on less than was asked for."""
    had = [
        (len(found.seeds), seeds, "seed"),
        (len(found.sets), sets, f"{found.group} set"),
        (found.draws, draws, "draw"),
    ]
    return [
        f"{n} {what}{'' if n == 1 else 's'}, not {asked}" for n, asked, what in had if n < asked
    ]


def reached(found: Comparison, least: float, extra: bool = True, **asked: int) -> Answer:
    """A demand on a mean: at least so much, and surely above zero."""
    ok = found.mean >= least and found.interval.above_zero and extra
    seeds = ", ".join(signed(gain) for gain in found.by_seed.values())
    figure = f"{found}; by seed {seeds}" if len(found.seeds) > 1 else str(found)
    notes = [f"{found.of} against {found.against}", *short(found, **asked)]
    return Answer(HOLDS if ok else FAILS, found.mean, found.interval, figure, notes)


def direction(found: Comparison | None, what: str) -> Answer:
    """Whether a mean is above zero; `what` is missing where there is no comparison."""
    if found is None:
        return missing(what)
    notes = [f"{found.protocol}, {found.group}: {found.of} against {found.against}"]
    return sided(found.mean, found.interval, str(found), notes)


def sided(mean: float, interval: Interval, figure: str, notes: Sequence[str]) -> Answer:
    """Holds where the interval is above zero, fails where the mean is not."""
    verdict = HOLDS if interval.above_zero else FAILS if mean <= 0 else UNCLEAR
    return Answer(verdict, mean, interval, figure, notes)


def best_of(found: Comparison, count: int) -> tuple[Interval, list[str]]:
    """The interval of the best of `count` comparisons, and words about it.

    The best of several is best by luck too: its interval is as much wider (Bonferroni).
    """
    level = 1 - (1 - LEVEL) / count
    if count == 1:
        return found.interval, []
    interval = over_examples(list(found.sets.values()), level=level)
    return interval, [f"the best of {count}, so its interval is at {100 * level:.1f} %"]


def alike(mean: float, interval: Interval) -> str:
    """Alike within a point: surely, not, or hard to say."""
    if interval.low > -ALIKE and interval.high < ALIKE:
        return HOLDS
    apart = interval.low > 0 or interval.high < 0
    return FAILS if abs(mean) >= ALIKE and apart else UNCLEAR


def ends(records: Records, large: str, small: str) -> Comparison | None:
    """The last release of one variant against that of another, on seen sets."""
    measured = records.measured
    places = [measured.last(name, LP100, "seen") for name in (large, small)]
    return measured.compare(places[0], places[1], LP100, "seen")


def against_oneshot(records: Records, group: str, protocol: str = LP100) -> Comparison | None:
    """The mean, after about as many steps, against one shot."""
    one = records.measured.last(f"{ONESHOT}mean", protocol, group)
    plain = records.measured.counterpart(one, records.effort, protocol)
    if one not in records.effort:  # a release of one round is no match for it
        plain = records.measured.last(MEAN, protocol, group)
    return records.measured.compare(plain, one, protocol, group)


def unequal(records: Records, found: Comparison) -> list[str]:
    """Says so where one of two took notably more steps."""
    both = [
        records.effort[place].steps
        for place in (found.of, found.against)
        if place in records.effort
    ]
    if len(both) < 2 or abs(both[0] - both[1]) <= UNEQUAL * max(both):
        return []
    return [f"{both[0]:.0f} steps against {both[1]:.0f}"]


def unseen_curve(records: Records) -> dict[int, Comparison]:
    """Gain of each release of the mean on unseen sets."""
    numbers = records.measured.releases(MEAN, LP100, "unseen")
    found = {number: records.gain("unseen", release=number) for number in numbers}
    return {number: one for number, one in found.items() if one is not None}


def peak_said(records: Records) -> str:
    """Where the unseen curve is highest, in words; nothing without one."""
    curve = unseen_curve(records)
    best = max(curve, key=lambda number: curve[number].mean, default=None)
    return "" if best is None else f"unseen is best at release {best}"
