"""Pictures: each function takes plain values and returns a Vega-Lite specification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import altair as alt

Spec = dict[str, Any]

WIDTH = 680
SEEN, UNSEEN = "#0b6e99", "#d9730d"
INK, MUTED, RULE = "#1f2937", "#6b7280", "#e5e7eb"
GOOD, BAD = "#2f855a", "#b83232"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
GROUPS = alt.Scale(domain=["seen", "unseen"], range=[SEEN, UNSEEN])


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of one release on one group of tasks, in points; `spread` is one deviation."""

    release: int
    group: str
    mean: float
    spread: float


@dataclass(frozen=True)
class TaskGain:
    """How much one task gained, in points; `group` is `seen` or `unseen`."""

    task: str
    group: str
    gain: float


@dataclass(frozen=True)
class Ancestor:
    """A release of a lineage, or a candidate that a round made and did not publish."""

    number: int
    digest: str
    state: str
    contributions: int
    shipped: str


def accuracy_curves(points: Sequence[CurvePoint], spread_over: str) -> Spec:
    """Accuracy by release, seen and unseen, with a band of one standard deviation."""
    highest = {
        release: max(point.mean for point in points if point.release == release)
        for release in {point.release for point in points}
    }
    rows = [
        {
            **asdict(point),
            "low": point.mean - point.spread,
            "high": point.mean + point.spread,
            "above": point.mean == highest[point.release],
        }
        for point in points
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("release:O", title="release", axis=alt.Axis(labelAngle=0)),
        color=alt.Color("group:N", scale=GROUPS, legend=None),
    )
    roomy = alt.Scale(zero=False, nice=False, padding=30)  # for the numbers beside the dots
    mean = alt.Y("mean:Q", title="accuracy, points", scale=roomy)
    band = base.mark_area(opacity=0.14).encode(y=alt.Y("low:Q"), y2="high:Q")
    line = base.mark_line(strokeWidth=2.5).encode(y=mean)
    dots = base.mark_point(size=70, filled=True, opacity=1).encode(
        y=mean,
        tooltip=[
            alt.Tooltip("group:N", title="tasks"),
            alt.Tooltip("release:O"),
            alt.Tooltip("mean:Q", title="accuracy", format=".1f"),
            alt.Tooltip("spread:Q", title=f"deviation over {spread_over}", format=".1f"),
        ],
    )
    numbers = [
        base.transform_filter(which)
        .mark_text(dy=shift, fontWeight=600)
        .encode(y=mean, text=alt.Text("mean:Q", format=".1f"))
        for which, shift in (("datum.above", -14), ("!datum.above", 16))
    ]
    last = max((point.release for point in points), default=0)
    names = (
        base.transform_filter(f"datum.release == {last}")
        .mark_text(align="left", dx=14, fontWeight=600, fontSize=13)
        .encode(y=mean, text="group:N")
    )
    return _finished(alt.layer(band, line, dots, *numbers, names).properties(height=300))


def task_gains(gains: Sequence[TaskGain]) -> Spec:
    """Signed gain of each task from the first to the last release, best first."""
    ordered = sorted(gains, key=lambda item: (item.group, -item.gain, item.task))
    rows = [{**asdict(item), "label": f"{round(item.gain, 1) + 0:+.1f}"} for item in ordered]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("task:N", sort=[item.task for item in ordered], title=None),
        x=alt.X(
            "gain:Q",
            title="gain, points",
            axis=alt.Axis(tickCount=8),
            scale=alt.Scale(padding=40, nice=False),
        ),
    )
    tips = [
        alt.Tooltip("task:N"),
        alt.Tooltip("group:N", title="trained on"),
        alt.Tooltip("gain:Q", format="+.2f"),
    ]
    bars = base.mark_bar(cornerRadius=2, height={"band": 0.62}).encode(
        color=alt.Color("group:N", scale=GROUPS, title=None), tooltip=tips
    )
    more, less = (base.transform_filter(f"datum.gain {sign} 0") for sign in (">=", "<"))
    right = more.mark_text(align="left", dx=5).encode(text="label:N")
    left = less.mark_text(align="right", dx=-5).encode(text="label:N")
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=MUTED).encode(x="x:Q")
    height = 28 * max(1, len(rows))
    return _finished(alt.layer(bars, right, left, zero).properties(height=height))


