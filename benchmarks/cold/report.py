"""The report of a folder: a page, the same tables as Markdown, and the figures as values.

Everything is made from the folder's records, whenever asked: a folder that is not finished, or
that a small budget made, gives a smaller report that says what is missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cold.answers import HOLDS, UNMEASURED
from benchmarks.cold.claims import Claim, claims
from benchmarks.cold.comparison import GROUPS, PROTOCOLS, signed
from benchmarks.cold.failures import failures_table, missing_table
from benchmarks.cold.outcome import Plan
from benchmarks.cold.pictures import curves, gains, heatmap, policy_curves
from benchmarks.cold.records import LORA, LP100, Records
from benchmarks.cold.rows import Row, rows
from benchmarks.cold.sections import (
    choice_table,
    claims_table,
    cost_table,
    distance_table,
    main_table,
    policies_table,
    releases_table,
    sets_table,
    studies_table,
)
from coldmerge.report.page import Code, Figure, Page, Table, render

TITLE = "Does the released base get better?"
REPORT, RESULTS = "report.html", "results.md"

Section = Figure | Table | Code


def write(folder: Path) -> None:
    """Write `report.html` and `results.md` into a folder of records.

    Raises:
        DataError: the folder holds no run of this benchmark.
    """
    records = Records.read(folder)
    found = page(records)
    (folder / REPORT).write_text(render(found), encoding="utf-8")
    (folder / RESULTS).write_text(markdown(found), encoding="utf-8")


def table(folder: Path) -> list[Row]:
    """The main table: see `benchmarks.cold.rows.rows`."""
    return rows(Records.read(folder))


def gain(folder: Path) -> dict[str, float | None]:
    """Points by which the plain mean's last release is above the base under LP100, by group."""
    return _gain(Records.read(folder))


def _gain(records: Records) -> dict[str, float | None]:
    found = {group: records.gain(group) for group in GROUPS}
    return {group: None if one is None else round(one.mean, 4) for group, one in found.items()}


def result(folder: Path) -> dict[str, Any]:
    """Everything as JSON-ready values: `gain`, `table`, `claims`, `policy`."""
    records = Records.read(folder)
    choice = records.choice
    return {
        "gain": _gain(records),
        "table": rows(records),
        "claims": [claim.as_json() for claim in claims(records)],
        "policy": None
        if choice is None
        else {
            "chosen": choice.chosen,
            "standing": dict(choice.standing),
            "over_mean": choice.verdict.mean,
            "low": choice.verdict.interval.low,
            "high": choice.verdict.interval.high,
            "held_out": choice.held is not None,
        },
    }


def markdown(report: Page) -> str:
    """The page without its pictures, as Markdown that ends in one newline."""
    numbers = [f"- {name}: **{value}**" for name, value in report.numbers]
    parts = [f"# {report.title}", report.lead, "\n".join(numbers)]
    for section in report.sections:
        if isinstance(section, Figure):
            continue
        body = _rows(section) if isinstance(section, Table) else _fenced(section)
        parts += [f"## {section.title}", section.caption, body]
    return "\n\n".join(part for part in [*parts, report.footer] if part) + "\n"


