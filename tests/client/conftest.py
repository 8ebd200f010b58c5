"""Homes of contributors, and a real coordinator in its own process for them to talk to."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.duration_pb2 import Duration

from coldmerge.rounds.policy import RoundTemplate
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from coldmerge_client import enrol
from coldmerge_client.contribute import Step, Terms
from coldmerge_client.home import Home, Membership
from coldmerge_client.policy import SendPolicy
from coldmerge_client.session import Session
from tests.client.members import TRAINER, Member, config_of
from tests.support import free_ports, until, write_model
from tests.zygote import Zygote

Arrays = Mapping[str, np.ndarray[Any, Any]]


def base_tensors(elements: int = 4096) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(7)
    return {
        "body.buffer": np.arange(5, dtype=np.int64),
        "body.half": random.normal(size=(8, 16)).astype(ml_dtypes.bfloat16),
        "body.large": random.normal(size=(elements,)).astype(np.float32),
        "body.small": random.normal(size=(16,)).astype(np.float32),
        "classifier.weight": random.normal(size=(4, 16)).astype(np.float32),
    }


def tuned_tensors(base: Arrays, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """A fine-tune: two float tensors and the private head moved, a new head appeared."""
    random = np.random.default_rng(seed)
    tuned = dict(base)
    for name in ("body.large", "body.small", "classifier.weight"):
        moved = np.asarray(random.normal(size=base[name].shape)).astype(np.float32)
        tuned[name] = base[name] + np.float32(0.01) * moved
    tuned["my_head.weight"] = random.normal(size=(2, 16)).astype(np.float32)
    return tuned


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that looks joined; there is no coordinator behind it."""
    home = Home(tmp_path / "home")
    enrol._make_keys(home)
    home.save_membership(
        Membership(
            federation="fed",
            address="localhost:1",
            enrol="localhost:1",
            contributor="org-a",
            role="contributor",
            machine="laptop",
            signing_key=Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
        )
    )
    return home


@dataclass
class Coordinator:
    """A served coordinator folder; `admin` calls go over its Unix socket."""

    folder: Path
    fingerprint: str
    zygote: Zygote
    running: list[int] = field(default_factory=list)

    def start(self) -> None:
        """The API, and a worker beside it."""
        (self.folder / "run.json").unlink(missing_ok=True)
        log = self.folder.parent / "coordinator.log"
        api = self.zygote.serve(self.folder, log)
        self.running = [api, self.zygote.work(self.folder, log, api)]
        until("run.json", (self.folder / "run.json").exists)
        until("admin.sock", (self.folder / "admin.sock").exists)

    def addresses(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return found

    def stop(self, how: int = signal.SIGTERM) -> None:
        for pid in self.running:
            os.kill(pid, how)
        while self.running:
            self.zygote.wait(self.running.pop())

    def admin(self, method: str, request: object) -> Any:
        with local_channel(self.folder / "admin.sock") as channel:
            return call(getattr(admin_pb2_grpc.AdminStub(channel), method), request)  # type: ignore[no-untyped-call]

    def invite(self, contributor: str, role: str = "contributor") -> str:
        ttl = Duration()
        ttl.FromTimedelta(timedelta(hours=1))
        request = admin_pb2.InviteRequest(contributor=contributor, role=role, ttl=ttl)
        invitation: str = self.admin("Invite", request).invitation
        return invitation

    def open_round(self, model: str = "m", **policy: Any) -> common_pb2.Round:
        values = {"min_contributions": 1, "gate": None, **policy}
        request = admin_pb2.OpenRoundRequest(model=model, policy_json=json.dumps(values))
        opened: common_pb2.Round = self.admin("OpenRound", request)
        return opened

    def join(self, home: Path, contributor: str = "org-a", machine: str = "laptop") -> Home:
        made = Home(home)
        enrol.join(self.invite(contributor), self.fingerprint, made, machine)
        return made


class Relay:
    """A TCP relay in front of the coordinator: counts bytes, and can cut the line.

    `up` and `down` count what went to and came from the coordinator. With `cut_after`
    the line is cut once, when that many more bytes went up (or came down); with `once`
    it stays cut.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.up = self.down = self.connections = self.cuts = 0
        self.once = False
        self._cut_up: int | None = None
        self._cut_down: int | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, *, up: int | None = None, down: int | None = None) -> None:
        with self._lock:
            self._cut_up = None if up is None else self.up + up
            self._cut_down = None if down is None else self.down + down

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.once and self.cuts:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self.connections += 1
            with self._lock:
                self._open |= {client, server}
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._count(len(data), up)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            with self._lock:
                self._open.discard(end)

    def _count(self, amount: int, up: bool) -> None:
        with self._lock:
            self.up += amount if up else 0
            self.down += 0 if up else amount
            over_up = self._cut_up is not None and self.up >= self._cut_up
            over_down = self._cut_down is not None and self.down >= self._cut_down
        if over_up or over_down:
            self._cut_up = self._cut_down = None
            self.cut()

    def cut(self) -> None:
        self.cuts += 1
        with self._lock:
            ends = list(self._open)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.fixture
def relay(coordinator: Coordinator) -> Iterator[Relay]:
    made = Relay(coordinator.addresses()["api"])
    yield made
    made.close()


def through(home: Home, relay: Relay) -> Home:
    """The same home, with its calls going through the relay."""
    home.save_membership(replace(home.membership(), address=relay.address))
    return home


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def make_coordinator(tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., Coordinator]]:
    """Init, add model `m`, serve on free ports; ended with the test."""
    from coldmerge_coordinator.importing import add_model
    from coldmerge_coordinator.setup import init
    from coldmerge_coordinator.store import Store

    running: list[Coordinator] = []

    def make(tensors: Arrays | None = None) -> Coordinator:
        folder = tmp_path / "hub"
        api, enrolment = (f"127.0.0.1:{port}" for port in free_ports(2))
        made = init(folder, federation="fed", listen=api, enrol_listen=enrolment)
        source = write_model(tmp_path / "source", tensors or base_tensors())
        store = Store.open(folder)
        add_model(store, "m", source, ["classifier.*"], RoundTemplate())
        store.close()
        coordinator = Coordinator(folder, made.fingerprint, zygote)
        running.append(coordinator)
        coordinator.start()
        return coordinator

    yield make
    for coordinator in running:
        coordinator.stop()


@pytest.fixture
def coordinator(make_coordinator: Callable[..., Coordinator]) -> Coordinator:
    return make_coordinator()


@pytest.fixture
def session(coordinator: Coordinator, tmp_path: Path) -> Iterator[Session]:
    with Session.open(coordinator.join(tmp_path / "home"), timeout=15) as opened:
        yield opened


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    path = tmp_path / "nudge.py"
    path.write_text(TRAINER)
    return path


@pytest.fixture
def members(coordinator: Coordinator, trainer: Path, tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def make(name: str, seed: int, *, rounds: int = 1, **terms: Any) -> Member:
            home = Home(tmp_path / name)
            if not home.joined:
                coordinator.join(home.path, name)
            steps: list[Step] = []
            session = stack.enter_context(Session.open(home, timeout=20))
            options = terms.pop("options", {})
            policy = terms.pop("policy", SendPolicy())
            made = Terms(config_of(trainer, seed, **options), policy, tell=steps.append, **terms)
            return Member(session, made, steps, rounds)

        yield make
