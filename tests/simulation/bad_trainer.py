"""A trainer that does to each contributor what the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from coldmerge.core.progress import Progress, silent
from coldmerge.demo.digits import Digits
from coldmerge.demo.digits import create as digits
from coldmerge_client.training import EvaluateJob, Predictions, TrainConfig, Trained, TrainJob


class Bad:
    """Trains as the digits do, and then spoils it."""

    def __init__(self, config: TrainConfig) -> None:
        self._good: Digits = digits(config)
        self._what = str(config.options.get(Path(config.data.train).name, ""))

    def train(self, job: TrainJob, progress: Progress = silent) -> Any:
        if self._what == "raises":
            raise RuntimeError("out of coffee")
        trained = self._good.train(job, progress)
        if self._what == "nothing":
            return None
        path = trained.folder / "model.safetensors"
        tensors = load_file(path)
        if self._what == "nan":
            tensors["dense.bias"] = np.full_like(tensors["dense.bias"], np.nan)
        elif self._what == "shape":
            tensors["dense.bias"] = np.zeros(7, np.float32)
        elif self._what == "keys":
            tensors = {f"{name}_of_mine": value for name, value in tensors.items()}
        save_file(tensors, path)
        if self._what == "unpaid":
            return Trained(trained.folder, trained.head, 0)
        return trained

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        if self._what == "blind":
            raise RuntimeError("cannot see")
        return self._good.predict(job, progress)


def create(config: TrainConfig) -> Bad:
    """What `bad_trainer.py:create` names."""
    return Bad(config)
