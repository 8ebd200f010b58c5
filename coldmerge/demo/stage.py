"""The demo's federation on loopback: one coordinator, several organizations, all processes.

Everything goes through the commands and the admin's socket that a person would use.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import yaml

from coldmerge.core.errors import UnavailableError
from coldmerge.demo.plan import Plan
from coldmerge.demo.processes import Processes, Running
from coldmerge.wire.calls import call
from coldmerge.wire.channel import local_channel
from coldmerge.wire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    models_pb2,
    models_pb2_grpc,
    rounds_pb2,
    rounds_pb2_grpc,
)

START_SECONDS = 120.0
ROUND_SECONDS = 7200.0
POLL_SECONDS = 0.25
CONTRIBUTOR_NICENESS = 10
ENDED = frozenset(
    {common_pb2.Round.PUBLISHED, common_pb2.Round.REJECTED, common_pb2.Round.ABANDONED}
)

Tell = Callable[[str], None]


def round_policy(organizations: int) -> dict[str, Any]:
    """The rules of the demo's rounds: all contribute, all judge, the gate may reject.

    A few hundred validation examples tell accuracies apart by some points only. So the
    mean of all may fall by one point, and one organization has a veto only when more than
    a quarter of them lose six.
    """
    return {
        "min_contributions": organizations,
        "gate": {
            "min_evaluators": max(1, organizations // 2),
            "min_mean_gain": -1.0,
            "max_loss": 6.0,
            "max_vetoes": max(1, organizations // 4),
            "window": "2h",
            "on_timeout": "reject",
        },
    }


class Stage:
    """A federation in `folder`. Enter `processes` first: it ends what is started here."""

    policy = staticmethod(round_policy)

    def __init__(self, folder: Path, plan: Plan, processes: Processes, tell: Tell) -> None:
        self.folder = folder
        self.plan = plan
        self.processes = processes
        self.tell = tell
        self.hub = folder / "coordinator"
        self.contributors: list[Running] = []
        self._watched: list[Running] = []
        self._channel: grpc.Channel | None = None

    def close(self) -> None:
        """Close the connection to the coordinator."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def home(self, organization: str) -> Path:
        """The folder of one organization."""
        return self.folder / "homes" / organization

    def start_coordinator(self) -> None:
        """`coordinator init` and `serve`, and `model add` beside the running coordinator."""
        free = ("--port", "0", "--enrol-port", "0")
        made = self.processes.answer(
            "init", "coordinator", "init", self.hub, "--federation", "demo", *free
        )
        self.tell(f"Federation {made['federation']}: certificate authority and database made")
        serving = self.processes.start("coordinator", "coordinator", "serve", self.hub)
        self._watched.append(serving)
        template = self.folder / "round.yaml"
        template.write_text(yaml.safe_dump(self.policy(len(self.plan.seen)), sort_keys=False))
        adding = ("--from", self.plan.model, "--template", template, "--dir", self.hub)
        self.processes.answer(
            "model", "model", "add", self.plan.name, *adding, "--private", "classifier.*"
        )
        self._until_serving(serving)

    def _until_serving(self, serving: Running) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (self.hub / "run.json").exists():
            self.processes.check([serving])
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "demo.coordinator_silent",
                    f"The coordinator was not ready after {START_SECONDS:.0f} s.",
                    got=serving.tail(),
                    hint=f"Its log: {serving.log}",
                )
            time.sleep(POLL_SECONDS)
        self._channel = local_channel(self.hub / "admin.sock")
        self.tell("The coordinator serves: mTLS for members, TLS for enrolment, its own worker")

    def join_all(self, seed: int) -> None:
        """Invite and enrol every organization, each with its own home, keys and data."""
        joining = []
        for task in self.plan.seen:
            home = self.home(task.name)
            data = task.save(home / "private-data")
            config = self.plan.train_config(task, data, seed)
            (home / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            request = admin_pb2.InviteRequest(contributor=task.name, role="contributor")
            request.ttl.FromSeconds(3600)
            made = self._admin("Invite", request)
            (home / "invitation").write_text(made.invitation)
            words = ("join", home / "invitation", "--fingerprint", made.fingerprint)
            joining.append(
                self.processes.start(f"{task.name}-join", *words, "--home", home, "--machine", "m1")
            )
        for running in joining:
            self.processes.finish(running, START_SECONDS)
        names = ", ".join(task.name for task in self.plan.seen)
        self.tell(f"{len(joining)} organizations joined, each with keys of its own: {names}")

    def start_contributors(self, rounds: int) -> None:
        """`coldmerge contribute` for each organization."""
        for task in self.plan.seen:
            home = self.home(task.name)
            words = ("contribute", self.plan.name, "--rounds", str(rounds))
            running = self.processes.start(
                task.name,
                *words,
                *("--config", home / "train.yaml", "--home", home),
                nice=CONTRIBUTOR_NICENESS,
            )
            self.contributors.append(running)
        self._watched += self.contributors

    def finish_contributors(self) -> None:
        """Wait for them to end by themselves, after their last round."""
        for running in self.contributors:
            self.processes.finish(running, START_SECONDS)

    def open_round(self, number: int) -> Watcher:
        """Open a round on the latest release, and follow it."""
        request = admin_pb2.OpenRoundRequest(model=self.plan.name)
        return Watcher(self, number, self._admin("OpenRound", request).id)

    def round(self, identifier: str) -> Any:
        """A round as it is now; fails when a process of the demo has."""
        self.processes.check(self._watched)
        stub = rounds_pb2_grpc.RoundsStub(self._channel)  # type: ignore[no-untyped-call]
        return call(stub.Get, rounds_pb2.GetRoundRequest(id=identifier))

    def shipped(self, identifier: str) -> tuple[int, int]:
        """How many contributions a round admitted, and their bytes."""
        request = admin_pb2.RoundAction(round=identifier)
        found = self._admin("ListRoundContributions", request).contributions
        admitted = [item for item in found if item.state == "ADMITTED"]
        return len(admitted), sum(item.payload_bytes for item in admitted)

    def release(self, number: int) -> Any:
        """A release's message."""
        stub = models_pb2_grpc.ModelsStub(self._channel)  # type: ignore[no-untyped-call]
        request = models_pb2.GetReleaseRequest(model=self.plan.name, number=number)
        return call(stub.GetRelease, request)

    def export(self, number: int) -> Path:
        """`coldmerge release export`: a release as a Hugging Face folder."""
        out = self.folder / "releases" / str(number)
        out.parent.mkdir(exist_ok=True)
        words = ("release", "export", self.plan.name, str(number), out, "--dir", self.hub)
        self.processes.answer(f"export-{number}", *words)
        return out

    def candidate(self, digest: str) -> Path | None:
        """A rejected candidate, as an organization pulled it to judge it."""
        out = self.folder / "rejected" / digest[:12]
        if out.is_dir():
            return out
        for task in self.plan.seen:
            found = self.home(task.name) / "candidates" / self.plan.name / digest
            if found.is_dir():
                shutil.copytree(found, out)
                return out
        return None

    def _admin(self, method: str, request: object) -> Any:
        stub = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]
        return call(getattr(stub, method), request, patience=0)


