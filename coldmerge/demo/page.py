"""The demo's report.html."""

from __future__ import annotations

from pathlib import Path

from coldmerge.demo import table
from coldmerge.demo.result import DemoResult
from coldmerge.report.charts import (
    Ancestor,
    CurvePoint,
    TaskGain,
    accuracy_curves,
    lineage,
    task_gains,
)
from coldmerge.report.page import Code, Figure, Page, Table, render

MAX_COMMANDS = 40


def write_page(result: DemoResult, path: Path) -> None:
    """Write the report: curves with spread, gains by task, lineage, table, commands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(demo_page(result)), encoding="utf-8")


def demo_page(result: DemoResult) -> Page:
    """The report's content."""
    organizations = len(result.seen)
    rounds = len(result.runs[0].rows) - 1
    shipped = sum(row.bytes_shipped for row in result.runs[0].rows)
    return Page(
        title=f"{organizations} organizations improve {result.model}",
        lead=f"{rounds} rounds of ColD Fusion between real processes on one machine, over mutual "
        "TLS. Each organization fine-tuned on data of its own and sent only the difference to "
        "the release it started from.",
        numbers=[
            ("seen tasks", f"{result.gains(result.seen).mean:+.1f} points"),
            ("unseen tasks", f"{result.gains(result.unseen).mean:+.1f} points"),
            ("shipped in all", table.size(shipped)),
            ("time", f"{result.seconds / 60:.1f} min"),
        ],
        sections=[
            _curves(result),
            _gains(result),
            _lineage(result),
            _table(result),
            Code(
                "What was run",
                "The same commands start a federation across machines."
                + (f" Next here: {result.next_command}" if result.next_command else ""),
                [c.removesuffix(" --format json") for c in result.commands[:MAX_COMMANDS]],
            ),
        ],
        footer="Accuracy is that of a linear probe on frozen features, refitted for every release "
        "on the same few examples (100; 10 in the tiny demo), drawn several times. On tasks that "
        "nobody trained on, gains are small, may be none, and peak early.",
    )


def _curves(result: DemoResult) -> Figure:
    points = [
        CurvePoint(row["number"], group, row[group], row[f"{group}_spread"])
        for row in result.rows()
        for group in ("seen", "unseen")
        if row["state"] == "PUBLISHED" and row[group] is not None
    ]
    return Figure(
        "Accuracy by release",
        "Mean over tasks. Seen: test data of the organizations' own tasks. Unseen: tasks of "
        f"nobody. The bands are one standard deviation over {result.spread_over}; the same draws "
        "serve every release, so differences between releases are surer than the bands are narrow.",
        accuracy_curves(points, result.spread_over),
    )


def _gains(result: DemoResult) -> Figure:
    gains = [
        TaskGain(task, group, points)
        for group, names in (("seen", result.seen), ("unseen", result.unseen))
        for task, points in result.gains(names).tasks.items()
    ]
    return Figure("Gain by task", " ".join(table.summary(result)), task_gains(gains))


def _lineage(result: DemoResult) -> Figure:
    ancestors = [
        Ancestor(
            number=row["number"],
            digest=row["digest"] or "no candidate",
            state=row["state"],
            contributions=row["contributions"],
            shipped=f"{table.size(row['bytes_shipped'])} shipped" if place else "pretrained",
        )
        for place, row in enumerate(result.rows())
    ]
    return Figure(
        "Lineage",
        "Each release is the one before it plus the mean of the contributions (dots). Its name is "
        "a digest of its content; the coordinator signs who its parent was and what went in.",
        lineage(ancestors),
    )


def _table(result: DemoResult) -> Table:
    return Table(
        "Releases",
        f"The whole model is {table.size(result.model_bytes)}; frozen tensors are never sent.",
        table.COLUMNS,
        table.rows(result),
        table.NUMERIC,
    )
