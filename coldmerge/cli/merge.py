"""`coldmerge merge`, `methods`: merging model folders on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coldmerge.cli.output import Format, FormatOption, bars, err, print_record

PANEL = "Merging"


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.command(
        epilog="Example: coldmerge merge plan.yaml merged --models ~/models",
        rich_help_panel=PANEL,
    )(merge)


def merge(
    plan: Annotated[Path, typer.Argument(help="What to merge and how, in mergekit's YAML.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.")],
    models: Annotated[
        Path | None,
        typer.Option(help="Where models lie that the plan names `owner/name`."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many. Default: one per processor.")
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Merge models as a plan says, into a new model folder."""
    from coldmerge.merging.plan import Opened, load, run

    read = load(plan)
    with Opened(read, models) as opened:
        for note in opened.notes:
            err.print(f"note: {note}", highlight=False)
        with bars(fmt) as progress:
            content = run(read, opened, folder, threads=threads, progress=progress)
    print_record(
        {
            "folder": str(folder),
            "method": read.method.name,
            "inputs": [item.label for item in opened.inputs],
            "tensors": len(content.tensors),
            "bytes": sum(entry.nbytes for entry in content.tensors),
            "digest": content.digest,
        },
        fmt,
    )
