"""A picture as a file of the kind that its name says."""

from __future__ import annotations

from pathlib import Path

import vl_convert

from coldmerge.report.charts import Spec
from coldmerge.report.page import Figure, Page, render


def write_spec(title: str, caption: str, spec: Spec, path: Path) -> None:
    """Write a picture to `path` as its suffix says: `.svg`, `.png` (twice the size) or `.html`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    elif path.suffix == ".png":
        path.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
    else:
        page = Page(title, caption, [], [Figure("", "", spec)])
        path.write_text(render(page), encoding="utf-8")
