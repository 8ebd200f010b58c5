"""The demo's table, as rows of text: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldmerge.demo.result import DemoResult, Gains

COLUMNS = ("release", "round state", "accepted", "shipped", "of the model", "seen", "unseen")
NUMERIC = frozenset(range(2, len(COLUMNS)))


def rows(result: DemoResult) -> list[tuple[str, ...]]:
    """One row for each release or rejected candidate, as `COLUMNS` says.

    `of the model` is what was shipped against as many copies of the whole model.
    """
    found = result.rows()
    return [_row(row, found[0], result.model_bytes) for row in found]


def _row(row: Mapping[str, Any], first: Mapping[str, Any], model_bytes: int) -> tuple[str, ...]:
    accepted, shipped = row["contributions"], row["bytes_shipped"]
    share = f"{100 * shipped / (accepted * model_bytes):.0f} %" if accepted else "–"
    is_first = row is first
    return (
        str(row["number"]),
        "pretrained" if is_first else str(row["state"]).lower(),
        str(accepted) if not is_first else "–",
        size(shipped) if shipped else "–",
        share,
        _accuracy(row, first, "seen"),
        _accuracy(row, first, "unseen"),
    )


def _accuracy(row: Mapping[str, Any], first: Mapping[str, Any], group: str) -> str:
    mean, spread = row[group], row[f"{group}_spread"]
    if mean is None:
        return "–"
    gain = "" if row is first else f" ({mean - first[group]:+.1f})"
    return f"{mean:.1f} ± {spread:.1f}{gain}"


def size(nbytes: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def summary(result: DemoResult) -> list[str]:
    """Two sentences: what the tasks gained, seen and unseen."""
    return [
        sentence(group, result.gains(names))
        for group, names in (("Seen", result.seen), ("Unseen", result.unseen))
        if names
    ]


def sentence(group: str, gains: Gains) -> str:
    """A group's gains in one sentence."""
    return (
        f"{group} tasks: {gains.mean:+.1f} points on average (median {gains.median:+.1f}, "
        f"standard error over tasks {gains.error:.1f}), {gains.wins} of {len(gains.tasks)} up."
    )
