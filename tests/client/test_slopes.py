"""Organizations learn coefficients from slopes over the real wire; the coordinator dies once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldmerge.core.documents import Scores
from coldmerge.evaluation.metrics import PairedScores
from coldmerge.wire.v1 import common_pb2
from coldmerge_client import sent_log
from coldmerge_client.contribute import Step, Terms
from coldmerge_client.evaluate import leaving_scores
from coldmerge_client.home import Home
from coldmerge_client.policy import SendPolicy
from coldmerge_client.session import Session
from coldmerge_coordinator.store import Store, learned, rounds
from coldmerge_coordinator.verifying import verify_release
from tests.client.conftest import Coordinator
from tests.client.members import Member, config_of
from tests.support import until

TRAINER = '''
import numpy as np
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge_client.training.trainer import Predictions, Trained

GOAL = 0.01 * np.random.default_rng(5).normal(size=512).astype(np.float32)


def off(job):
    """How far the body is from where it should be, in float64."""
    start = np.random.default_rng(7).normal(size=512).astype(np.float32)
    found = Checkpoint.open(job.release).array("body.large").astype(np.float64)
    return found - start - GOAL


class Seeker:
    """Goes where GOAL says; the one that is `lost` goes anywhere."""

    def __init__(self, config):
        self.config = config
        if not config.options.get("flat"):
            self.gradient = self._gradient

    def train(self, job, progress=None):
        base, random = Checkpoint.open(job.release), np.random.default_rng(job.seed)
        noise = 0.01 * random.normal(size=512).astype(np.float32)
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
        loss = float(np.mean(off(job) ** 2) / np.mean(GOAL.astype(np.float64) ** 2))
        labels = np.zeros(20, np.int64)
        return Predictions(labels, labels, loss=loss, entropy=loss)

    def _gradient(self, job, objective, progress=None):
        slope = 2 * off(job) / np.sum(GOAL.astype(np.float64) ** 2)
        return {"body.large": slope.astype(np.float32)}


def create(config):
    return Seeker(config)
'''
LEARNS = {"method": "gradient", "objective": "loss", "probes": 12, "window": "20s"}
GATE = {"min_evaluators": 3, "window": "1h"}
AGREED = SendPolicy(allow_learn_coefficients=True)


@pytest.fixture
def coordinator(make_coordinator: Any) -> Coordinator:
    """Of a model that is published in float32."""
    large = np.random.default_rng(7).normal(size=512).astype(np.float32)
    found: Coordinator = make_coordinator({"body.large": large})
    return found


@pytest.fixture
def members(coordinator: Coordinator, tmp_path: Path) -> Iterator[Any]:
    trainer = tmp_path / "seeker.py"
    trainer.write_text(TRAINER)
    with ExitStack() as stack:

        def make(name: str, seed: int, **options: Any) -> Member:
            home = Home(tmp_path / name)
            coordinator.join(home.path, name)
            steps: list[Step] = []
            session = stack.enter_context(Session.open(home, timeout=20))
            config = config_of(trainer, seed, **options)
            return Member(session, Terms(config, AGREED, tell=steps.append), steps, 1)

        yield make


def probed(watcher: Session, round_id: str, count: int) -> bool:
    return watcher.round(round_id).trial >= count


def learn(coordinator: Coordinator, *members: Member, kill_at: int = 0) -> str:
    """One round; the coordinator is killed once, if it is, after so many probes."""
    merge = {"method": "task_arithmetic", "coefficients": LEARNS}
    opened = coordinator.open_round(min_contributions=3, gate=GATE, merge=merge)
    threads = [member.start() for member in members]
    if kill_at:
        with Session.open(members[0].session.home, timeout=20) as watcher:
            until("more probes", partial(probed, watcher, opened.id, kill_at), 60)
        coordinator.stop(signal.SIGKILL)
        coordinator.start()
    for thread in threads:
        thread.join(90)
    for member in members:
        if member.error is not None:
            raise member.error
    return opened.id


def test_the_lost_counts_for_little_though_the_coordinator_is_killed(
    coordinator: Coordinator, members: Any
) -> None:
    """One of the others has a trainer without slopes, and says so; what it measures counts."""
    a, b = members("org-a", 1), members("org-b", 2, flat=True)
    lost = members("org-c", 3, lost=True)
    round_id = learn(coordinator, a, b, lost, kill_at=6)
    assert [one.state for one in a.ended] == [common_pb2.Round.PUBLISHED]
    coordinator.stop()
    with Store.open(coordinator.folder) as store:
        with store.database.read() as session:
            row = rounds.get(session, round_id)
            weights = learned.weights_of(row)
            probes = (row.coefficients or {})["probes"]
        found = verify_release(store, "m", 1, coordinator.folder.parent)
    assert (found.answer, found.problems) == ("exact", [])
    assert weights is not None
    assert weights.weight("org-c", "") < 0.1
    assert sum(weights.weight(name, "") for name in ("org-a", "org-b")) == pytest.approx(1, abs=0.1)
    assert [len(probe["reports"]) for probe in probes] == [3] * len(probes)
    assert [bool(probe["slopes"]) for probe in probes] == [n > 3 for n in range(len(probes))]
    sent = [line.body for line in sent_log.read(a.session.home) if line.event == "evaluation"]
    assert [set(body.get("slopes", {})) for body in sent[:5]] == [set()] * 4 + [{""}]
    assert len(sent[4]["slopes"][""]) == 3
    mute = [line.body for line in sent_log.read(b.session.home) if line.event == "evaluation"]
    assert not any(body.get("slopes") for body in mute)
    told = [step.text for step in b.steps if step.kind == "skipped"]
    assert told
    assert all("We report no slopes" in text for text in told)
    assert not [step for step in a.steps if step.kind == "skipped"]
    assert not list(a.session.home.candidates("m").glob("?" * 64))[3:], "what is not needed goes"


def test_who_approves_sees_every_slope() -> None:
    half = Scores(accuracy=0.5, macro_f1=0.5)
    slopes = {"layer.0": (0.5, -1.5), "layer.1": (0.0, 2.0)}
    scores = PairedScores(4, half, half, 0, 0, {"base_loss": 1.0}, slopes)
    numbers = leaving_scores(common_pb2.Round(model="m"), scores).numbers
    assert numbers["slope_1.layer.0"] == -1.5
    assert [numbers[key] for key in sorted(numbers) if key.startswith("slope_")] == [
        0.5,
        0.0,
        -1.5,
        2.0,
    ]
