"""What releases are worth: probes on the tasks that contributors train on, and on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldmerge.core.progress import Progress
from coldmerge.demo.scores import Bench, Features, TaskScore, across, text_features
from coldmerge_client.training.config import TrainConfig
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.data import Shares
from coldmerge_simulation.folder import RunFolder
from coldmerge_simulation.models import DIGITS, train_settings

SCORES = "scores.json"


class Scoring:
    """Measures releases, each once. Accuracies are in points, 0 to 100."""

    def __init__(self, folder: RunFolder, config: SimulationConfig, shares: Shares) -> None:
        self._folder, self._shares = folder, shares
        self._known: dict[str, Any] = folder.read(SCORES) or {}
        training = train_settings(config)
        few = {"shots": 10, "draws": 20} if training.get("trainer") == DIGITS else {}
        features = _features(training, folder.path / "features")
        self._bench = Bench(shares.seen, shares.unseen, features, seed=config.seed, **few)

    def has(self, number: int) -> bool:
        """Whether a release was measured."""
        return str(number) in self._known

    def score(self, number: int, release: Path, progress: Progress) -> None:
        """Measure a release by its number, and write it down."""
        tasks = len(self._shares.seen) + len(self._shares.unseen)
        done = iter(range(tasks))
        found = self._bench.score(
            release, lambda _: progress(f"release {number}: measuring", next(done), tasks)
        )
        self._known[str(number)] = {"seen": _values(found.seen), "unseen": _values(found.unseen)}
        self._folder.write(SCORES, self._known)


def _values(scores: Sequence[TaskScore]) -> dict[str, Any]:
    mean = across(scores).mean
    return {
        "mean": None if math.isnan(mean) else round(mean, 4),
        "tasks": {score.task: round(score.measure.mean, 4) for score in scores},
    }


def _features(training: dict[str, Any], cache: Path) -> Features:
    if training.get("trainer") == DIGITS:
        from coldmerge.demo import digits

        return digits.features
    return text_features(TrainConfig.parse({**training, "data": str(cache)}), cache)
