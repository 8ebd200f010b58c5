"""`coldmerge coordinator serve`: listeners, driver and merge worker, until told to stop.

Or only some of them: they talk through the database alone, and may run as several replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ConfigError
from coldmerge.core.files import fsync_path
from coldmerge_coordinator import replica
from coldmerge_coordinator.driver import Driver
from coldmerge_coordinator.limits import raise_descriptor_limit
from coldmerge_coordinator.logs import log_to_stderr
from coldmerge_coordinator.servers import Servers
from coldmerge_coordinator.store import Store
from coldmerge_coordinator.worker import work

RUN_FILE = "run.json"
DRIVER_EVERY = 0.5
WORKER_GRACE = 4.0
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
HEALTHY_AFTER = 60.0

log = structlog.get_logger(__name__)


def serve(folder: Path, *, only: Collection[str] = (), clock: Clock | None = None) -> None:
    """Run the coordinator of `folder`, or `only` these parts of it, until SIGTERM or SIGINT.

    Prints one line when it is ready. The API writes its addresses to `run.json`.

    Raises:
        ConfigError: there is no coordinator there, it cannot listen, or no such part.
        ConflictError: another process runs one of the parts in this folder.
    """
    parts = _parts(only)
    os.umask(0o077)
    log_to_stderr()
    raise_descriptor_limit()
    with Store.open(folder) as store, ExitStack() as locks:
        for part in parts:
            # A worker beside other parts is a process of its own, and takes the lock itself.
            if part != replica.WORKER or parts == [replica.WORKER]:
                locks.enter_context(replica.only_process(folder, part))
        if parts == [replica.WORKER]:
            _say_ready(store, replica.WORKER)
            work(store, clock or SystemClock())
        else:
            asyncio.run(_serve(store, clock or SystemClock(), parts))


def _parts(only: Collection[str]) -> list[str]:
    unknown = sorted(set(only) - set(replica.PARTS))
    if unknown:
        raise ConfigError(
            "serve.unknown_part",
            f"A coordinator has no part {unknown[0][:40]!r}.",
            expected=", ".join(replica.PARTS),
            got=unknown[0][:40],
            hint="See `coldmerge coordinator serve --help`.",
        )
    return [part for part in replica.PARTS if not only or part in only]


async def _serve(store: Store, clock: Clock, parts: Sequence[str]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    running = _Running(store, clock, parts)
    try:
        await running.start()
        await stop.wait()
        log.info("serve.stopping")
    finally:
        await running.stop()


class _Running:
    """The parts that run in this process, and the worker beside them."""

    def __init__(self, store: Store, clock: Clock, parts: Sequence[str]) -> None:
        self._store, self._parts = store, parts
        self._servers = Servers(store, clock) if replica.API in parts else None
        self._driver = _DriverThread(store, clock) if replica.DRIVER in parts else None
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._servers is not None:
            await self._servers.start()
        if self._driver is not None:
            self._driver.start()
        if replica.WORKER in self._parts:
            self._worker = asyncio.create_task(_supervise(self._store.folder))
        if self._servers is not None:
            _announce(self._store, self._servers)
        else:
            _say_ready(self._store, ", ".join(self._parts))

    async def stop(self) -> None:
        """All of them at once: each may take a while to finish what it has begun."""
        if self._driver is not None:
            self._driver.ask_to_stop()
        if self._worker is not None:
            self._worker.cancel()
        if self._servers is not None:
            (self._store.folder / RUN_FILE).unlink(missing_ok=True)
            await self._servers.stop()
        if self._worker is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        if self._driver is not None:
            await asyncio.to_thread(self._driver.join)


def _announce(store: Store, servers: Servers) -> None:
    state = {
        "pid": os.getpid(),
        "federation": store.federation,
        "api": servers.addresses.api,
        "enrol": servers.addresses.enrol,
        "socket": str(servers.socket.absolute()),
    }
    temporary = store.folder / f".{RUN_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(state, sort_keys=True) + "\n", encoding="utf-8")
    fsync_path(temporary)
    temporary.rename(store.folder / RUN_FILE)
    fsync_path(store.folder)
    _say_ready(store, f"api {servers.addresses.api}, enrolment {servers.addresses.enrol}")


def _say_ready(store: Store, what: str) -> None:
    sys.stdout.write(f"coldmerge coordinator {store.federation} is ready: {what}\n")
    sys.stdout.flush()


class _DriverThread:
    """Calls the driver's `step`, which blocks, twice a second on a thread of its own."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._driver = Driver(store, clock)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coldmerge-driver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(DRIVER_EVERY):
            try:
                self._driver.step()
            except Exception:
                log.exception("driver.failed")
        try:
            self._driver.close()
        except Exception:
            log.exception("driver.failed")

    def ask_to_stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        """Wait, but not for a webhook that hangs: a step may be cut off at any point."""
        if self._thread.is_alive():
            self._thread.join(WORKER_GRACE)


async def _supervise(folder: Path) -> None:
    """Keep one merge worker running; end it when cancelled."""
    backoff = FIRST_BACKOFF
    while True:
        started = time.monotonic()
        try:
            status: object = await _run_worker(folder)
        except OSError as error:  # no memory, processes or descriptors are left just now
            status = str(error)
        lived = time.monotonic() - started
        backoff = FIRST_BACKOFF if lived > HEALTHY_AFTER else min(2 * backoff, LONGEST_BACKOFF)
        log.error("worker.died", exit_status=status, lived=round(lived, 1), restart_in=backoff)
        await asyncio.sleep(backoff)


async def _run_worker(folder: Path) -> int:
    """The exit status of one worker."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "coldmerge_coordinator.worker",
        str(folder),
        "--parent",
        str(os.getpid()),
        stdin=asyncio.subprocess.DEVNULL,
    )
    try:
        return await process.wait()
    except asyncio.CancelledError:
        await _end(process)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), WORKER_GRACE)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
