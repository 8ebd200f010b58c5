"""`coldmerge simulate`: a federation of simulated contributors, for researchers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coldmerge.cli.output import Format, FormatOption, bars, out, print_json, print_rows

if TYPE_CHECKING:
    from coldmerge_simulation import Simulation


def register(app: typer.Typer) -> None:
    """Add this verb to the root command."""
    app.command(epilog="Example: coldmerge simulate examples/simulate.yaml --engine ray")(simulate)


def simulate(
    config: Annotated[Path, typer.Argument(help="The simulation, as docs/simulation.md says.")],
    engine: Annotated[
        str,
        typer.Option(
            help="`local`: this process; `ray`: Flower's simulation runtime; `federation`: "
            "SuperLink and SuperNodes."
        ),
    ] = "local",
    seed: Annotated[
        int | None, typer.Option(help="Instead of the one in the file.", min=0, max=2**31 - 1)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="The run's folder. [default: runs/NAME-SEED]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in the folder.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,…",
            help="Run it with each of these values, such as round.merge.method=mean,ties; given "
            "several times, with all combinations. A sweep goes on where it stopped.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Run everything this often, with seed, seed+1, …")
    ] = 1,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Simulate many contributors with the real coordinator, on this machine or a cluster.

    A run that was killed goes on with `--resume` and comes to the same digests; every engine
    comes to the same digests for the same seed.
    """
    if sweep or seeds > 1:
        from coldmerge.cli.sweep import run_sweep

        texts = sweep or []
        raise typer.Exit(
            run_sweep(config, texts, seeds=seeds, seed=seed, engine=engine, folder=folder, fmt=fmt)
        )
    from coldmerge_simulation import simulate as run

    with bars(fmt) as progress:
        found = run(config, engine=engine, seed=seed, out=folder, resume=resume, progress=progress)
    if fmt is Format.JSON:
        print_json(found.values)
    else:
        _show(found)


def _show(found: Simulation) -> None:
    lines = {line["release"]: line for line in found.values["rounds"] if line["release"]}
    rows = [
        {
            "release": row["number"],
            "digest": row["digest"],
            "round": row["round"],
            "accepted": row["accepted"],
            "refused": row["refused"],
            "failed": len(lines.get(row["number"], {}).get("failed", ())),
            "late": len(lines.get(row["number"], {}).get("late", ())),
            "seen": (row["seen"] or {}).get("mean"),
            "unseen": (row["unseen"] or {}).get("mean"),
        }
        for row in found.values["releases"]
    ]
    print_rows(rows, Format.TABLE, empty="There is no release.")
    for line in found.values["rounds"]:
        if line["release"] is None:
            out.print(f"Round {line['round']}: {line['state']}: {line['reason']}", highlight=False)
    seconds, peak = found.values["seconds"], found.values["peak_bytes"] / 1e6
    out.print(f"Took {seconds:.0f} s; at most {peak:.0f} MB. Run: {found.folder}", highlight=False)