def _rows(table: Table) -> str:
    if not table.rows:
        return ""
    sides = ["---:" if place in table.numeric else "---" for place in range(len(table.columns))]
    lines = [table.columns, sides, *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(code: Code) -> str:
    return "\n".join(["```", *code.lines, "```"])


def page(records: Records) -> Page:
    """The whole report, as far as the records go."""
    told = claims(records)
    values = rows(records)
    protocol = records.protocol
    sections: list[Section | None] = [_command(records.plan)]
    if protocol is not None:
        sections = [
            curves(records, protocol),
            *_tables(records, values),
            releases_table(records, protocol),
            claims_table(told),
            failures_table(records, told, protocol),
            gains(records, protocol),
            *(sets_table(records, protocol, group) for group in GROUPS),
            heatmap(records, protocol),
            distance_table(records),
            cost_table(values, protocol),
            policy_curves(records, protocol),
            policies_table(records, protocol),
            choice_table(records),
            studies_table(records, protocol),
            *sections,
        ]
    sections += [missing_table(records, told), _settings(records)]
    there = [s for s in sections if s is not None and not (isinstance(s, Table) and _bare(s))]
    return Page(TITLE, _lead(records), _numbers(records, told), there, _footer(records))


def _bare(table: Table) -> bool:
    return not table.rows and not table.caption


def _tables(records: Records, values: Sequence[Row]) -> list[Table]:
    without = [name for name in records.others if name not in records.named(LORA)]
    found = [main_table(values, p, group, without) for p in PROTOCOLS for group in GROUPS]
    return [table for table in found if table.rows]


def _lead(records: Records) -> str:
    plan = records.plan
    sets = f"{len(plan.seen)} contributors, each with a data set of its own"
    others = f"{len(plan.unseen)} data sets that nobody trained on" if plan.unseen else ""
    return (
        f"{sets}, improve {plan.model.get('name', 'a pretrained model')} together without sharing "
        "data: each fine-tunes the current release, ships the difference, the mean of the "
        "differences makes the next release. Every release is measured on the contributors' own "
        f"sets (seen){f' and on {others} (unseen)' if others else ''}."
    )


def _numbers(records: Records, told: Sequence[Claim]) -> list[tuple[str, str]]:
    found = []
    for group in GROUPS:
        one = records.gain(group)
        value = "not measured" if one is None else f"{signed(one.mean)} points"
        found.append((f"gain on {group} sets ({PROTOCOLS[LP100]})", value))
        if one is not None:
            found.append((f"{group}: 95 % within these sets", str(one.interval)))
    measured = [claim for claim in told if claim.verdict != UNMEASURED]
    holding = sum(claim.verdict == HOLDS for claim in measured)
    found.append(("claims that hold, of those measured", f"{holding} of {len(measured)}"))
    found.append(("claims not measured", str(len(told) - len(measured))))
    return found


def _command(plan: Plan) -> Code:
    said = {**plan.options, "data": "DIR", "seen": plan.seen, "unseen": plan.unseen, "out": "OUT"}
    if plan.model.get("name", "minilm") != "minilm":
        said["model"] = plan.model["name"]
    words = ["python", "-m", "benchmarks.cold"]
    for name, value in said.items():
        listed = isinstance(value, list | tuple)
        text = ",".join(map(str, value)) if listed else str(value)
        if value is not None and text and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [text]
    return Code(
        "Repeat it",
        "Resumable: the same command in the same folder goes on where it stopped. The report is "
        "made again from the records each time.",
        [shlex.join(words)],
    )


def _settings(records: Records) -> Table:
    plan = records.plan
    seeds = sorted({run.seed for run in records.runs})
    lines: list[tuple[str, Any]] = [
        ("seen sets", ", ".join(plan.seen)),
        ("unseen sets", ", ".join(plan.unseen) or "none"),
        *((f"model: {key}", value) for key, value in plan.model.items()),
        ("trained or merged releases", len(records.runs)),
        ("seeds", ", ".join(map(str, seeds))),
        *_flat("setting: ", plan.settings),
        *((f"machine: {key}", value) for key, value in plan.machine.items()),
        *((f"version: {key}", value) for key, value in plan.versions.items()),
        *((key.replace("_", " "), f"{value:,.0f}") for key, value in plan.costs.items()),
    ]
    rows = [[key, _said(value)] for key, value in lines]
    return Table("How it was made", "", ["", ""], rows, prose=frozenset({1}))


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _flat(name: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings within settings, with dots."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        found += _flat(f"{name}{key}.", value) if inner else [(f"{name}{key}", value)]
    return found


def _footer(records: Records) -> str:
    machine = records.plan.machine
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
    return f"{len(records.runs)} trained or merged releases. Machine: {where or 'not recorded'}."
