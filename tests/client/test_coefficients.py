"""Organizations learn their coefficients over the real wire; the coordinator dies on the way."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coldmerge.wire.v1 import common_pb2
from coldmerge_client import sent_log
from coldmerge_client.contribute import Step, Terms
from coldmerge_client.home import Home
from coldmerge_client.policy import SendPolicy
from coldmerge_client.session import Session
from coldmerge_coordinator.store import Store, learned, rounds
from coldmerge_coordinator.verifying import verify_release
from tests.client.conftest import Coordinator
from tests.client.members import Member, config_of
from tests.federation import COLDMERGE, environment
from tests.support import until

TRAINER = '''
import numpy as np
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge_client.training.trainer import Predictions, Trained

GOAL = 0.01 * np.random.default_rng(5).normal(size=4096).astype(np.float32)


class Seeker:
    """Goes where GOAL says; the one that is `lost` goes anywhere."""

    def __init__(self, config):
        self.config = config

    def train(self, job, progress=None):
        base, random = Checkpoint.open(job.release), np.random.default_rng(job.seed)
        noise = 0.01 * random.normal(size=4096).astype(np.float32)
        lost = self.config.options.get("lost", False)
        step = noise if lost else GOAL + np.float32(0.2) * noise
        with CheckpointWriter(job.out / "tuned") as writer:
            writer.declare(list(base.tensors.values()))
            for name in base.tensors:
                moved = base.array(name) + step if name == "body.large" else base.array(name)
                writer.write(name, np.ascontiguousarray(moved))
            writer.write_file("config.json", b"{}")
        return Trained(job.out / "tuned", None, 40)

    def predict(self, job, progress=None):
        found = np.random.default_rng(7)
        found.normal(size=(8, 16))
        start = found.normal(size=(4096,)).astype(np.float32)
        off = Checkpoint.open(job.release).array("body.large") - start - GOAL
        loss = float(np.mean(off.astype(np.float64) ** 2) / np.mean(GOAL.astype(np.float64) ** 2))
        labels = np.zeros(20, np.int64)
        if self.config.options.get("silent"):
            return Predictions(labels, labels)
        return Predictions(labels, labels, loss=loss, entropy=loss)


def create(config):
    return Seeker(config)
'''
LEARNS = {"objective": "loss", "probes": 8}
GATE = {"min_evaluators": 3, "window": "1h"}


@pytest.fixture
def members(coordinator: Coordinator, tmp_path: Path) -> Iterator[Any]:
    trainer = tmp_path / "seeker.py"
    trainer.write_text(TRAINER)
    with ExitStack() as stack:

        def make(name: str, seed: int, policy: SendPolicy, **options: Any) -> Member:
            home = Home(tmp_path / name)
            coordinator.join(home.path, name)
            steps: list[Step] = []
            session = stack.enter_context(Session.open(home, timeout=20))
            config = config_of(trainer, seed, **options)
            return Member(session, Terms(config, policy, tell=steps.append), steps, 1)

        yield make


def probed(watcher: Session, round_id: str, count: int) -> bool:
    return watcher.round(round_id).trial >= count


def show(coordinator: Coordinator, round_id: str, *options: str) -> str:
    command = [*COLDMERGE, "round", "show", round_id, "--dir", str(coordinator.folder), *options]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True
    ).stdout


def learn(coordinator: Coordinator, *members: Member, kills: int = 0, **learns: Any) -> str:
    """One round; the coordinator is killed `kills` times while it learns."""
    merge = {"coefficients": {**LEARNS, **learns}}
    opened = coordinator.open_round(min_contributions=3, gate=GATE, merge=merge)
    threads = [member.start() for member in members]
    with Session.open(members[0].session.home, timeout=20) as watcher:
        for kill in range(1, kills + 1):
            until("more probes", partial(probed, watcher, opened.id, 3 * kill), 60)
            coordinator.stop(signal.SIGKILL)
            coordinator.start()
    for thread in threads:
        thread.join(90)
    for member in members:
        if member.error is not None:
            raise member.error
    return opened.id


AGREED = SendPolicy(allow_learn_coefficients=True)


def test_noise_counts_for_little_though_the_coordinator_is_killed_between_probes(
    coordinator: Coordinator, members: Any
) -> None:
    a, b = members("org-a", 1, AGREED), members("org-b", 2, AGREED)
    lost = members("org-c", 3, AGREED, lost=True)
    round_id = learn(coordinator, a, b, lost, kills=2)
    assert [one.state for one in a.ended] == [common_pb2.Round.PUBLISHED]
    shown, told = show(coordinator, round_id, "--format", "json"), show(coordinator, round_id)
    coordinator.stop()
    with Store.open(coordinator.folder) as store:
        with store.database.read() as session:
            row = rounds.get(session, round_id)
            weights = learned.weights_of(row)
            probes = (row.coefficients or {})["probes"]
        found = verify_release(store, "m", 1, coordinator.folder.parent)
    assert weights is not None
    admitted = {one["contributor"]: one["coefficients"] for one in json.loads(shown)["admitted"]}
    assert admitted == {name: dict(kept) for name, kept in weights.of.items()}
    assert [one["point"] for one in json.loads(shown)["probes"]] == [p["point"] for p in probes]
    assert "probes for coefficients" in told
    assert weights.weight("org-c", "") < 0.5 * min(
        weights.weight(name, "") for name in ("org-a", "org-b")
    )
    assert [len(probe["reports"]) for probe in probes] == [3] * len(probes)
    assert (found.answer, found.problems) == ("exact", [])
    sent = [line for line in sent_log.read(a.session.home) if line.event == "evaluation"]
    assert len(sent) == len(probes) + 1
    assert set(sent[0].body["means"]) == {"base_loss", "candidate_loss"}
    assert not sent[-1].body["means"], "the gate asks for scores alone"


def test_without_consent_all_share_and_nothing_is_probed(
    coordinator: Coordinator, members: Any
) -> None:
    makers = [members(name, seed, SendPolicy()) for seed, name in enumerate("abc", 1)]
    learn(coordinator, *makers)
    assert [one.state for one in makers[0].ended] == [common_pb2.Round.PUBLISHED]
    assert [maker.kinds().count("evaluated") for maker in makers] == [1, 1, 1]


def test_a_trainer_without_numbers_is_done_without(coordinator: Coordinator, members: Any) -> None:
    a, b = members("org-a", 1, AGREED), members("org-b", 2, AGREED)
    mute = members("org-c", 3, AGREED, silent=True)
    learn(coordinator, a, b, mute, window="3s", probes=4)
    assert [one.state for one in mute.ended] == [common_pb2.Round.PUBLISHED]
    assert mute.kinds().count("evaluated") == 1
    assert "skipped" in mute.kinds()
    assert a.kinds().count("evaluated") > 1
