"""`coldmerge compare`: simulations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldmerge.cli.output import Format, FormatOption, out, print_json, print_rows, size
from coldmerge.cli.weights import check_picture, names_of

if TYPE_CHECKING:
    from coldmerge_simulation.results.comparing import Run

OUTCOMES = ("refused", "quarantined", "failed", "late", "dropped")


def register(app: typer.Typer) -> None:
    """Add this verb to the root command."""
    example = "coldmerge compare runs/mean runs/ties --picture curves.svg"
    app.command(epilog=f"Example: {example}")(compare)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Folders of simulations, or their results as JSON."),
    ],
    picture: Annotated[
        Path | None, typer.Option(help="Draw it, too: a file that ends in .svg, .png or .html.")
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Lay simulations side by side: accuracies, gains, and differences against the first one.

    Runs with the same data and seed are compared in pairs, task by task.
    """
    from coldmerge_simulation.results import comparing

    if picture is not None:
        check_picture(picture)
    found = [comparing.load(path, label) for path, label in zip(runs, names_of(runs), strict=True)]
    answer = comparing.compare(found)
    if picture is not None:
        _draw(found, picture)
    if fmt is Format.JSON:
        print_json(answer)
        return
    _show(answer)
    if picture is not None:
        out.print(f"Picture: {picture}", highlight=False)


def _draw(runs: Sequence[Run], path: Path) -> None:
    from coldmerge.report.picture import write_spec
    from coldmerge.report.runs import RunPoint, run_curves
    from coldmerge_simulation.results.comparing import GROUPS

    points = [
        RunPoint(run.label, group, number, mean)
        for group in GROUPS
        for run in runs
        for number, mean in run.curve(group)
    ]
    write_spec("Simulations", "Accuracy of each release.", run_curves(points), path)


def _show(answer: dict[str, Any]) -> None:
    print_rows([_row(run, answer["runs"]) for run in answer["runs"]], Format.TABLE, empty="")
    if answer["settings"]:
        out.print()
        labels = [run["run"] for run in answer["runs"]]
        rows = [
            {"setting": key, **dict(zip(labels, map(str, values), strict=True))}
            for key, values in answer["settings"].items()
        ]
        print_rows(rows, Format.TABLE, empty="")
    if answer["differences"]:
        out.print()
        print_rows([_difference(one) for one in answer["differences"]], Format.TABLE, empty="")
    for one in answer["differences"]:
        if one["unpaired"]:
            out.print(
                f"{one['run']} has another {', '.join(one['unpaired'])}: "
                "its tasks were not measured on the same examples.",
                highlight=False,
            )


def _row(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row = {key: run[key] for key in ("run", "seed", "releases")}
    for group in ("seen", "unseen"):
        if any(one[group] is not None for one in runs):
            row[group] = _points(run[group])
            row[f"{group} gain"] = _points(run[f"{group}_gain"], "+")
    row["accepted"] = run["accepted"]
    row |= {key: run[key] for key in OUTCOMES if any(one[key] for one in runs)}
    return {**row, "seconds": f"{run['seconds']:.0f}", "memory": size(run["peak_bytes"])}


def _points(value: float | None, sign: str = "") -> str | None:
    return None if value is None else f"{value:{sign}.1f}"


def _difference(one: dict[str, Any]) -> dict[str, Any]:
    row = {"run": one["run"], "against": one["against"]}
    for group in ("seen", "unseen"):
        found = one[group]
        if found:
            error = found["standard_error"]
            spread = "" if error is None else f" ± {error:.1f}"
            row[group] = f"{found['mean']:+.1f}{spread}"
            row[f"{group} tasks"] = f"{found['wins']} up, {found['losses']} down"
    return row
