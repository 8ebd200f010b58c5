"""Accuracy of several runs over their releases, seen tasks beside unseen ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import altair as alt

from coldmerge.report.charts import FONT, INK, MUTED, RULE, Spec

PANEL = 330
COLOURS = (
    *("#0b6e99", "#d9730d", "#2f855a", "#b83280", "#6b46c1", "#b7791f"),
    *("#2c5282", "#9b2c2c", "#4a5568", "#38b2ac"),
)


@dataclass(frozen=True)
class RunPoint:
    """Accuracy of one release of one run (or of a method over seeds), in points.

    `spread` is one deviation over seeds, 0 where there is only one.
    """

    run: str
    group: str
    release: int
    mean: float
    spread: float = 0.0


def run_curves(points: Sequence[RunPoint]) -> Spec:
    """A panel for each group of tasks, a line for each run, a band of one deviation."""
    names = list(dict.fromkeys(point.run for point in points))
    panels = [
        _panel([point for point in points if point.group == group], group, names)
        for group in dict.fromkeys(point.group for point in points) or ("seen",)
    ]
    axis = {"labelColor": MUTED, "titleColor": MUTED, "titleFontWeight": "normal"}
    lines = {"gridColor": RULE, "domainColor": RULE, "tickColor": RULE}
    styled = alt.hconcat(*panels, spacing=36).properties(background="white", padding=16)
    styled = styled.configure(font=FONT).configure_view(stroke=None)
    styled = styled.configure_axis(labelFontSize=12, titleFontSize=12, **axis, **lines)
    styled = styled.configure_title(anchor="start", fontSize=15, fontWeight=600, color=INK)
    styled = styled.configure_legend(
        orient="bottom", title=None, labelColor=INK, columns=2, labelLimit=PANEL, symbolOpacity=1
    )
    spec: Spec = styled.to_dict()
    return spec


def _panel(points: Sequence[RunPoint], group: str, names: Sequence[str]) -> Any:
    rows = [
        {**asdict(point), "low": point.mean - point.spread, "high": point.mean + point.spread}
        for point in points
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("release:Q", title="release", axis=alt.Axis(format="d", tickMinStep=1)),
        color=alt.Color(
            "run:N",
            sort=list(names),
            scale=alt.Scale(domain=list(names), range=_colours(len(names))),
        ),
    )
    mean = alt.Y("mean:Q", title="accuracy, points", scale=alt.Scale(zero=False, nice=True))
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q"), y2="high:Q")
    dots = base.mark_point(size=45, filled=True, opacity=1).encode(
        y=mean,
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("release:Q"),
            alt.Tooltip("mean:Q", title="accuracy", format=".1f"),
            alt.Tooltip("spread:Q", title="deviation over seeds", format=".1f"),
        ],
    )
    line = base.mark_line(strokeWidth=2).encode(y=mean)
    return alt.layer(band, line, dots).properties(title=f"{group} tasks", width=PANEL, height=280)


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]
