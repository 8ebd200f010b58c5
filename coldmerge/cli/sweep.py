"""What `coldmerge simulate --sweep` does: one simulation under several settings and seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coldmerge.cli.output import Format, bars, err, out, print_json, print_rows

if TYPE_CHECKING:
    from coldmerge_simulation.results.sweeping import Sweep


def run_sweep(
    config: Path,
    texts: Sequence[str],
    *,
    seeds: int,
    seed: int | None,
    engine: str,
    folder: Path | None,
    fmt: Format,
) -> int:
    """Run the sweep, print its table and write its page; the exit status."""
    from coldmerge_simulation import sweep, variants

    with bars(fmt) as progress:
        found = sweep(
            config,
            variants(texts),
            seeds=seeds,
            first_seed=seed,
            engine=engine,
            out=folder,
            progress=progress,
        )
    page = write_page(found)
    if fmt is Format.JSON:
        print_json(found.as_json())
    else:
        print_rows(found.rows(), Format.TABLE, empty="")
        out.print(f"Chart: {page}", highlight=False)
    failed = [(cell, seed, why) for cell in found.cells for seed, why in cell.failed.items()]
    for cell, number, why in failed:
        text = f"{cell.label}, seed {number}: {why.message} [{why.code}]"
        err.print(text, markup=False, highlight=False)
    return 1 if failed else 0


def write_page(found: Sweep) -> Path:
    """The table and the curves as one page, beside the result as JSON, in the sweep's folder."""
    from coldmerge.report.page import Figure, Page, Table, render
    from coldmerge.report.runs import run_curves

    rows, points = found.rows(), found.points()
    cells = [["–" if value is None else str(value) for value in row.values()] for row in rows]
    caption = "Accuracies in points, ± one deviation over seeds; differences in pairs of one seed."
    table = Table("Variants", caption, list(rows[0]), cells)
    figures = [Figure("Accuracy of each release", "", run_curves(points))] if points else []
    lead = f"{len(rows)} variants, {sum(len(cell.runs) for cell in found.cells)} runs."
    page = Page(found.folder.name, lead, [], [*figures, table])
    found.folder.mkdir(parents=True, exist_ok=True)
    path = found.folder / "sweep.html"
    path.write_text(render(page), encoding="utf-8")
    (found.folder / "sweep.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    return path
