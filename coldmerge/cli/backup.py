"""`coldmerge coordinator backup`, `restore`, `verify`: keeping a coordinator elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coldmerge.cli.local import FolderArgument, coordinator_folder
from coldmerge.cli.output import (
    Format,
    FormatOption,
    bars,
    err,
    out,
    print_json,
    print_record,
    print_rows,
)
from coldmerge.core.errors import IntegrityError


def register(group: typer.Typer) -> None:
    """Add these verbs to `coldmerge coordinator`."""
    group.command(epilog="Example: coldmerge coordinator backup ./hub /mnt/backup/hub")(backup)
    group.command(epilog="Example: coldmerge coordinator restore /mnt/backup/hub ./hub")(restore)
    group.command(epilog="Example: coldmerge coordinator verify ./hub --format json")(verify)


def backup(
    folder: FolderArgument,
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new folder, or an earlier backup to renew.")
    ],
    keys: Annotated[
        bool, typer.Option("--keys/--no-keys", help="Copy the private keys of `keys/` as well.")
    ] = True,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Copy everything a coordinator knows: rows, releases, contributions, keys. It may be serving.

    A backup into the same folder copies only what is new. The root key in `offline/` is never
    copied.
    """
    from coldmerge_coordinator.backup import make
    from coldmerge_coordinator.store import Store

    with Store.open(coordinator_folder(folder)) as store, bars(fmt) as progress:
        made = make(store, target, keys=keys, progress=progress)
    print_record(
        {
            "folder": str(target),
            "blobs": made.blobs,
            "contributions": made.contributions,
            "copied_bytes": made.copied_bytes,
        },
        fmt,
    )
    if fmt is Format.TABLE and keys:
        err.print("The backup holds private keys: keep it as safe as the coordinator itself.")


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="Made by `coordinator backup`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to create.")],
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="An empty database to restore into, if not the configuration's."
        ),
    ] = None,
    blobs: Annotated[
        str | None,
        typer.Option(help="Where tensors go, if not where the configuration says: PATH, s3://…"),
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Make a coordinator of a backup, after comparing every hash. Stop the old one first."""
    from coldmerge_coordinator.backup import restore as run

    with bars(fmt) as progress:
        index = run(source, folder, database_url=database, blobs=blobs, progress=progress)
    print_record(
        {
            "folder": str(folder),
            "federation": index.federation,
            "as_of": index.created_at.isoformat(),
            "blobs": index.blobs,
            "keys": index.keys,
        },
        fmt,
    )
    if fmt is Format.TABLE:
        if not index.keys:
            err.print(f"The backup has no private keys: put them into {folder / 'keys'}.")
        out.print(f"Next: coldmerge coordinator serve {folder}", highlight=False)


def verify(folder: FolderArgument, fmt: FormatOption = Format.TABLE) -> None:
    """Read everything a coordinator keeps and compare every hash, signature and chain.

    Exits 10 if something is missing or damaged, and names all of it.
    """
    from coldmerge_coordinator.backup import verify as run
    from coldmerge_coordinator.store import Store

    with Store.open(coordinator_folder(folder)) as store, bars(fmt) as progress:
        findings = run(store, progress)
    problems: list[dict[str, object]] = [
        {"kind": found.kind, "name": found.name, "problem": found.problem}
        for found in findings.problems
    ]
    if fmt is Format.JSON:
        print_json({"checked": findings.checked, "problems": problems})
    else:
        counts = ", ".join(f"{count} of {kind}" for kind, count in findings.checked.items())
        out.print(f"Checked: {counts}.", highlight=False)
        print_rows(problems, fmt, empty="Everything is there, and as it was signed.")
    if problems:
        raise typer.Exit(IntegrityError.exit_status)
