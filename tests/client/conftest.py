"""Homes of contributors, and a real coordinator in its own process for them to talk to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from coldmerge_client import enrol
from coldmerge_client.home import Home, Membership
from coldmerge_client.session import Session
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.duration_pb2 import Duration

from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.dtypes import NUMPY
from coldmerge.core.header import TensorSpec
from coldmerge.rounds.policy import RoundTemplate
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import admin_pb2, admin_pb2_grpc, common_pb2

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
Arrays = Mapping[str, np.ndarray[Any, Any]]


class FixedClock:
    def __init__(self, time: datetime = START) -> None:
        self.time = time

    def now(self) -> datetime:
        return self.time


def save_model(folder: Path, tensors: Arrays) -> Path:
    """A model folder with these tensors, a configuration and a tokenizer file."""
    names = {dtype: name for name, dtype in NUMPY.items()}
    with CheckpointWriter(folder) as writer:
        writer.declare(
            [TensorSpec(n, names[a.dtype], a.shape, 0, a.nbytes) for n, a in tensors.items()]
        )
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array))
        writer.write_file("config.json", b'{"model_type": "test"}')
        writer.write_file("tokenizer.json", b"{}")
    return folder


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
        moved = random.normal(size=base[name].shape).astype(np.float32)
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


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for {what}")
        signal.sigtimedwait([], 0.02)
    return found


@dataclass
class Coordinator:
    """A served coordinator folder; `admin` calls go over its Unix socket."""

    folder: Path
    fingerprint: str
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self.folder / "run.json").unlink(missing_ok=True)
        log = (self.folder.parent / "coordinator.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coldmerge_coordinator.serve", str(self.folder)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        wait_until((self.folder / "run.json").exists, "run.json")
        wait_until((self.folder / "admin.sock").exists, "admin.sock")

    def addresses(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return found

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def admin(self, method: str, request: object) -> Any:
        with local_channel(self.folder / "admin.sock") as channel:
            return call(getattr(admin_pb2_grpc.AdminStub(channel), method), request)  # type: ignore[no-untyped-call]

    def invite(self, contributor: str, role: str = "contributor") -> str:
        ttl = Duration()
        ttl.FromTimedelta(timedelta(hours=1))
        request = admin_pb2.InviteRequest(contributor=contributor, role=role, ttl=ttl)
        invitation: str = self.admin("Invite", request).invitation
        return invitation

    def open_round(self, model: str = "m", **policy: object) -> common_pb2.Round:
        values = {"min_contributions": 1, "gate": None, **policy}
        request = admin_pb2.OpenRoundRequest(model=model, policy_json=json.dumps(values))
        opened: common_pb2.Round = self.admin("OpenRound", request)
        return opened

    def join(self, home: Path, contributor: str = "org-a", machine: str = "laptop") -> Home:
        made = Home(home)
        enrol.join(self.invite(contributor), self.fingerprint, made, machine)
        return made


@pytest.fixture
def make_coordinator(tmp_path: Path) -> Iterator[Callable[..., Coordinator]]:
    """Init, add model `m`, serve on free ports; ended with the test."""
    from coldmerge_coordinator.importing import add_model
    from coldmerge_coordinator.setup import init
    from coldmerge_coordinator.store import Store

    running: list[Coordinator] = []

    def make(tensors: Arrays | None = None) -> Coordinator:
        folder = tmp_path / "hub"
        made = init(folder, federation="fed", listen="127.0.0.1:0", enrol_listen="127.0.0.1:0")
        source = save_model(tmp_path / "source", tensors or base_tensors())
        store = Store.open(folder)
        add_model(store, "m", source, ["classifier.*"], RoundTemplate())
        store.close()
        coordinator = Coordinator(folder, made.fingerprint)
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
