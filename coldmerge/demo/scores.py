"""What a release is worth on a task: a linear probe on 100 examples, several times over.

The probe, and the features it stands on, are the ones that contributors judge candidates
with. The same examples are drawn for every release, so that releases compare in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from coldmerge.demo.folders import Example, Task
from coldmerge.evaluation import accuracy
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.probe import embed, linear_probe

Floats = NDArray[np.float32]
Features = Callable[[Path, Sequence[Example]], Floats]
"""Features of examples under a release: float32 [n, hidden]."""

MAX_TEST = 300


@dataclass(frozen=True)
class Measure:
    """A mean in points, and its spread over the draws of the probe's examples."""

    mean: float
    spread: float


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task in points (0 to 100), one for each draw."""

    task: str
    draws: tuple[float, ...]

    @property
    def measure(self) -> Measure:
        """Mean and spread over the draws."""
        return measure(self.draws)


@dataclass(frozen=True)
class Scores:
    """One release on all tasks."""

    seen: tuple[TaskScore, ...]
    unseen: tuple[TaskScore, ...]


def measure(values: Sequence[float]) -> Measure:
    """Mean and standard deviation (0 for a single value)."""
    return Measure(fmean(values), stdev(values) if len(values) > 1 else 0.0)


def across(scores: Sequence[TaskScore]) -> Measure:
    """The mean over tasks, and its spread over draws; nan without tasks."""
    if not scores:
        return Measure(float("nan"), 0.0)
    return measure([fmean(values) for values in zip(*(s.draws for s in scores), strict=True)])


def text_features(config: TrainConfig, cache: Path) -> Features:
    """The contributors' own features: the mean of the body's last hidden states."""

    def features(release: Path, examples: Sequence[Example]) -> Floats:
        return embed(
            release,
            [str(example.content) for example in examples],
            config.max_length,
            pairs=[example.pair for example in examples],
            freeze=config.freeze,
            cache=cache,
        )

    return features


@dataclass(frozen=True)
class Bench:
    """Measures releases on tasks that contributors train on, and on tasks nobody has.

    Attributes:
        seen: one task for each contributor; scored on its test part.
        unseen: tasks of nobody.
        features: see `Features`.
        shots: how many training examples a probe gets.
        draws: how often they are drawn.
        seed: decides which.

    """

    seen: Sequence[Task]
    unseen: Sequence[Task]
    features: Features
    shots: int = 100
    draws: int = 5
    seed: int = 0

    def score(self, release: Path, tell: Callable[[str], None] = lambda _: None) -> Scores:
        """Probe every task; `tell` hears each task's name before its turn."""

        def each(tasks: Sequence[Task]) -> tuple[TaskScore, ...]:
            found = []
            for task in tasks:
                tell(task.name)
                found.append(self._score(release, task))
            return tuple(found)

        return Scores(each(self.seen), each(self.unseen))

    def _score(self, release: Path, task: Task) -> TaskScore:
        test = task.test[:MAX_TEST]
        picks = [self._draw(task, draw) for draw in range(self.draws)]
        used = sorted({position for pick in picks for position in pick})
        features = self.features(release, [*(task.train[i] for i in used), *test])
        rows = {position: row for row, position in enumerate(used)}
        wanted = np.array([example.label for example in test])
        points = []
        for pick in picks:
            predicted = linear_probe(
                features[[rows[position] for position in pick]],
                np.array([task.train[position].label for position in pick]),
                features[len(used) :],
                wanted,
                self.seed,
            )
            points.append(100 * accuracy(wanted, predicted))
        return TaskScore(task.name, tuple(points))

    def _draw(self, task: Task, draw: int) -> list[int]:
        """Positions of the probe's examples: one of each label, then any."""
        generator = np.random.default_rng([self.seed, draw, *task.name.encode()])
        order = [int(position) for position in generator.permutation(len(task.train))]
        first = {task.train[position].label: position for position in reversed(order)}
        return list(dict.fromkeys([*sorted(first.values()), *order]))[: self.shots]