class Watcher:
    """Follows one round, and says what changes."""

    def __init__(self, stage: Stage, number: int, identifier: str) -> None:
        self.stage = stage
        self.number = number
        self.identifier = identifier
        self._said = ""
        self._deadline = time.monotonic() + ROUND_SECONDS

    def poll(self) -> Any:
        """Look once; the round as it is now."""
        found = self.stage.round(self.identifier)
        text = self._text(found)
        if text != self._said:
            self.stage.tell(f"round {self.number}: {text}")
            self._said = text
        return found

    def wait(self) -> Any:
        """Follow the round to its end.

        Raises:
            UnavailableError: it takes too long, or a process failed.

        """
        while (found := self.poll()).state not in ENDED:
            if time.monotonic() > self._deadline:
                raise UnavailableError(
                    "demo.round_stuck",
                    f"Round {self.number} did not end within {ROUND_SECONDS:.0f} s.",
                    got=self._said,
                    hint=f"Read the logs in {self.stage.processes.logs}",
                    round=self.identifier,
                )
            time.sleep(POLL_SECONDS)
        return found

    def _text(self, found: Any) -> str:
        state = common_pb2.Round.State.Name(found.state)
        text = f"{state}, {found.contributions}/{found.min_contributions} contributions"
        if found.state == common_pb2.Round.CANDIDATE:
            text = f"{state}, judged by {found.evaluations}/{found.contributions} organizations"
        if found.state in ENDED:
            text = f"{state}: {found.reason}" if found.reason else state
        return text
