"""Pictures of the report, as Vega-Lite specifications."""

from __future__ import annotations

from benchmarks.cold.comparison import GROUPS, PRETRAINED, PROTOCOLS, Place
from benchmarks.cold.outcome import MEAN
from benchmarks.cold.records import Records
from coldmerge.report.charts import CurvePoint, TaskGain, accuracy_curves, task_gains
from coldmerge.report.heatmap import Heatmap, heatmaps
from coldmerge.report.page import Figure
from coldmerge.report.runs import RunPoint, run_curves

MOST_LINES = 10
"""Policies in one picture: more have no colours of their own."""


def curves(records: Records, protocol: str) -> Figure | None:
    """Accuracy by release, seen and unseen, with the spread over seeds."""
    found = []
    for group in GROUPS:
        for release in _numbers(records, MEAN, protocol, group):
            level = records.measured.accuracy(_place(MEAN, release), protocol, group)
            if level is not None:
                found.append(CurvePoint(release, group, level.mean, level.spread))
    if not found:
        return None
    seeds = max(
        (len(gain.seeds) for g in GROUPS if (gain := records.gain(g, protocol=protocol))), default=1
    )
    said = (
        f"the band is one deviation over {seeds} seeds, each with draws of its own"
        if seeds > 1
        else "one seed, so no band"
    )
    return Figure(
        "Release by release",
        f"Mean accuracy over the sets of a group, {PROTOCOLS[protocol]}; {said}. Release 0 is the "
        "pretrained base. Seen sets are those that contributors train on, one each.",
        accuracy_curves(found, "seeds"),
    )


def gains(records: Records, protocol: str) -> Figure | None:
    """Each set's signed gain at the last release."""
    both = [one for g in GROUPS if (one := records.gain(g, protocol=protocol))]
    found = [TaskGain(task, one.group, gain) for one in both for task, gain in one.gains.items()]
    if not found:
        return None
    return Figure(
        "Set by set",
        f"{both[0].of} against the pretrained base, {PROTOCOLS[protocol]}, mean over seeds and "
        "draws.",
        task_gains(found),
    )


def heatmap(records: Records, protocol: str) -> Figure | None:
    """Gain over the base of each contributor's own set (and each unseen one) by release."""
    titles = {
        "seen": "Contributors, each on its own set, by release",
        "unseen": "Unseen sets, by release",
    }
    numbers = [n for n in records.measured.releases(MEAN, protocol) if n > 0]
    tables: dict[str, dict[str, list[float | None]]] = {}
    for group in GROUPS:
        by_release = [records.gain(group, protocol=protocol, release=n) for n in numbers]
        tasks = dict.fromkeys(task for found in by_release if found for task in found.gains)
        tables[group] = {
            task: [found.gains.get(task) if found else None for found in by_release]
            for task in sorted(tasks)
        }
    largest = max(
        (abs(v) for table in tables.values() for row in table.values() for v in row if v), default=0
    )
    if not any(tables.values()):
        return None
    reach = max(1.0, largest)
    maps = [
        Heatmap(
            titles[g], [*t], [str(n) for n in numbers], [*t.values()], -reach, reach, "+.1f", 30
        )
        for g, t in tables.items()
        if t
    ]
    return Figure(
        "Contributor by release",
        f"Gain of each release of the plain mean over the base, {PROTOCOLS[protocol]}, points.",
        heatmaps(maps),
    )


def policy_curves(records: Records, protocol: str) -> Figure | None:
    """The curves of round policies beside the plain mean's, the base in common."""
    names = [MEAN, *records.policies][:MOST_LINES]
    if len(names) < 2:
        return None
    found = []
    for name in names:
        for group in GROUPS:
            for release in _numbers(records, name, protocol, group):
                level = records.measured.accuracy(_place(name, release), protocol, group)
                if level is not None:
                    found.append(RunPoint(name, group, release, level.mean, level.spread))
    left = len(records.policies) + 1 - len(names)
    more = f" The first {len(names)} of {len(names) + left}." if left else ""
    return Figure(
        "Round policies by release",
        f"Mean accuracy, {PROTOCOLS[protocol]}; bands are one deviation over seeds.{more}",
        run_curves(found),
    )


def _numbers(records: Records, variant: str, protocol: str, group: str) -> list[int]:
    """The base and the releases up to the last one that was measured on every set."""
    last = records.measured.last(variant, protocol, group)
    if last is None:
        return []
    base = records.measured.releases(PRETRAINED.variant, protocol, group)
    numbers = {*base, *records.measured.releases(variant, protocol, group)}
    return [number for number in sorted(numbers) if number <= last.release]


def _place(variant: str, release: int) -> Place:
    return PRETRAINED if release == 0 else Place(variant, release)
