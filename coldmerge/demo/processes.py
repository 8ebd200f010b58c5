"""The demo's processes: each is `coldmerge …` with a log of its own, and is ended by handle."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from coldmerge.core.errors import UnavailableError
from coldmerge.demo import child

COLDMERGE = (sys.executable, "-m", "coldmerge")
TAIL_LINES = 25
GRACE = 10.0
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""One thread each: there are more processes than processors."""


@dataclass
class Running:
    """One process, what was typed to start it, and where it writes."""

    name: str
    command: str
    log: Path
    handle: subprocess.Popen[bytes]

    def failed(self) -> bool:
        """It ended, and not well."""
        return self.handle.poll() not in (None, 0)

    def tail(self) -> str:
        """The last lines it wrote."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-TAIL_LINES:])

    def end(self) -> None:
        """Ask it to end, then make it."""
        if self.handle.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.handle.terminate()
        try:
            self.handle.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.handle.kill()
            self.handle.wait()


def spawn(
    command: Sequence[str], out: IO[bytes], env: Mapping[str, str], nice: int = 0
) -> subprocess.Popen[bytes]:
    """Start a program that ends when this process does; all that it says goes to `out`."""
    before = [sys.executable, child.__file__, str(os.getpid()), str(nice)]
    return subprocess.Popen(  # noqa: S603 - commands of our own making
        [*before, *command],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, **env},
        start_new_session=True,
    )


@dataclass
class Processes:
    """Starts processes, notices when one fails, and ends all that are left on leaving."""

    logs: Path
    commands: list[str] = field(default_factory=list)
    _running: list[Running] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running:
            if running.handle.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    running.handle.terminate()
        for running in reversed(self._running):
            running.end()

    def start(
        self, name: str, *arguments: str | Path, env: Mapping[str, str] | None = None, nice: int = 0
    ) -> Running:
        """Start `coldmerge ARGUMENTS`; it writes to the log of `name`."""
        words = [str(argument) for argument in arguments]
        typed = shlex.join(["coldmerge", *words])
        self.commands.append(typed)
        log = self.logs / f"{name}.log"
        with log.open("ab") as out:
            out.write(f"$ {typed}\n".encode())
            out.flush()
            handle = spawn([*COLDMERGE, *words], out, {**QUIET, **(env or {})}, nice)
        running = Running(name, typed, log, handle)
        self._running.append(running)
        return running

    def finish(self, running: Running, seconds: float) -> None:
        """Wait for a process to end well.

        Raises:
            UnavailableError: it failed, or takes longer than `seconds`.

        """
        try:
            running.handle.wait(seconds)
        except subprocess.TimeoutExpired as error:
            running.end()
            raise _ended(running, f"did not finish within {seconds:.0f} s") from error
        self.check([running])

    def answer(self, name: str, *arguments: str | Path, seconds: float = 120) -> Any:
        """Run a command with `--format json` and read what it prints.

        Raises:
            UnavailableError: it failed.

        """
        running = self.start(name, *arguments, "--format", "json")
        self.finish(running, seconds)
        written = running.log.read_text(encoding="utf-8").rpartition(f"$ {running.command}")[2]
        return json.JSONDecoder().raw_decode(written, written.index("\n{") + 1)[0]

    def check(self, some: Iterable[Running]) -> None:
        """Raise if one of these has failed.

        Raises:
            UnavailableError: with the end of its log.

        """
        for running in some:
            if running.failed():
                raise _ended(running, f"ended with status {running.handle.returncode}")


def _ended(running: Running, how: str) -> UnavailableError:
    return UnavailableError(
        "demo.process_failed",
        f"The process {running.name} of the demo {how}. Its last lines:\n{running.tail()}",
        hint=f"With --keep DIR all logs stay, this one as logs/{running.log.name}.",
        command=running.command,
        process=running.name,
    )