def lineage(ancestors: Sequence[Ancestor]) -> Spec:
    """Releases from left to right; each round's contributions flow into what it made.

    What a gate rejected hangs below the line.
    """
    nodes: list[Mapping[str, Any]] = []
    edges: list[Mapping[str, Any]] = []
    dots: list[Mapping[str, Any]] = []
    parent = 0
    for place, one in enumerate(ancestors):
        published = one.state == "PUBLISHED"
        y = 0.0 if published else -1.0
        nodes.append({**asdict(one), "x": place, "y": y, "short": one.digest[:8]})
        if place:
            edges.append({"x": parent, "y": 0.0, "x2": place, "y2": y, "state": one.state})
            dots += [
                {"x": place - 0.5 + 0.09 * (i - (one.contributions - 1) / 2), "y": 0.8}
                for i in range(one.contributions)
            ]
            edges += [
                {"x": d["x"], "y": 0.8, "x2": place, "y2": y, "state": "contribution"}
                for d in dots[-one.contributions :]
                if one.contributions
            ]
        parent = place if published else parent
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-0.5, max(1, len(nodes) - 1) + 0.5]))
    low = -1.6 if any(node["y"] < 0 for node in nodes) else -0.9
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[low, 1.1]))
    layers = _lineage_layers(nodes, edges, dots, x, y)
    return _finished(alt.layer(*layers).properties(height=round(95 * (1.1 - low))))


def _lineage_layers(nodes: Any, edges: Any, dots: Any, x: Any, y: Any) -> list[Any]:
    states = alt.Scale(
        domain=["PUBLISHED", "REJECTED", "ABANDONED", "contribution"],
        range=[GOOD, BAD, MUTED, "#cbd5e1"],
    )
    colour = alt.Color("state:N", scale=states, legend=None)
    lines = (
        alt.Chart(alt.Data(values=edges))
        .mark_rule(strokeWidth=1.6)
        .encode(x=x, y=y, x2="x2:Q", y2="y2:Q", color=colour)
    )
    organizations = (
        alt.Chart(alt.Data(values=dots)).mark_point(filled=True, size=42, color=SEEN, opacity=1)
    ).encode(x=x, y=y)
    base = alt.Chart(alt.Data(values=nodes)).encode(x=x, y=y)
    tips = [
        alt.Tooltip("number:Q", title="release"),
        alt.Tooltip("state:N"),
        alt.Tooltip("digest:N", title="content digest"),
        alt.Tooltip("contributions:Q"),
        alt.Tooltip("shipped:N"),
    ]
    circles = base.mark_point(filled=True, size=900, opacity=1).encode(color=colour, tooltip=tips)
    numbers = base.mark_text(color="white", fontWeight=700, fontSize=14).encode(text="number:Q")
    digests = base.mark_text(dy=29, font="ui-monospace, 'DejaVu Sans Mono', monospace").encode(
        text="short:N"
    )
    shipped = base.mark_text(dy=45, color=MUTED).encode(text="shipped:N")
    return [lines, organizations, circles, numbers, digests, shipped]


def _finished(chart: Any) -> Spec:
    """Width, fonts and colours that all pictures share."""
    axis = {"labelColor": MUTED, "titleColor": MUTED, "titleFontWeight": "normal"}
    lines = {"gridColor": RULE, "domainColor": RULE, "tickColor": RULE}
    styled = chart.properties(width=WIDTH, background="transparent").configure(font=FONT)
    styled = styled.configure_view(stroke=None).configure_text(color=INK, fontSize=12)
    styled = styled.configure_axis(labelFontSize=12, titleFontSize=12, **axis, **lines)
    styled = styled.configure_legend(orient="top", title=None, labelColor=INK, symbolType="circle")
    spec: Spec = styled.to_dict()
    return spec
