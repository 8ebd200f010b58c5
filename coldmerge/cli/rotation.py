"""`coldmerge coordinator rotate`: new keys for a coordinator that goes on serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coldmerge.cli.local import FolderArgument, coordinator_folder
from coldmerge.cli.output import Format, FormatOption, err, print_record

group = typer.Typer(
    help="Replace keys and certificates. The coordinator may be running.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@group.command(
    epilog="Example: coldmerge coordinator rotate intermediate ./hub --root-key offline/root.key"
)
def intermediate(
    folder: FolderArgument,
    root_key: Annotated[
        Path,
        typer.Option(help="The offline root key: `coordinator init` put it into offline/root.key."),
    ],
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Make a new intermediate certificate. Certificates by the old one hold until they expire."""
    from coldmerge_coordinator.rotation import rotate_intermediate

    made = rotate_intermediate(coordinator_folder(folder), root_key)
    print_record({"serial": made.serial, "expires_at": made.expires_at.isoformat()}, fmt)
    if fmt is Format.TABLE:
        err.print(
            "Running coordinators take it at their next handshake. Put the root key back offline; "
            f"copy {folder}/keys/intermediate.key and {folder}/ca/intermediate.pem to replicas.",
            highlight=False,
        )


@group.command(epilog="Example: coldmerge coordinator rotate signing ./hub")
def signing(folder: FolderArgument, fmt: FormatOption = Format.TABLE) -> None:
    """Make a new signing key, announced by a statement that the old one signs."""
    from coldmerge_coordinator.rotation import rotate_signing

    statement = rotate_signing(coordinator_folder(folder))
    print_record(
        {
            "number": statement.number,
            "public_key": statement.public_key,
            "previous": statement.previous,
        },
        fmt,
    )
    if fmt is Format.TABLE:
        err.print(f"Copy {folder}/keys/signing.key to replicas.", highlight=False)
