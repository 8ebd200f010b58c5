"""What the ColD Fusion paper says (Don-Yehiya et al., ACL 2023, arXiv 2212.01378)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from benchmarks.cold.answers import (
    FAILS,
    Answer,
    against_oneshot,
    alike,
    best_of,
    direction,
    ends,
    missing,
    sided,
    unequal,
    unseen_curve,
)
from benchmarks.cold.comparison import PRETRAINED, Place, signed
from benchmarks.cold.intervals import Interval, over_examples
from benchmarks.cold.outcome import MEAN, MULTITASK, ONESHOT
from benchmarks.cold.records import COHORT, EXAMPLES, LP100, Records

LEAST_RELEASES = 3


TUNED = ("full", "ft100")


def on_seen(
    records: Records,
    variant: str,
    against: str | None,
    protocols: Sequence[str] = (*TUNED, LP100, "frozen"),
) -> Answer:
    """A variant against another one (None: the base), by the first protocol that there is."""
    measured = records.measured
    for protocol in protocols:
        last = measured.last(variant, protocol, "seen")
        other = measured.last(against, protocol, "seen") if against else PRETRAINED
        found = measured.compare(last, other, protocol, "seen")
        if found is not None:
            return direction(found, "")
    how = "no fine-tuning of" if protocols == TUNED else "no"
    return missing(f"{how} {variant} beside {against or 'the base'} on seen sets")


def over_one_shot(records: Records) -> Answer:
    """P4: rounds against one shot, on seen sets."""
    for protocol in ("full", "ft100", LP100):
        found = against_oneshot(records, "seen", protocol)
        if found is not None:
            answer = direction(found, "")
            return replace(answer, notes=[*answer.notes, *unequal(records, found)])
    return missing(f"no {ONESHOT}mean")


def apart(records: Records, protocols: Sequence[str]) -> tuple[float, Interval, str] | None:
    """How much more the mean gains on seen sets than on unseen ones."""
    for protocol in protocols:
        seen, unseen = (records.gain(group, protocol=protocol) for group in ("seen", "unseen"))
        if seen is None or unseen is None:
            continue
        weights = [1 / len(seen.sets)] * len(seen.sets) + [-1 / len(unseen.sets)] * len(unseen.sets)
        interval = over_examples([*seen.sets.values(), *unseen.sets.values()], weights)
        said = f"{protocol}: seen {signed(seen.mean)}, unseen {signed(unseen.mean)}"
        return seen.mean - unseen.mean, interval, said
    return None


def frozen_apart(records: Records) -> Answer:
    """P5: seen gain minus unseen gain, body frozen."""
    found = apart(records, ("frozen", LP100))
    if found is None:
        return missing("no probe of the mean on seen and on unseen sets")
    mean, interval, said = found
    return sided(mean, interval, f"{signed(mean)} {interval}", [said])


def tuned_alike(records: Records) -> Answer:
    """P6: seen gain minus unseen gain, fine-tuned."""
    found = apart(records, TUNED)
    if found is None:
        return missing("no fine-tuning of the mean on seen and on unseen sets")
    mean, interval, said = found
    verdict = alike(mean, interval)
    return Answer(verdict, mean, interval, f"{signed(mean)} {interval}", [said])


def dip(records: Records) -> Answer:
    """P7: the unseen curve's best release over its last one."""
    curve = unseen_curve(records)
    if len(curve) < LEAST_RELEASES:
        return missing(f"fewer than {LEAST_RELEASES} releases of the mean on unseen sets")
    best = max(curve, key=lambda number: curve[number].mean)
    last = max(curve)
    figure = " / ".join(signed(curve[number].mean) for number in sorted(curve))
    if best == last:
        return Answer(FAILS, figure=figure, notes=[f"best at the last release, {last}"])
    drop = records.measured.compare(Place(MEAN, best), Place(MEAN, last), LP100, "unseen")
    if drop is None:
        return missing("the releases have no seed in common")
    interval, how = best_of(drop, len(curve) - 1)
    notes = [f"release {best}, the best, over release {last}: {signed(drop.mean)} {interval}", *how]
    return sided(drop.mean, interval, figure, notes)


def cohort_size(records: Records) -> Answer:
    """P9: the largest cohort against the smallest one of two or more."""
    sized = [one for one in records.sized(COHORT) if one.size >= 2]
    if len(sized) < 2:
        return missing("needs two cohorts of two or more contributors")
    found = ends(records, sized[-1].variant, sized[0].variant)
    if found is None:
        return missing("the cohorts have no set or seed in common")
    notes = [f"seen, {sized[-1].size} contributors against {sized[0].size}"]
    verdict = alike(found.mean, found.interval)
    return Answer(verdict, found.mean, found.interval, str(found), notes)


def more_data(records: Records) -> Answer:
    """P10: most examples against fewest."""
    sized = records.sized(EXAMPLES)
    if len(sized) < 2:
        return missing("needs two amounts of examples")
    found = ends(records, sized[-1].variant, sized[0].variant)
    if found is None:
        return missing("the amounts have no set or seed in common")
    notes = [f"seen, {sized[-1].size} examples a round against {sized[0].size}"]
    notes += [f"multitask is {signed(gap)} above" for gap in _to_multitask(records)]
    return sided(found.mean, found.interval, str(found), notes)


def _to_multitask(records: Records) -> list[float]:
    found = records.over_mean("seen", MULTITASK)
    return [found.mean] if found else []


def keeps_rising(records: Records) -> Answer:
    """P11: the last step of the curve on seen sets."""
    numbers = records.measured.releases(MEAN, LP100, "seen")
    pairs = pairwise(numbers)
    steps = [
        records.measured.compare(Place(MEAN, b), Place(MEAN, a), LP100, "seen") for a, b in pairs
    ]
    found = [step for step in steps if step is not None]
    if not found:
        return missing("fewer than two releases of the mean on seen sets")
    rises = sum(step.mean > 0 for step in found)
    last = found[-1]
    notes = [f"{rises} of {len(found)} later releases rise; the last step: {last}"]
    return sided(last.mean, last.interval, str(last), notes)
