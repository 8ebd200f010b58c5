"""What a release is worth on a set: probes on frozen features, and fine-tuning.

Features, probe and training are the ones contributors use at home. A set's test examples are
its first ones, the same for every release; probes and fine-tunes draw from a fixed pool of
training examples, the same draws for every release, so that all of it compares in pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.cold.outcome import Group, Protocol, Score, pack
from benchmarks.cold.sets import SHOTS, Item, TaskSet, draw
from coldmerge.evaluation import scores as both_scores
from coldmerge_client.training import models
from coldmerge_client.training.config import TrainConfig
from coldmerge_client.training.probe import Encoder, linear_probe

Floats = NDArray[np.float32]
POOL_SEED = 7


@dataclass(frozen=True)
class Ruler:
    """How everything is measured.

    Attributes:
        max_length: tokens of a text.
        freeze: patterns of what no release changes: run once, and kept.
        test: at most so many of a set's test examples, its first ones.
        pool: at most so many of its training examples, from which `shots` are drawn.
        draws: how often.
        tune: a training configuration without data, for fine-tuning.

    """

    max_length: int
    freeze: tuple[str, ...]
    test: int
    pool: int
    draws: int
    tune: dict[str, Any]
    shots: int = SHOTS

    def items(self, task: TaskSet) -> tuple[list[int], list[Item], list[Item]]:
        """Positions of the pool, its examples, and the test examples."""
        everything = range(len(task.train))
        size = min(self.pool, len(task.train))
        pool = sorted(draw(task, everything, size, POOL_SEED))
        return pool, [task.train[place] for place in pool], list(task.test[: self.test])


@dataclass(frozen=True)
class Subject:
    """A release, and the seeds whose draws it is measured with: its own, or all for the base."""

    variant: str
    release: int
    digest: str
    folder: Path
    seeds: tuple[int, ...]


class Probing:
    """Probes on one release. Features are kept below `cache`, by release and set."""

    def __init__(self, subject: Subject, ruler: Ruler, cache: Path) -> None:
        self._subject, self._ruler, self._cache = subject, ruler, cache
        self._encoder: Encoder | None = None

    def score(
        self, task: TaskSet, group: Group, protocols: Sequence[Protocol], known: set[Any]
    ) -> list[Score]:
        """`lp100` and `frozen`, without what is `known` (keys of scores)."""
        ruler = self._ruler
        pool, train, test = ruler.items(task)
        wanted = [
            (protocol, seed, number)
            for protocol in protocols
            for seed in self._subject.seeds
            for number in range(ruler.draws if protocol == "lp100" else 1)
            if self._key(seed, task, protocol, number) not in known
        ]
        if not wanted:
            return []
        features = self._features(task, [*train, *test])
        places = {position: row for row, position in enumerate(pool)}
        labels = np.array([item.label for item in test])
        done: dict[object, NDArray[np.int64]] = {}
        found = []
        for protocol, seed, number in wanted:
            purpose = (seed, number) if protocol == "lp100" else ()
            if purpose not in done:
                used = draw(task, pool, ruler.shots, *purpose) if purpose else pool
                rows = [places[position] for position in used]
                own = np.array([task.train[position].label for position in used])
                done[purpose] = linear_probe(
                    features[rows], own, features[len(pool) :], labels, seed=0
                )
            found.append(
                score(self._subject, seed, task, group, protocol, number, labels, done[purpose])
            )
        return found

    def _key(self, seed: int, task: TaskSet, protocol: str, number: int) -> tuple[Any, ...]:
        about = self._subject
        return (about.variant, seed, about.release, task.name, protocol, number)

    def _features(self, task: TaskSet, items: Sequence[Item]) -> Floats:
        """Mean-pooled states of texts: float32 [n, hidden]."""
        ruler = self._ruler
        about = [task.digest(), ruler.max_length, ruler.pool, ruler.test]
        name = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
        path = self._cache / self._subject.digest[:32] / f"{name}.npy"
        if path.exists():
            kept: Floats = np.load(path)
            return kept
        if self._encoder is None:
            config = TrainConfig.parse({**ruler.tune, "data": "."})
            where = models.device(config)
            self._encoder = Encoder(
                self._subject.folder,
                ruler.max_length,
                device=where,
                bf16=models.use_bf16(config, where),
            )
        examples = self._encoder.tokenize([i.text for i in items], [i.pair for i in items])
        trunk = self._cache / "trunk" if ruler.freeze else None
        found = self._encoder.pooled(examples, ruler.freeze, trunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, found)
        partial.rename(path)
        return found


def score(
    subject: Subject,
    seed: int,
    task: TaskSet,
    group: Group,
    protocol: Literal["lp100", "ft100", "full", "frozen"],
    number: int,
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
) -> Score:
    """A measurement, as it is written down."""
    found = both_scores(labels, predicted)
    return Score(
        variant=subject.variant,
        seed=seed,
        release=subject.release,
        task=task.name,
        group=group,
        protocol=protocol,
        draw=number,
        accuracy=round(found.accuracy, 6),
        macro_f1=round(found.macro_f1, 6),
        correct=pack(labels == predicted),
        n=len(labels),
    )
