"""A real federation for tests: coordinator and contributors as processes, over real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldmerge.cli.local import ask, local
from coldmerge.cli.releases import release_row
from coldmerge.cli.rounds import round_row
from coldmerge.wire.v1 import models_pb2, rounds_pb2
from tests.backends import init_options
from tests.support import free_ports
from tests.support import until as until

COLDMERGE = (sys.executable, "-m", "coldmerge")
PATIENCE = 90.0


def environment(**extra: str) -> dict[str, str]:
    """The environment of every process: one thread each, nothing from a hub."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("COLDMERGE_")}
    return {**kept, **quiet, **extra}


def run(*args: str | Path, env: dict[str, str], check: bool = True) -> Any:
    """One command with `--format json`; its parsed answer."""
    command = [*COLDMERGE, *map(str, args), "--format", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    answer = json.loads(done.stdout) if done.stdout.strip() else {}
    return answer if check else (done.returncode, answer)


@dataclass
class Hub:
    """A coordinator: its folder and, while it runs, its process group."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    process: subprocess.Popen[bytes] | None = None
    fingerprint: str = ""

    @property
    def log(self) -> Path:
        """Everything the coordinator's processes printed."""
        return self.folder.parent / f"{self.folder.name}.log"

    def init(self) -> None:
        """`coldmerge coordinator init`."""
        port, enrol = map(str, self.ports)
        ports = ("--port", port, "--enrol-port", enrol)
        made = self.cli("coordinator", "init", self.folder, *ports, *init_options())
        self.fingerprint = made["fingerprint"]

    def start(self, **extra: str) -> None:
        """Serve, with `extra` in the environment, and wait until it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COLDMERGE, "coordinator", "serve", str(self.folder)],
                env=environment(**extra),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until("the coordinator to serve", self._serves, PATIENCE)

    def _serves(self) -> bool:
        """Whether this process has said where it listens; a killed one leaves its file."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the coordinator ended:\n{self.log.read_text()}")
        said = self.folder / "run.json"
        return said.is_file() and json.loads(said.read_text())["pid"] == self.process.pid

    def kill(self) -> None:
        """SIGKILL to the coordinator and its worker at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process is None or self.process.poll() is not None:
            return 0
        self.process.terminate()
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def cli(self, *args: str | Path, check: bool = True) -> Any:
        """An admin's command."""
        return run(*args, env=environment(COLDMERGE_DIR=str(self.folder)), check=check)

    def rounds(self, model: str) -> list[dict[str, Any]]:
        """What `round list` prints of a model, newest first; asked without a process, for polls."""
        request = rounds_pb2.ListRoundsRequest(model=model)
        with local(self.folder) as coordinator:
            found = ask(coordinator.rounds.List, request).rounds
        return [round_row(message) for message in found]

    def releases(self, model: str) -> list[dict[str, Any]]:
        """What `release list` prints of a model, oldest first; asked without a process."""
        request = models_pb2.ListReleasesRequest(model=model)
        with local(self.folder) as coordinator:
            found = ask(coordinator.models.ListReleases, request).releases
        return [release_row(message) for message in found]


@dataclass
class Org:
    """A contributor: its home and the processes it started."""

    name: str
    home: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """Everything its background processes printed."""
        return self.home.parent / f"{self.home.name}.log"

    def join(self, hub: Hub, machine: str = "m1") -> None:
        """Invitation and `coldmerge join`."""
        invited = hub.cli("invite", self.name)
        fingerprint = invited["fingerprint"]
        self.cli("join", invited["invitation"], "--fingerprint", fingerprint, "--machine", machine)

    def cli(self, *args: str | Path, check: bool = True) -> Any:
        """A contributor's command."""
        return run(*args, env=environment(COLDMERGE_HOME=str(self.home)), check=check)

    def spawn(self, *args: str | Path) -> subprocess.Popen[bytes]:
        """A contributor's command in the background."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*COLDMERGE, *map(str, args)],
                env=environment(COLDMERGE_HOME=str(self.home)),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
        """Wait for a background command to succeed."""
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"{self.name} ended with {code}:\n{self.log.read_text()[-4000:]}"


@dataclass
class Federation:
    """A coordinator and its contributors in one folder."""

    folder: Path
    hub: Hub
    orgs: list[Org] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path) -> Federation:
        """A coordinator that is initialized, not yet serving."""
        hub = Hub(folder / "hub")
        hub.init()
        return cls(folder, hub)

    def join(self, names: Sequence[str]) -> list[Org]:
        """Enrol one organization per name; the coordinator must be serving."""
        joined = [Org(name, self.folder / f"home-{name}") for name in names]
        self.orgs += joined
        for org in joined:
            org.join(self.hub)
        return joined

    def close(self) -> None:
        """End everything that was started, by its handle."""
        for org in self.orgs:
            for process in org.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if self.hub.process is not None and self.hub.process.poll() is None:
            self.hub.kill()
