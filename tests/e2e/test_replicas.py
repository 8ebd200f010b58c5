"""Two replicas of each part on one database: any of them is killed while a round goes on."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coldmerge_client.home import Home
from coldmerge_client.prepare import Facts
from coldmerge_client.push import push
from coldmerge_client.session import Session
from coldmerge_coordinator import replica as replicas
from coldmerge_coordinator.store import Store, releases
from coldmerge_coordinator.store.models import Contribution, Lease
from tests.backends import replica
from tests.federation import COLDMERGE, Federation, Org, environment
from tests.support import free_ports, until, write_model

Process = subprocess.Popen[bytes]
SIZE = 4_000_000
PARTS = [(part, number) for part in replicas.PARTS for number in (0, 1)]


class Cluster:
    """The folders of the replicas, and a process for each part of each."""

    def __init__(self, federation: Federation) -> None:
        hub = federation.hub.folder
        beside = replica(hub, hub.parent / "hub-2", ports=free_ports(2))
        self.folders = [hub, beside]
        self.running = {(part, number): self._start(part, number) for part, number in PARTS}
        for number, folder in enumerate(self.folders):
            until(f"API {number}", (folder / "run.json").exists)

    def _start(self, part: str, number: int) -> Process:
        folder = self.folders[number]
        with (folder.parent / f"{part}-{number}.log").open("ab") as log:
            command = [*COLDMERGE, "coordinator", "serve", str(folder), "--only", part]
            return subprocess.Popen(command, env=environment(), stdout=log, stderr=log)

    def kill(self, part: str, number: int) -> None:
        process = self.running.pop((part, number))
        process.kill()
        process.wait()

    def address(self, number: int) -> str:
        found: str = json.loads((self.folders[number] / "run.json").read_text())["api"]
        return found

    def holder(self, part: str, name: str) -> int:
        """The replica whose driver or worker holds the lease."""
        names = [replicas.holder(part, folder) for folder in self.folders]

        def find() -> str | None:
            with Store.open(self.folders[0]) as store, store.database.read() as session:
                lease = session.get(Lease, name)
                return lease.holder if lease else None

        return names.index(until(f"the lease {name}", find, every=0.01))

    def close(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def cluster(federation: Federation) -> Iterator[Cluster]:
    made = Cluster(federation)
    yield made
    made.close()


def send(org: Org, address: str, folder: Path, base: dict[str, np.ndarray], seed: int) -> None:
    """A fine-tune of the base, through the replica at that address."""
    home = Home(org.home)
    home.save_membership(replace(home.membership(), address=address))
    draw = np.random.default_rng(seed)
    tuned = {name: a + 0.01 * draw.random(a.shape, np.float32) for name, a in base.items()}
    with Session.open(home) as session:
        push(session, "m", write_model(folder, tuned), Facts(examples=10))


@pytest.mark.slow
def test_a_round_completes_whoever_is_killed(
    federation: Federation, cluster: Cluster, tmp_path: Path
) -> None:
    hub = federation.hub
    draw = np.random.default_rng(0)
    base = {f"layer.{n}.weight": draw.random(SIZE, np.float32) for n in range(4)}
    hub.cli("model", "add", "m", "--from", write_model(tmp_path / "base", base))
    orgs = federation.join(["a", "b", "c"])
    policy = tmp_path / "policy.yaml"
    policy.write_text("min_contributions: 3\ngate: null\n")
    hub.cli("round", "open", "m", "--policy", policy)
    addresses = [cluster.address(0), cluster.address(1)]
    send(orgs[0], addresses[0], tmp_path / "a", base, 1)
    cluster.kill("api", 0)
    send(orgs[1], addresses[1], tmp_path / "b", base, 2)
    cluster.kill("driver", cluster.holder("driver", "driver"))
    send(orgs[2], addresses[1], tmp_path / "c", base, 3)
    with Store.open(cluster.folders[1]) as store, store.database.read() as session:
        (round_id,) = {row.round for row in session.query(Contribution)}
    cluster.kill("worker", cluster.holder("worker", f"merge:{round_id}"))

    def published() -> bool:
        with Store.open(cluster.folders[1]) as store, store.database.read() as session:
            return releases.latest_release(session, "m").number == 1

    until("the release", published, patience=180)
    with Store.open(cluster.folders[1]) as store, store.database.read() as session:
        states = [row.state for row in session.query(Contribution)]
    assert states == ["ADMITTED"] * 3
