"""The admin's door: the Unix socket in the coordinator's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
PANEL = "Coordinator"


@dataclass(frozen=True)
class Local:
    """Stubs over the coordinator's Unix socket."""

    admin: Any
    models: Any
    rounds: Any


def coordinator_folder(folder: Path) -> Path:
    """`folder`, if a coordinator was made there.

    Raises:
        ConfigError: there is none.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            "coordinator.not_here",
            f"{folder} holds no coordinator.",
            expected="a folder made by `coldmerge coordinator init`",
            got="a folder without config.yaml" if folder.is_dir() else "no such folder",
            hint="Name it with --dir, or set COLDMERGE_DIR.",
        )
    return folder


def ask(method: Any, request: object) -> Any:
    """One call on the socket: it answers at once or not at all.

    Raises:
        ColdmergeError: what the coordinator answered.
    """
    from coldmerge.wire.calls import call

    return call(method, request, patience=0)


@contextmanager
def local(folder: Path) -> Iterator[Local]:
    """Connect to the coordinator that serves `folder`.

    Raises:
        UnavailableError: nothing serves it.
    """
    from coldmerge.wire.channel import local_channel
    from coldmerge.wire.v1 import admin_pb2_grpc, models_pb2_grpc, rounds_pb2_grpc

    socket = coordinator_folder(folder) / "admin.sock"
    if not socket.exists():
        raise UnavailableError(
            "coordinator.not_running",
            f"No coordinator is serving {folder}.",
            hint=f"Start it: coldmerge coordinator serve {folder}",
        )
    with local_channel(socket) as channel:
        yield Local(
            admin_pb2_grpc.AdminStub(channel),  # type: ignore[no-untyped-call]
            models_pb2_grpc.ModelsStub(channel),  # type: ignore[no-untyped-call]
            rounds_pb2_grpc.RoundsStub(channel),  # type: ignore[no-untyped-call]
        )
