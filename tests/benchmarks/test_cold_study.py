"""benchmarks/cold: what is still to do once everything is probed."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.cold.bar import Bar
from benchmarks.cold.measuring import Ruler
from benchmarks.cold.outcome import Group, Outcome, Plan, Run, Score, pack
from benchmarks.cold.planning import Parts
from benchmarks.cold.recipes import Federation
from benchmarks.cold.sets import Item, Split, TaskSet
from benchmarks.cold.study import Study

SEEN, UNSEEN = ("a", "b"), ("c", "d")


def sets(names: tuple[str, ...]) -> tuple[TaskSet, ...]:
    items = (Item("one", None, 0), Item("two", None, 1))
    return tuple(TaskSet(name, Path(name), ("no", "yes"), items, (), items) for name in names)


def scores(variant: str, right: int) -> list[Score]:
    hits = pack([place < right for place in range(10)])
    release = int(variant != "base")
    groups: dict[Group, tuple[str, ...]] = {"seen": SEEN, "unseen": UNSEEN}
    return [
        Score(variant, 0, release, task, group, "lp100", 0, right / 10, 0, hits, 10)
        for group, tasks in groups.items()
        for task in tasks
    ]


def study(folder: Path, recipes: tuple[str, ...], ema: int) -> Study:
    """Everything probed: the mean has 6 of 10 right, TIES 5, EMA so many."""
    outcome = Outcome(folder)
    outcome.claim(Plan({}, SEEN, UNSEEN))
    for name, right in (("base", 4), ("mean", 6), ("ties", 5), ("ema", ema)):
        outcome.note(Run(name, 0, int(name != "base"), name, steps=10), *scores(name, right))
        (folder / "scratch" / "releases" / f"{name}-0-1").mkdir(parents=True)
    return Study(
        Parts(recipes, (), ("lp100", "ft100"), seeds=1, rounds=1),
        Federation(folder, SEEN, (2, 2), "digits", rounds=1, changes={}),
        Split(sets(SEEN), sets(UNSEEN), {}),
        Ruler(16, (), 2, 2, 1, {}),
        ("base", folder),
        0,
        3,
        outcome,
        ProcessPoolExecutor(1),
        Bar(show=False),
    )


def test_the_best_policy_is_fine_tuned_and_no_other(tmp_path: Path) -> None:
    mine = study(tmp_path, ("ties", "ema"), ema=8)
    left = mine.left()
    assert len(left) == 3 * 4
    assert {title.split()[1] for title in left} == {"ema"}
    assert left[0].startswith("ft100 ema 1 ")
    assert mine.left() == left, "it is asked once"


@pytest.mark.parametrize(("recipes", "ema"), [(("ties", "ema"), 6), (("lora",), 8)])
def test_without_a_better_policy_nothing_is_left(
    tmp_path: Path, recipes: tuple[str, ...], ema: int
) -> None:
    assert study(tmp_path, recipes, ema).left() == []
