"""What did not work and what is missing, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.cold.answers import FAILS, UNCLEAR, UNMEASURED
from benchmarks.cold.claims import Claim
from benchmarks.cold.comparison import GROUPS, Place, signed
from benchmarks.cold.outcome import ALONE, MEAN, MULTITASK
from benchmarks.cold.records import Records
from benchmarks.cold.rows import ordered
from coldmerge.report.page import Table


def failures_table(records: Records, found: Sequence[Claim], protocol: str) -> Table:
    """Claims that fail, sets that lost, releases that went down, variants below the mean."""
    rows = [
        *([f"claim {c.id} {c.verdict}", c.says, c.figure] for c in _in(found, FAILS, UNCLEAR)),
        *_lost_sets(records, protocol),
        *_falls(records, protocol),
        *_below_mean(records, protocol),
    ]
    return Table(
        "What did not work",
        "Made from the records: claims that fail or stay unclear, sets that are worse off than "
        "with the pretrained base, releases worse than the one before, variants below the plain "
        "mean. Points, with the 95 % interval over examples."
        if rows
        else "Nothing of what was measured: no claim fails, no set lost, nothing falls behind.",
        ["", "what", "figure"],
        rows,
        prose=frozenset({1, 2}),
    )


def missing_table(records: Records, found: Sequence[Claim]) -> Table:
    """What the budget left out, which sets were dropped, which claims nothing was measured for."""
    plan = records.plan
    rows = [
        *(["left out by the budget", text, ""] for text in plan.left_out),
        *_full_cost(records),
        *_dropped(records),
        *([f"claim {c.id} not measured", c.says, c.note] for c in _in(found, UNMEASURED)),
        *_unfinished(records),
    ]
    return Table(
        "What is missing",
        "" if rows else "Nothing: everything planned was measured, and every claim has a figure.",
        ["", "what", "why"],
        rows,
        prose=frozenset({1, 2}),
    )


def _in(found: Sequence[Claim], *verdicts: str) -> list[Claim]:
    return [claim for claim in found if claim.verdict in verdicts]


def _lost_sets(records: Records, protocol: str) -> list[list[str]]:
    rows = []
    for group in GROUPS:
        gain = records.gain(group, protocol=protocol)
        for task, value in sorted(gain.gains.items(), key=lambda item: item[1]) if gain else ():
            if gain and value < 0:
                interval = gain.of_set(task)
                sure = "surely" if interval.below_zero else "within its noise"
                rows.append([f"{group} set lost, {sure}", task, f"{signed(value)} {interval}"])
    return rows


def _falls(records: Records, protocol: str) -> list[list[str]]:
    rows = []
    for group in GROUPS:
        numbers = records.measured.releases(MEAN, protocol, group)
        for before, after in pairwise(numbers):
            step = records.measured.compare(
                Place(MEAN, after), Place(MEAN, before), protocol, group
            )
            if step is not None and step.mean < 0:
                rows.append([f"release {after} below release {before}", f"{group} sets", str(step)])
    return rows


def _below_mean(records: Records, protocol: str) -> list[list[str]]:
    rows = []
    for name in ordered(records):
        for group in GROUPS:
            single = name in (MEAN, ALONE, *records.others)
            over = None if single else records.over_mean(group, name, protocol)
            if over is not None and over.of.release and over.mean < 0:
                rows.append([f"below {over.against}", f"{name}, {group} sets", str(over)])
    return rows


def _dropped(records: Records) -> list[list[str]]:
    """A line for each reason."""
    dropped = records.plan.dropped
    return [
        ["sets dropped", ", ".join(sorted(name for name in dropped if dropped[name] == why)), why]
        for why in dict.fromkeys(dropped.values())
    ]


def _full_cost(records: Records) -> list[list[str]]:
    needed = records.plan.costs.get("full_table_seconds")
    if not records.plan.left_out or needed is None:
        return []
    return [["the full table", f"about {needed / 60:.0f} minutes on this machine", ""]]


def _unfinished(records: Records) -> list[list[str]]:
    """Sets, seeds, rounds and variants of the plan that nothing was measured of."""
    parts, measured = records.parts, records.measured
    rows = []
    lacking = [name for name in parts.get("recipes", ()) if name not in measured.variants]
    lacking += [
        name
        for name in parts.get("baselines", ())
        if name in (ALONE, MULTITASK) and name not in measured.variants
    ]
    if "oneshot" in parts.get("baselines", ()) and not records.oneshots:
        lacking.append("one-shot merges")
    rows += [["planned, not measured", name, "not finished, or it failed"] for name in lacking]
    had = {run.seed for run in records.runs if run.variant == MEAN}
    if len(had) < parts.get("seeds", 0):
        rows.append(["seeds", f"{len(had)} of {parts['seeds']} planned", "not finished"])
    last = max((run.release for run in records.runs if run.variant == MEAN), default=0)
    if last < parts.get("rounds", 0):
        rows.append(["rounds", f"{last} of {parts['rounds']} planned", "not finished"])
    for group, planned in zip(GROUPS, (records.plan.seen, records.plan.unseen), strict=True):
        there = set(records.measured.tasks(group))
        lacking = [task for task in planned if task not in there]
        if not planned:
            rows.append([f"no {group} sets", "planned without", ""])
        elif lacking:
            rows.append([f"{group} sets without a measurement", ", ".join(lacking), ""])
    return rows
