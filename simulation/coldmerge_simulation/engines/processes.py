"""Flower's own programs, started for one run and ended with it, each with a log of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

from coldmerge.core.errors import UnavailableError
from coldmerge.demo.processes import QUIET, Running, spawn
from coldmerge_simulation.flower.compat import OFFLINE

POLL_SECONDS = 0.1
_ENVIRONMENT = {
    **QUIET,
    **OFFLINE,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


class Programs:
    """A context manager: on leaving, whatever still runs is ended."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs = logs
        here = str(Path(sys.executable).parent)
        path = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
        self._environment = {**_ENVIRONMENT, "PATH": path, **environment}
        self._running: list[Running] = []

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for running in reversed(self._running):
            running.end()

    def start(self, name: str, program: str, *arguments: str | Path) -> Running:
        """Start one of the programs that came with Flower; it ends when this process does."""
        command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
        log = self.logs / f"{name}.log"
        with log.open("wb") as out:
            handle = spawn(command, out, self._environment)
        running = Running(name, " ".join([program, *map(str, arguments)]), log, handle)
        self._running.append(running)
        return running

    def finish(self, running: Running, seconds: float) -> str:
        """Wait for a program to end well: what it wrote.

        Raises:
            UnavailableError: it failed, or takes longer.
        """
        try:
            status = running.handle.wait(seconds)
        except subprocess.TimeoutExpired as error:
            running.end()
            raise ended(running, f"did not finish within {seconds:g} s") from error
        if status:
            raise ended(running, f"ended with status {status}")
        return running.log.read_text(encoding="utf-8", errors="replace")

    def until(self, what: str, probe: Callable[[], bool], running: Running, seconds: float) -> None:
        """Wait until `probe` says yes.

        Raises:
            UnavailableError: the program ended before that, or it takes longer.
        """
        deadline = time.monotonic() + seconds
        while not probe():
            if running.handle.poll() is not None:
                raise ended(running, f"ended with status {running.handle.returncode}")
            if time.monotonic() > deadline:
                raise ended(running, f"had not {what} after {seconds:g} s")
            time.sleep(POLL_SECONDS)


def ended(running: Running, how: str) -> UnavailableError:
    """The error of a program that did not do what it was started for."""
    return UnavailableError(
        "simulation.program_failed",
        f"Flower's {running.command.split()[0]} {how}. Its last lines:\n{running.tail()}",
        hint="Look at its whole log. If a port was taken, run the command again.",
        log=running.log,
    )


def free_ports(count: int) -> Sequence[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(found.getsockname()[1]) for found in sockets]
    finally:
        for found in sockets:
            found.close()


def answers(host: str, port: int, seconds: float = 2.0) -> bool:
    """Whether somebody listens there."""
    try:
        with closing(socket.create_connection((host, port), seconds)):
            return True
    except OSError:
        return False
