"""Matrices as pictures: cells with their numbers in them, and files of three kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt

from coldmerge.report.charts import FONT, INK, MUTED, Spec
from coldmerge.report.picture import write_spec

CELL = 66
MOST_PIXELS = 900
LABEL_PIXELS = 260
_RANGE = ["#b45309", "#fbe3c4", "#f8fafc", "#bfe0ec", "#0b6e99"]


@dataclass(frozen=True)
class Heatmap:
    """Values in [low, high] by row and column; None where there is none.

    `format` is how a cell says its number, `tallest` the most pixels of a row.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float = -1.0
    high: float = 1.0
    format: str = ".2f"
    tallest: int = CELL


def heatmaps(maps: Sequence[Heatmap]) -> Spec:
    """The maps one below the other, each with its scale of colours."""
    charts = [_map(one) for one in maps]
    chart = alt.vconcat(*charts, spacing=44).resolve_scale(color="independent")
    styled = chart.properties(background="white", padding=16).configure(font=FONT)
    styled = styled.configure_view(stroke=None).configure_title(
        anchor="start", fontSize=15, fontWeight=600, color=INK, offset=14, frame="group"
    )
    styled = styled.configure_axis(
        labelColor=INK, labelFontSize=12, labelLimit=LABEL_PIXELS, domain=False, ticks=False
    )
    spec: Spec = styled.to_dict()
    return spec


def _map(one: Heatmap) -> alt.LayerChart:
    # A picture of many models stays on the screen: cells shrink, and their numbers with them.
    width = max(26, min(CELL, MOST_PIXELS // max(1, len(one.columns))))
    height = max(22, min(width, one.tallest, 34 if len(one.rows) > 12 else CELL))
    longest = max((len(label) for label in one.columns), default=0)
    slant = -40 if longest * 8 > width else 0
    base = alt.Chart(alt.Data(values=_cells(one))).encode(
        x=alt.X(
            "column:N",
            sort=list(one.columns),
            title=None,
            axis=alt.Axis(orient="top", labelAngle=slant),
        ),
        y=alt.Y("row:N", sort=list(one.rows), title=None),
        tooltip=[
            alt.Tooltip("row:N"),
            alt.Tooltip("column:N"),
            alt.Tooltip("value:Q", format=".4f"),
        ],
    )
    ticks = [one.low + part * (one.high - one.low) for part in (0, 0.25, 0.5, 0.75, 1)]
    scale = alt.Scale(domain=ticks, range=_RANGE, interpolate="rgb", clamp=True)
    legend = alt.Legend(title=None, values=ticks[::2], format=".1f", gradientLength=110)
    squares = base.mark_rect(stroke="white", strokeWidth=2).encode(
        color=alt.Color("value:Q", scale=scale, legend=legend)
    )
    numbers = _numbers(base, ticks, 13 if width >= 44 else 10)
    return alt.layer(squares, *numbers).properties(
        title=one.title, width=width * len(one.columns), height=height * len(one.rows)
    )


def _cells(one: Heatmap) -> list[dict[str, object]]:
    return [
        {
            "row": row,
            "column": column,
            "value": value,
            "label": "–" if value is None else _label(value, one.format),
        }
        for row, values in zip(one.rows, one.values, strict=True)
        for column, value in zip(one.columns, values, strict=True)
    ]


def _label(value: float, form: str) -> str:
    said = format(value, form)
    return format(0.0, form) if float(said) == 0 else said  # no minus before a zero


def _numbers(base: alt.Chart, ticks: Sequence[float], size: int) -> list[alt.Chart]:
    """The cells' labels: white on the dark ends of the scale, a muted dash where none is."""
    depth = f"abs(datum.value - {ticks[2]}) / {ticks[4] - ticks[2]}"
    inks = {
        f"isValid(datum.value) && {depth} > 0.72": "white",
        f"isValid(datum.value) && {depth} <= 0.72": INK,
        "!isValid(datum.value)": MUTED,
    }
    return [
        base.transform_filter(where).mark_text(fontSize=size, color=ink).encode(text="label:N")
        for where, ink in inks.items()
    ]


def write_picture(title: str, caption: str, maps: Sequence[Heatmap], path: Path) -> None:
    """Write the maps to `path` as its suffix says: `.svg`, `.png` (twice the size) or `.html`."""
    write_spec(title, caption, heatmaps(maps), path)
