"""A trainer for `file.py:create` that judges at once and finds every candidate a bit better."""

from __future__ import annotations

import json

import numpy as np

from coldmerge.core.progress import Progress, silent
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.trainer import EvaluateJob, Predictions, Trained, TrainJob

ITEMS = 40


class Quick:
    """Right on half of the items, and on one more under any release but the first."""

    def __init__(self, first: str) -> None:
        self._first = first

    def train(self, job: TrainJob, progress: Progress = silent) -> Trained:
        """Never called: these tests push fine-tunes that exist."""
        raise NotImplementedError

    def predict(self, job: EvaluateJob, progress: Progress = silent) -> Predictions:
        """The same items in the same order, whatever the release."""
        labels = np.arange(ITEMS, dtype=np.int64) % 2
        predicted = np.zeros(ITEMS, np.int64)
        predicted[1] = int(job.digest != self._first)
        progress("probe", ITEMS, ITEMS)
        return Predictions(labels, predicted)


def create(config: TrainConfig) -> Quick:
    """Called with the configuration; its data file names release 0."""
    return Quick(json.loads(config.data.train.read_text())["release_0"])
