"""A contributor that trains nothing: it moves every weight by a constant of its own.

`python -m benchmarks.flower_member HOME MODEL CONSTANT DATA` takes part in round after round,
as `coldmerge contribute` does, and prints a line when it has the release of one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.progress import Progress, silent
from coldmerge_client.contribute import Terms, contribute
from coldmerge_client.home import Home
from coldmerge_client.policy import SendPolicy
from coldmerge_client.session import Session
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import EvaluateJob, Predictions, Trained, TrainJob


class Constant:
    """A trainer whose fine-tune is the release plus `options: {constant: X}`."""

    def __init__(self, config: TrainConfig) -> None:
        self.constant = np.float32(config.options["constant"])

    def train(self, job: TrainJob, _progress: Progress = silent) -> Trained:
        """Save the release, moved, as trainers do: from memory."""
        base, folder = Checkpoint.open(job.release), job.out / "model"
        moved = {
            name: base.block(name, 0, spec.size).reshape(spec.shape) + self.constant
            for name, spec in base.tensors.items()
        }
        folder.mkdir(parents=True)
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        return Trained(folder, None, examples=1)

    def predict(self, _job: EvaluateJob, _progress: Progress = silent) -> Predictions:
        """Nothing: it has no examples, and its rounds have no gate."""
        none = np.zeros(0, np.int64)
        return Predictions(none, none)


def create(config: TrainConfig) -> Constant:
    """What `trainer: benchmarks.flower_member:create` calls."""
    return Constant(config)


def take_part(home: Path, model: str, constant: float, data: Path) -> None:
    """Round after round."""
    config = TrainConfig.parse(
        {
            "trainer": "benchmarks.flower_member:create",
            "data": str(data),
            "options": {"constant": constant},
        }
    )
    with Session.open(Home(home)) as session:
        for ended in contribute(session, model, Terms(config, SendPolicy())):
            print(ended.id, flush=True)


if __name__ == "__main__":
    take_part(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
