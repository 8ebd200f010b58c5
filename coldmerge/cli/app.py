"""The root command, and how every error becomes a sentence and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from coldmerge.cli import (
    audit,
    compare,
    contributions,
    contributor,
    coordinator,
    demo,
    extract,
    merge,
    models,
    people,
    releases,
    rounds,
    screening,
    simulate,
    weights,
)
from coldmerge.cli.output import Format, fail, out
from coldmerge.core.errors import ColdmergeError, ConfigError

app = typer.Typer(
    name="coldmerge",
    help="Organizations improve one shared model together without ever sharing data.",
    epilog="Start with: coldmerge demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
_GROUPS = (
    merge,
    weights,
    extract,
    coordinator,
    models,
    people,
    rounds,
    screening,
    releases,
    contributor,
    contributions,
    audit,
    demo,
    simulate,
    compare,
)
for group in _GROUPS:
    group.register(app)


def _version(asked: bool) -> None:
    if asked:
        from coldmerge import __version__

        out.print(f"coldmerge {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    remote: Annotated[
        bool,
        typer.Option(
            "--remote",
            envvar="COLDMERGE_REMOTE",
            show_envvar=True,
            help="Steer the coordinator from here, over the network: as the enrolled machine of "
            "COLDMERGE_HOME, whose organization has the role admin.",
        ),
    ] = False,
) -> None:
    """Organizations improve one shared model together without ever sharing data."""


def main() -> None:
    """Run the command line; exit with the status of the error's class (docs/errors.md)."""
    # Threads that spin while they wait starve the other processes of a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except ColdmergeError as error:
        asked_json = "--format=json" in sys.argv or any(
            (a, b) == ("--format", "json") for a, b in zip(sys.argv, sys.argv[1:], strict=False)
        )
        sys.exit(fail(error, Format.JSON if asked_json else Format.TABLE))
    except OSError as error:
        if error.filename is None:
            raise
        refused = ConfigError(
            "file.refused",
            f"The system refused a file or folder: {error.strerror}.",
            hint="Check the path, and with `ls -ld` who may read and write there.",
            path=error.filename,
        )
        sys.exit(fail(refused, Format.TABLE))
