from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coldmerge.demo.folders import Example, Task, split
from coldmerge.demo.scores import Bench, Floats, Measure, TaskScore, across, measure

CLASSES = 4


def noisy_task(name: str) -> Task:
    generator = np.random.default_rng(len(name))
    examples = [
        Example((*map(int, generator.integers(0, 9, 6)), label), label)
        for label in range(CLASSES)
        for _ in range(60)
    ]
    return split(name, examples, [str(label) for label in range(CLASSES)], seed=0)


def features(release: Path, examples: Sequence[Example]) -> Floats:
    """A release called `good` shows the label; any other only noise."""
    good = release.name == "good"
    rows = []
    for example in examples:
        values = [float(value) for value in example.content[:6]]
        one_hot = [20.0 * (good and example.label == label) for label in range(CLASSES)]
        rows.append([*values, *one_hot])
    return np.array(rows, np.float32)


def test_a_better_release_scores_better_on_the_same_draws() -> None:
    bench = Bench([noisy_task("a"), noisy_task("bb")], [noisy_task("ccc")], features, shots=30)
    told: list[str] = []
    good = bench.score(Path("good"), told.append)
    poor = bench.score(Path("poor"))
    assert told == ["a", "bb", "ccc"]
    assert [score.task for score in good.seen] == ["a", "bb"]
    assert across(good.seen).mean > 99
    assert across(poor.seen).mean < 60
    assert across(poor.unseen).spread > 0
    assert bench.score(Path("poor")) == poor


def test_each_draw_has_every_label_and_the_asked_number() -> None:
    bench = Bench([], [], features, shots=CLASSES)
    task = noisy_task("a")
    for draw in range(20):
        picked = bench._draw(task, draw)
        assert {task.train[position].label for position in picked} == set(range(CLASSES))
        assert len(picked) == len(set(picked)) == CLASSES
    assert bench._draw(task, 0) != bench._draw(task, 1)


def test_means_are_over_tasks_and_spreads_over_draws() -> None:
    scores = [TaskScore("a", (10.0, 20.0)), TaskScore("b", (30.0, 20.0))]
    assert across(scores) == Measure(20.0, 0.0)
    assert measure([1.0, 3.0]).mean == 2.0
    assert measure([1.0, 3.0]).spread == pytest.approx(2**0.5)
    assert measure([5.0]) == Measure(5.0, 0.0)
    assert np.isnan(across([]).mean)
