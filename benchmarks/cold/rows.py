"""The main table as values: one row for each variant, protocol and group of sets."""

from __future__ import annotations

from math import isnan
from typing import Any

from benchmarks.cold.comparison import GROUPS, PRETRAINED, Comparison, Place
from benchmarks.cold.intervals import Interval
from benchmarks.cold.outcome import ALONE, BASE, MEAN, MULTITASK
from benchmarks.cold.records import Records

Row = dict[str, Any]


def ordered(records: Records) -> list[str]:
    """Variants as tables list them: base, mean, baselines, then the others as measured."""
    first = [BASE, MEAN, MULTITASK, *sorted(records.oneshots), ALONE]
    there = records.measured.variants
    return [name for name in first if name in there] + [n for n in there if n not in first]


def rows(records: Records) -> list[Row]:
    """Every variant's last release, by every protocol and on every group it was measured on.

    Accuracies and gains are in points. `low` and `high` are the 95 % interval over examples
    within the sets, `runs_…` over seeds and draws too, `sets_…` across sets. `over_mean` is
    against the plain mean after as many steps, for baselines and round policies.
    `seconds_per_point` is training of all
    contributors per point gained, None where nothing was gained.
    """
    return [
        row
        for protocol in records.protocols
        for group in GROUPS
        for variant in ordered(records)
        if (row := _row(records, variant, protocol, group)) is not None
    ]


def _row(records: Records, variant: str, protocol: str, group: str) -> Row | None:
    place = records.measured.last(variant, protocol, group)
    level = records.measured.accuracy(place, protocol, group)
    if place is None or level is None:
        return None
    gain = records.gain(group, variant, protocol) if place != PRETRAINED else None
    single = variant in (BASE, MEAN, *records.others)
    over = None if single else records.over_mean(group, variant, protocol)
    row: Row = {
        "variant": variant,
        "release": place.release,
        "protocol": protocol,
        "group": group,
        "sets": len(gain.sets) if gain else level.sets,
        "seeds": len(gain.seeds) if gain else level.seeds,
        "accuracy": _rounded(level.mean),
        **(_gained(gain) if gain else {}),
        "over_mean": over and _rounded(over.mean),
        "over_mean_low": over and _rounded(over.interval.low),
        "over_mean_high": over and _rounded(over.interval.high),
        **_cost(records, place, gain),
    }
    return row


def _gained(found: Comparison) -> Row:
    return {
        "gain": _rounded(found.mean),
        **_ends(found.interval),
        **_ends(found.runs_interval, "runs_"),
        **_ends(found.sets_interval, "sets_"),
        "median": _rounded(found.median),
        "wins": found.wins,
        "losses": found.losses,
        "standard_error": _rounded(found.error),
        "by_seed": {str(seed): _rounded(gain) for seed, gain in found.by_seed.items()},
        "by_set": {task: _rounded(gain) for task, gain in found.gains.items()},
    }


def _ends(interval: Interval | None, prefix: str = "") -> Row:
    return {
        f"{prefix}low": interval and _rounded(interval.low),
        f"{prefix}high": interval and _rounded(interval.high),
    }


def _cost(records: Records, place: Place, gain: Comparison | None) -> Row:
    effort = records.effort.get(place)
    if effort is None:
        return {"bytes": None, "train_seconds": None, "seconds_per_point": None}
    rate = effort.seconds / gain.mean if gain and gain.mean > 0 else None
    return {
        "bytes": round(effort.bytes),
        "train_seconds": round(effort.seconds, 1),
        "seconds_per_point": None if rate is None else round(rate, 1),
    }


def _rounded(value: float) -> float | None:
    return None if isnan(value) else round(value, 4) + 0
