"""Coordinators that start in a fraction of a second: forked from a process that has imported them.

Half a thousand restarts, and a coordinator for each test of a client, would spend their time
importing. `python -m tests.zygote`
reads one JSON request a line and answers each with one: `serve` and `work` fork a child
that runs the real entry point, `wait` reaps it. The worker is a child of this process, not
of the API's, as in a deployment with separate units; kill it with its group or on its own. It
looks every second, not every half a minute, whether a full disk has space again.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.federation import environment

ROOT = Path(__file__).parents[1]
IMPORTED = ("alembic.command", "coldmerge_coordinator.serve", "coldmerge_coordinator.worker")


class Zygote:
    """The process to fork from. Close it: every child it still has dies with it.

    `before` goes in front of its command line, such as a tracer.
    """

    def __init__(self, *before: str, **extra: str) -> None:
        paths = [str(ROOT), *sys.path]
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env=environment(PYTHONPATH=os.pathsep.join(filter(None, paths)), **extra),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask()

    def _ask(self, **request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the zygote has ended"
        return json.loads(answer)

    def serve(self, folder: Path, log: Path) -> int:
        """The API and the driver: its process, which leads a group of its own."""
        return int(self._ask(run="serve", folder=str(folder), log=str(log)))

    def work(self, folder: Path, log: Path, group: int) -> int:
        """A merge worker in the group of an API process."""
        return int(self._ask(run="work", folder=str(folder), log=str(log), group=group))

    def wait(self, pid: int) -> int:
        """How a child ended: its exit status, or the negative number of a signal."""
        return int(self._ask(run="wait", pid=pid))

    def close(self) -> None:
        """End the process, and what it has forked."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _serve(folder: Path) -> None:
    from coldmerge_coordinator import serve

    async def nobody(folder: Path) -> None:
        await asyncio.Event().wait()

    serve._supervise = nobody
    serve.serve(folder)


def _work(folder: Path) -> None:
    from coldmerge_coordinator import worker

    worker.RETRY_FULL = timedelta(seconds=1)
    worker.main([str(folder)])


def _fork(run: Callable[[Path], None], request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        # Here as well as in the child: who comes next may want to join the group at once.
        with suppress(OSError):
            os.setpgid(pid, request.get("group", 0))
        return pid
    status = 1
    try:
        with suppress(OSError):
            os.setpgid(0, request.get("group", 0))
        for number, path in ((0, os.devnull), (1, request["log"]), (2, request["log"])):
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(fd, number)
            os.close(fd)
        run(Path(request["folder"]))
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of the parent may run in the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _answer(request: dict[str, Any], children: set[int]) -> int:
    kind = request.get("run")
    if kind == "wait":
        _, status = os.waitpid(request["pid"], 0)
        children.discard(request["pid"])
        return os.waitstatus_to_exitcode(status)
    if kind in ("serve", "work"):
        pid = _fork(_serve if kind == "serve" else _work, request)
        children.add(pid)
        return pid
    return 0


def main() -> None:
    """Answer until standard input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    children: set[int] = set()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(f"{_answer(json.loads(line), children)}\n")
        answers.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
