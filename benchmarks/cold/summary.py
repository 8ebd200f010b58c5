"""Every release beside the base, as values and as text; intervals are the report's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.cold.outcome import ALONE, BASE, Outcome, Score

GROUPS = ("seen", "unseen")


def summary(outcome: Outcome, failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """JSON-ready values: a row for each variant, release and protocol, and what was planned."""
    scores, runs = outcome.scores(), outcome.runs()
    plan = outcome.plan()
    return {
        "releases": table(scores),
        "seeds": sorted({run.seed for run in runs}),
        "seen": list(plan.seen),
        "unseen": list(plan.unseen),
        "dropped": dict(plan.dropped),
        "left_out": list(plan.left_out),
        "failed": dict(failed or {}),
        "costs": dict(plan.costs),
        "model": dict(plan.model),
        "out": str(outcome.folder),
    }


def table(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For each variant, release and protocol: accuracy and gain over the base, in points."""
    keys = dict.fromkeys((s.variant, s.release, s.protocol) for s in scores)
    rows = []
    for variant, release, protocol in keys:
        row: dict[str, Any] = {"variant": variant, "release": release, "protocol": protocol}
        for group in GROUPS:
            mine = [
                s
                for s in scores
                if (s.variant, s.release, s.protocol, s.group)
                == (variant, release, protocol, group)
            ]
            if mine:
                tasks = _by_task(mine)
                row[group] = round(100 * fmean(fmean(v.values()) for v in tasks.values()), 3)
                row[f"{group}_gain"] = _gain(scores, variant, release, protocol, group)
                row[f"{group}_sets"] = len(tasks)
        rows.append(row)
    return rows


def _by_task(scores: Sequence[Score]) -> dict[str, dict[tuple[int, int], float]]:
    found: defaultdict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for score in scores:
        found[score.task][score.seed, score.draw] = score.accuracy
    return found


def _gain(
    scores: Sequence[Score], variant: str, release: int, protocol: str, group: str
) -> float | None:
    """Mean over sets of the mean over seeds and draws that both have; None without any."""
    if variant == BASE:
        return None
    both = []
    for who in ((variant, release), (BASE, 0)):
        some = [
            s
            for s in scores
            if (s.variant, s.release) == who and s.protocol == protocol and s.group == group
        ]
        both.append(_by_task(some))
    mine, base = both
    gains = []
    for task, values in mine.items():
        pairs = [
            value - base[task][key] for key, value in values.items() if key in base.get(task, {})
        ]
        if pairs:
            gains.append(fmean(pairs))
    return round(100 * fmean(gains), 3) if gains else None


def text(found: Mapping[str, Any]) -> str:
    """The table as people read it."""
    lines = [f"{'variant':28}{'release':>8}  {'protocol':9}{'seen':>16}{'unseen':>16}"]
    for row in found["releases"]:
        cells = "".join(f"{_cell(row, group):>16}" for group in GROUPS)
        lines.append(f"{row['variant']:28}{row['release']:8}  {row['protocol']:9}{cells}")
    lines.append(f"accuracy in points, with the gain over the base; {ALONE}: on the own set only")
    gain = found["gain"]
    shown = ", ".join(f"{g} {gain[g]:+.2f}" for g in GROUPS if gain[g] is not None)
    lines.append(f"gain of the plain mean (lp100): {shown or 'not measured'}")
    lines.append(f"report: {found['out']}/report.html")
    for label in ("left_out", "failed", "dropped"):
        if found[label]:
            said = found[label]
            some = [f"{k}: {v}" for k, v in said.items()] if isinstance(said, dict) else said
            lines.append(f"{label.replace('_', ' ')}: {'; '.join(some)}")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], group: str) -> str:
    if group not in row:
        return ""
    gain = row[f"{group}_gain"]
    return f"{row[group]:.1f}" + (f" ({gain:+.1f})" if gain is not None else "")
