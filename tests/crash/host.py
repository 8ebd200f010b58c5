"""A coordinator on one folder that is killed in every way and started again, quickly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from google.protobuf.duration_pb2 import Duration

from coldmerge.core.errors import ConflictError, UnavailableError
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc
from coldmerge_client import enrol
from coldmerge_client.home import Home
from coldmerge_coordinator import setup
from coldmerge_coordinator.importing import add_model
from coldmerge_coordinator.store import Store
from tests.crash.members import MODEL, Base
from tests.federation import COLDMERGE, environment
from tests.support import free_ports, until, write_model
from tests.zygote import Zygote

What = Literal["all", "api", "worker"]
GATES: tuple[dict[str, object], ...] = (
    {"gate": None},
    {"gate": {"min_evaluators": 3, "max_vetoes": 0, "window": "1d"}},
)


@dataclass
class Host:
    """The processes on a coordinator's folder; `api` is None while nothing runs."""

    folder: Path
    zygote: Zygote
    fingerprint: str = ""
    api: int | None = None
    worker: int | None = None
    real: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def make(cls, folder: Path, zygote: Zygote, base: Base) -> Host:
        """A new coordinator with one model, listening on ports it keeps."""
        api, enrolment = (f"127.0.0.1:{port}" for port in free_ports(2))
        made = setup.init(folder, federation="crash", listen=api, enrol_listen=enrolment)
        source = write_model(folder.parent / f"{folder.name}-source", base)
        with Store.open(folder) as store:
            add_model(store, MODEL, source, ())
        return cls(folder, zygote, made.fingerprint)

    @property
    def log(self) -> Path:
        """What all processes printed."""
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def address(self) -> str:
        """Where the API listens."""
        found: str = json.loads((self.folder / "run.json").read_text())["api"]
        return found

    def start(self, *, real: bool = False, unless: Callable[[], bool] = lambda: False) -> None:
        """Start what does not run, and wait until it serves (or `unless` says not to).

        `real`: by the command, with a worker under supervision.
        """
        if real and self.api is None and self.worker is None:
            self._start_command()
        if self.api is None:
            self.api = self.zygote.serve(self.folder, self.log)
        if self.worker is None and self.real is None:
            self.worker = self.zygote.work(self.folder, self.log, self.api)
        until("the coordinator to serve", lambda: self._ready() or unless(), every=0.005)

    def _start_command(self) -> None:
        with self.log.open("ab") as log:
            self.real = subprocess.Popen(
                [*COLDMERGE, "coordinator", "serve", str(self.folder)],
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.api = self.real.pid

    def _ready(self) -> bool:
        said = self.folder / "run.json"
        try:
            return bool(json.loads(said.read_text())["pid"] == self.api)
        except FileNotFoundError:
            return False

    def kill(self, what: What = "all") -> None:
        """SIGKILL. A supervised worker cannot be told from the API: the group dies."""
        if self.real is not None:
            os.killpg(self.real.pid, signal.SIGKILL)
            self.real.wait()
            self.real = self.api = None
            return
        api, worker = self.api, self.worker
        if what != "worker" and api is not None:
            os.kill(api, signal.SIGKILL)
        if what != "api" and worker is not None:
            os.kill(worker, signal.SIGKILL)
        self.reap(what)

    def reap(self, what: What = "all") -> None:
        """Wait for children that were killed."""
        if what != "worker" and self.api is not None:
            self.zygote.wait(self.api)
            self.api = None
        if what != "api" and self.worker is not None:
            self.zygote.wait(self.worker)
            self.worker = None

    def stop(self) -> None:
        """SIGTERM to both, and they end by themselves with status 0."""
        assert self.real is None
        for pid in (self.worker, self.api):
            if pid is not None:
                os.kill(pid, signal.SIGTERM)
                assert self.zygote.wait(pid) == 0, self.log.read_text()[-4000:]
        self.api = self.worker = None

    def close(self) -> None:
        """Kill what still runs."""
        if self.real is not None or self.api is not None or self.worker is not None:
            self.kill()

    def join(self, name: str, machine: str = "m1") -> Home:
        """Enrol an organization; the coordinator must be serving."""
        ttl = Duration()
        ttl.FromTimedelta(timedelta(hours=1))
        request = admin_pb2.InviteRequest(contributor=name, role="contributor", ttl=ttl)
        home = Home(self.folder.parent / f"home-{name}")
        enrol.join(self.admin("Invite", request).invitation, self.fingerprint, home, machine)
        return home

    def open_round(self, **policy: object) -> None:
        """Open a round of the model; the coordinator must be serving.

        Raises:
            ConflictError: there is one.
        """
        body = json.dumps({"min_contributions": 3, **policy})
        self.admin("OpenRound", admin_pb2.OpenRoundRequest(model=MODEL, policy_json=body))

    def admin(self, method: str, request: object, patience: float = 0) -> Any:
        """An admin's call over the local socket."""
        with local_channel(self.folder / "admin.sock") as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            return call(getattr(stub, method), request, patience=patience, deadline=10)


@dataclass
class Opener:
    """Opens a round of the model whenever there is none, on a thread."""

    host: Host
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        opened = 0
        while not self.ended.wait(0.1):
            with suppress(ConflictError, UnavailableError):
                self.host.open_round(**GATES[opened % len(GATES)])
                opened += 1

    def stop(self) -> None:
        self.ended.set()
        self._thread.join(30)
