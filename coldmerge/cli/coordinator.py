"""`coldmerge coordinator`: make a coordinator's folder, and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coldmerge.cli import backup, rotation
from coldmerge.cli.local import PANEL, FolderArgument, coordinator_folder
from coldmerge.cli.output import Format, FormatOption, err, out, print_record

group = typer.Typer(
    help="Make, run, back up and check a coordinator.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    backup.register(group)
    group.add_typer(rotation.group, name="rotate")
    app.add_typer(group, name="coordinator", rich_help_panel=PANEL)


@group.command(epilog="Example: coldmerge coordinator init ./hub --host merge.example.org")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to create.")],
    federation: Annotated[
        str | None, typer.Option(help="Name of the federation. Default: the folder's name.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name contributors reach this machine by. Repeatable."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="mTLS port; 0: any free one.")] = 7443,
    enrol_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Enrolment port; 0: any free one.")
    ] = 7444,
    listen: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: every network.")
    ] = "127.0.0.1",
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A PostgreSQL database, such as postgresql+psycopg://coldmerge@db/coldmerge; "
            "give its password in a file: …?passfile=/run/secrets/pgpass. Default: SQLite in DIR.",
        ),
    ] = None,
    blobs: Annotated[
        str | None,
        typer.Option(help="Where tensors go: s3://bucket/prefix, or a path. Default: DIR/blobs."),
    ] = None,
    s3_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="The S3 server. Default: Amazon's.")
    ] = None,
    s3_region: Annotated[str | None, typer.Option(help="Its region. Default: us-east-1.")] = None,
    s3_access_key_file: Annotated[
        Path | None,
        typer.Option(help="File that holds the access key. Default: the AWS_* variables."),
    ] = None,
    s3_secret_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the secret key.")
    ] = None,
    s3_allow_http: Annotated[
        bool, typer.Option("--s3-allow-http", help="Allow plain HTTP: on loopback only.")
    ] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Make keys, certificates, configuration and an empty database in DIR."""
    from coldmerge_coordinator.config import BLOBS, SQLITE
    from coldmerge_coordinator.setup import init as make

    made = make(
        folder,
        federation=federation,
        hosts=tuple(host or ("localhost",)),
        listen=f"{listen}:{port}",
        enrol_listen=f"{listen}:{enrol_port}",
        database_url=database or SQLITE,
        blobs=blobs or BLOBS,
        s3={
            "endpoint": s3_endpoint,
            "region": s3_region,
            "access_key_file": s3_access_key_file and s3_access_key_file.resolve(),
            "secret_key_file": s3_secret_key_file and s3_secret_key_file.resolve(),
            "allow_http": s3_allow_http or None,
        },
    )
    print_record(
        {
            "folder": str(folder),
            "federation": made.federation,
            "fingerprint": made.fingerprint,
            "offline_key": str(made.offline_key),
        },
        fmt,
    )
    if fmt is Format.TABLE:
        err.print(
            "The root key is needed only to replace the intermediate certificate: move "
            f"{made.offline_key.parent} to a disk that stays offline.",
            highlight=False,
        )
        out.print(f"Next: coldmerge coordinator serve {folder}", highlight=False)


@group.command(epilog="Example: coldmerge coordinator serve ./hub --only api --only driver")
def serve(
    folder: FolderArgument,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART", help="Run only api, driver or worker. Repeatable. Default: all."
        ),
    ] = None,
) -> None:
    """Run API, driver and merge worker until SIGTERM or Ctrl-C."""
    from coldmerge_coordinator.serve import serve as run

    run(folder, only=only or ())


@group.command(epilog="Example: coldmerge coordinator gc ./hub --dry-run")
def gc(
    folder: FolderArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")
    ] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Remove garbage, and what the retention settings let go. A running coordinator does, too."""
    from coldmerge.core.clock import SystemClock
    from coldmerge_coordinator.retention import summary
    from coldmerge_coordinator.store import Store

    with Store.open(coordinator_folder(folder)) as store:
        removed = summary(store, SystemClock().now(), dry_run=dry_run)
    print_record({"dry_run": dry_run, **removed}, fmt)


@group.command(epilog="Example: coldmerge coordinator health ./hub --only api")
def health(
    folder: FolderArgument,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="api, driver or worker. Repeatable. Default: api."),
    ] = None,
) -> None:
    """Succeed if the coordinator of DIR serves. For health checks, beside the process."""
    from coldmerge_coordinator.alive import check

    check(coordinator_folder(folder), tuple(only or ("api",)))
    out.print("serving", highlight=False)
