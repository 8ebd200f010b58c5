"""Whether the parts of a coordinator run in a folder, asked from beside them."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge.wire.channel import local_channel
from coldmerge_coordinator.replica import API, PARTS

SECONDS = 5.0
_LOCKS = Path("/proc/locks")


def check(folder: Path, parts: tuple[str, ...] = (API,)) -> None:
    """Ask the API for its health over the admin's socket; look whether the others hold their lock.

    Locks are seen within one container or machine: ask where the part runs.

    Raises:
        UnavailableError: one of them does not run, or does not serve.
        ConfigError: no such part.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(
                "health.unknown_part",
                f"A coordinator has no part {part[:40]!r}.",
                expected=", ".join(PARTS),
                hint="See `coldmerge coordinator health --help`.",
            )
        problem = _api(folder) if part == API else _locked(folder / f"{part}.lock")
        if problem:
            raise UnavailableError(
                "health.not_serving",
                f"The {part} of {folder} does not serve.",
                got=problem,
                hint="Look at its log; start it with `coldmerge coordinator serve`.",
            )


def _api(folder: Path) -> str:
    with local_channel(folder / "admin.sock") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            return str(error.code().name)
    serving = health_pb2.HealthCheckResponse.SERVING
    return "" if answer.status == serving else "it is stopping"


def _locked(lock: Path) -> str:
    """Read only: a lock that is tried for a moment could keep the part itself from starting."""
    try:
        inode = lock.stat().st_ino
    except OSError:
        return "it never ran here"
    held = any(line.split()[5].endswith(f":{inode}") for line in _LOCKS.read_text().splitlines())
    return "" if held else "nobody holds its lock"
