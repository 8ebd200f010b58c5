"""The loops of contributors, each in a thread, with a trainer of a few lines."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldmerge.wire.v1 import common_pb2
from coldmerge_client.contribute import Step, Terms, contribute
from coldmerge_client.home import Home
from coldmerge_client.session import Session
from coldmerge_client.training.config import TrainConfig

GATE = {"min_evaluators": 2, "window": "1h"}

TRAINER = '''
import numpy as np
from pathlib import Path
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge_client.training.trainer import Predictions, Trained


class Nudge:
    """Moves every float a little, in a direction of its seed; right on `good` of 20 items."""

    def __init__(self, config):
        self.config = config

    def train(self, job, progress=None):
        with (Path(job.out).parent.parent.parent.parent / "trainings").open("a") as file:
            file.write(job.digest + "\\n")
        base, random = Checkpoint.open(job.release), np.random.default_rng(job.seed)
        with CheckpointWriter(job.out / "tuned") as writer:
            writer.declare(list(base.tensors.values()))
            for name, spec in base.tensors.items():
                data = base.array(name)
                if spec.dtype == "F32":
                    data = data + np.float32(0.01) * random.normal(size=spec.shape)
                writer.write(name, np.ascontiguousarray(data.astype(base.array(name).dtype)))
            writer.write_file("config.json", b"{}")
        head = job.out / "head"
        head.mkdir()
        before = int((job.head / "rounds").read_text()) if job.head else 0
        (head / "rounds").write_text(str(before + 1))
        return Trained(job.out / "tuned", head, 40, {"accuracy": 0.5}, {"epochs": 1.0})

    def predict(self, job, progress=None):
        good = self.config.options.get("good", [10, 12])
        right = good[Path(job.release).parent.parent.name == "candidates"]
        labels = np.zeros(20, np.int64)
        return Predictions(labels, np.where(np.arange(20) < right, 0, 1))


def create(config):
    return Nudge(config)
'''


def config_of(trainer: Path, seed: int, **options: Any) -> TrainConfig:
    (trainer.parent / "data").mkdir(exist_ok=True)
    return TrainConfig.parse(
        {
            "trainer": f"{trainer}:create",
            "data": str(trainer.parent / "data"),
            "seed": seed,
            "options": options,
        }
    )


@dataclass
class Member:
    """One contributor's loop in a thread."""

    session: Session
    terms: Terms
    steps: list[Step]
    rounds: int
    ended: list[common_pb2.Round] = field(default_factory=list)
    error: BaseException | None = None

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            self.ended += contribute(self.session, "m", self.terms, rounds=self.rounds)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def kinds(self) -> list[str]:
        return [step.kind for step in self.steps]


def run(*members: Member) -> None:
    for thread in [member.start() for member in members]:
        thread.join(60)
    for member in members:
        if member.error is not None:
            raise member.error


def trainings(home: Home) -> int:
    return len((home.path / "trainings").read_text().splitlines())


def judged(member: Member, times: int) -> bool:
    """Whether it has judged so many candidates."""
    return member.kinds().count("evaluated") == times
