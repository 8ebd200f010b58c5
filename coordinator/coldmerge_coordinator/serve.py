"""`coldmerge coordinator serve`: listeners, driver and merge worker, until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ConflictError
from coldmerge.core.files import fsync_path
from coldmerge_coordinator.driver import Driver
from coldmerge_coordinator.limits import raise_descriptor_limit
from coldmerge_coordinator.logs import log_to_stderr
from coldmerge_coordinator.servers import Servers
from coldmerge_coordinator.store import Store

LOCK = "serve.lock"
RUN_FILE = "run.json"
DRIVER_EVERY = 0.5
WORKER_GRACE = 4.0
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
HEALTHY_AFTER = 60.0

log = structlog.get_logger(__name__)


def serve(folder: Path, *, clock: Clock | None = None) -> None:
    """Run the coordinator of `folder` until SIGTERM or SIGINT.

    Prints one line when it is ready, and writes the addresses to `run.json`.

    Raises:
        ConfigError: there is no coordinator there, or it cannot listen.
        ConflictError: another process serves the folder.
    """
    os.umask(0o077)
    log_to_stderr()
    raise_descriptor_limit()
    with Store.open(folder) as store, _only_server(folder):
        asyncio.run(_serve(store, clock or SystemClock()))


@contextmanager
def _only_server(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it however this process ends."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                "serve.already_running",
                f"Another process serves {folder}.",
                hint=f"Its addresses are in {folder / RUN_FILE}; stop it with SIGTERM.",
            ) from error
        yield


async def _serve(store: Store, clock: Clock) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    servers = Servers(store, clock)
    worker: asyncio.Task[None] | None = None
    driver = _DriverThread(store, clock)
    try:
        await servers.start()
        driver.start()
        worker = asyncio.create_task(_supervise(store.folder))
        _announce(store, servers)
        await stop.wait()
        log.info("serve.stopping")
    finally:
        (store.folder / RUN_FILE).unlink(missing_ok=True)
        driver.ask_to_stop()
        if worker is not None:
            worker.cancel()
        await servers.stop()
        if worker is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await worker
        await asyncio.to_thread(driver.join)


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
    sys.stdout.write(
        f"coldmerge coordinator {store.federation} is ready: "
        f"api {servers.addresses.api}, enrolment {servers.addresses.enrol}\n"
    )
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
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            raise
        lived = time.monotonic() - started
        backoff = FIRST_BACKOFF if lived > HEALTHY_AFTER else min(2 * backoff, LONGEST_BACKOFF)
        log.error("worker.died", exit_status=code, lived=round(lived, 1), restart_in=backoff)
        await asyncio.sleep(backoff)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), WORKER_GRACE)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
