"""The admin's two doors: the Unix socket in the coordinator's folder, or, with `--remote`, the
API port and the certificate of a machine with the role admin. There is no third.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from coldmerge.core.errors import ConfigError, UnavailableError

DirOption = Annotated[
    Path,
    typer.Option(
        "--dir",
        envvar="COLDMERGE_DIR",
        help="The coordinator's folder.",
        show_envvar=True,
    ),
]
DEFAULT_DIR = Path("coordinator")
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Made by `coordinator init`.")]
PANEL = "Coordinator"


@dataclass(frozen=True)
class Local:
    """Stubs over the admin's connection."""

    admin: Any
    models: Any
    rounds: Any
    screening: Any


def coordinator_folder(folder: Path) -> Path:
    """`folder`, if a coordinator was made there.

    Raises:
        ConfigError: there is none, or `--remote` was asked for.
    """
    if is_remote():
        raise ConfigError(
            "coordinator.works_on_files",
            "This command works on the files of the coordinator's folder.",
            expected="a shell on the coordinator's machine",
            got="--remote",
            hint="Run it there, with --dir.",
        )
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            "coordinator.not_here",
            f"{folder} holds no coordinator.",
            expected="a folder made by `coldmerge coordinator init`",
            got="a folder without config.yaml" if folder.is_dir() else "no such folder",
            hint="Name it with --dir, or set COLDMERGE_DIR.",
        )
    return folder


def is_remote() -> bool:
    """Whether `coldmerge --remote` was typed."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get("remote"))


def ask(method: Any, request: object) -> Any:
    """One call: it answers at once or not at all.

    Raises:
        ColdmergeError: what the coordinator answered.
    """
    from coldmerge.wire.calls import call

    return call(method, request, patience=0)


@contextmanager
def local(folder: Path) -> Iterator[Local]:
    """Connect to the coordinator that serves `folder`; with `--remote`, to that of our home.

    Raises:
        UnavailableError: nothing serves it.
        ConfigError: with `--remote`, the home has not joined a federation.
    """
    if is_remote():
        from coldmerge_client.home import Home
        from coldmerge_client.session import Session

        with Session.open(Home.default()) as session:
            yield _stubs(session.channel())
        return
    from coldmerge.wire.channel import local_channel

    socket = coordinator_folder(folder) / "admin.sock"
    if not socket.exists():
        raise UnavailableError(
            "coordinator.not_running",
            f"No coordinator is serving {folder}.",
            hint=f"Start it: coldmerge coordinator serve {folder}",
        )
    with local_channel(socket) as channel:
        yield _stubs(channel)


def _stubs(channel: Any) -> Local:
    from coldmerge.wire.v1 import (
        admin_pb2_grpc,
        models_pb2_grpc,
        rounds_pb2_grpc,
        screening_pb2_grpc,
    )

    return Local(
        admin_pb2_grpc.AdminStub(channel),  # type: ignore[no-untyped-call]
        models_pb2_grpc.ModelsStub(channel),  # type: ignore[no-untyped-call]
        rounds_pb2_grpc.RoundsStub(channel),  # type: ignore[no-untyped-call]
        screening_pb2_grpc.ScreeningStub(channel),  # type: ignore[no-untyped-call]
    )
