from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from benchmarks.cold.choice import choose
from benchmarks.cold.comparison import PRETRAINED, Effort, Measurements, Place, efforts, signed
from benchmarks.cold.outcome import Run, Score, pack
from benchmarks.cold.records import Records
from coldmerge.core.errors import DataError
from tests.benchmarks.cold_records import STEPS, Writer, whole


def one(variant: str, release: int, hits: list[int], **of: object) -> Score:
    right = np.array(hits, dtype=bool)
    where: dict[str, object] = {
        "seed": 0,
        "task": "a",
        "group": "seen",
        "protocol": "lp100",
        "draw": 0,
        **of,
    }
    return Score(
        variant=variant,
        release=release,
        accuracy=float(right.mean()),
        macro_f1=0.0,
        correct=pack(right),
        n=len(right),
        **where,  # type: ignore[arg-type]
    )


def test_pairs_are_of_the_same_example_seed_and_draw() -> None:
    measured = Measurements(
        [
            one("base", 0, [1, 0, 0, 0]),
            one("base", 0, [0, 0, 0, 0], draw=1),
            one("mean", 1, [0, 1, 1, 0]),
            one("mean", 1, [0, 0, 0, 1], draw=1),
            one("mean", 1, [1, 1, 1, 1], draw=2),  # the base lacks it
        ]
    )
    found = measured.compare(Place("mean", 1), PRETRAINED, "lp100", "seen")
    assert found is not None
    assert found.sets["a"].tolist() == [[[-1, 1, 1, 0], [0, 0, 0, 1]]]
    assert found.mean == found.median == pytest.approx(25)
    assert (found.wins, found.losses, found.draws, found.seeds) == (1, 0, 2, (0,))
    assert found.sets_interval is None


def test_a_base_that_was_measured_once_serves_every_seed() -> None:
    measured = Measurements(
        [
            one("base", 0, [0, 0]),
            *(one("mean", 1, [1, seed], seed=seed) for seed in (0, 1)),
            *(one("ties", 1, [1, 1], seed=seed) for seed in (1, 2)),
        ]
    )
    found = measured.compare(Place("mean", 1), PRETRAINED, "lp100", "seen")
    assert found is not None
    assert found.by_seed == {0: 50, 1: 100}
    other = measured.compare(Place("ties", 1), Place("mean", 1), "lp100", "seen")
    assert other is not None
    assert other.seeds == (1,)


def test_a_seed_that_lacks_a_set_is_left_out() -> None:
    scores = [one("base", 0, [0, 0], task=task) for task in "ab"]
    scores += [one("mean", 1, [1, 1], task=task) for task in "ab"]
    scores += [one("mean", 1, [0, 0], seed=1)]
    measured = Measurements(scores)
    found = measured.compare(Place("mean", 1), PRETRAINED, "lp100", "seen")
    level = measured.accuracy(Place("mean", 1), "lp100", "seen")
    assert found is not None
    assert level is not None
    assert (found.seeds, found.mean) == ((0,), 100)
    assert (level.seeds, level.mean, level.spread) == (1, 100, 0)


def test_a_release_that_lacks_a_set_is_not_the_last_one() -> None:
    scores = [one("mean", 1, [1, 1], task=task) for task in "ab"]
    measured = Measurements([*scores, one("mean", 2, [1, 1])])
    assert measured.last("mean", "lp100") == Place("mean", 1)
    assert measured.last("mean", "full") is None


def test_other_examples_are_refused() -> None:
    measured = Measurements([one("base", 0, [0, 0, 0]), one("mean", 1, [1, 1])])
    with pytest.raises(DataError) as caught:
        measured.compare(Place("mean", 1), PRETRAINED, "lp100", "seen")
    assert caught.value.code == "cold.unpaired"


def test_the_counterpart_has_as_many_steps() -> None:
    measured = Measurements([one("mean", release, [1]) for release in (1, 2, 3)])
    effort = {Place("mean", r): Effort(100.0 * r, 0, 0) for r in (1, 2, 3)}
    effort |= {Place("oneshot-mean", 1): Effort(296, 0, 0), Place("atm", 4): Effort(200, 0, 0)}
    for place, number in ((Place("oneshot-mean", 1), 3), (Place("atm", 4), 2)):
        assert measured.counterpart(place, effort, "lp100") == Place("mean", number)
    assert measured.counterpart(Place("ema", 2), {}, "lp100") == Place("mean", 2)
    assert measured.counterpart(Place("ema", 9), {}, "lp100") == Place("mean", 3)


def test_efforts_add_up_parts_and_average_seeds() -> None:
    run = Run("alone", 0, 1, "d", bytes=10, train_seconds=2.0, steps=4, task="a")
    runs = [run, replace(run, task="b"), replace(run, seed=1, steps=8, train_seconds=6.0, bytes=40)]
    assert efforts(runs) == {Place("alone", 1): Effort(8, 5.0, 30)}


def test_no_minus_before_a_zero() -> None:
    assert [signed(v) for v in (-0.04, 0.06, -1.26)] == ["+0.0", "+0.1", "-1.3"]


def test_every_set_is_reported_by_a_choice_made_without_it(tmp_path: Path) -> None:
    records = Records.read(whole(tmp_path))
    choice = records.choice
    assert choice is not None
    told = [task for fold, _ in choice.by_fold for task in fold]
    assert sorted(told) == sorted([*records.plan.seen, *records.plan.unseen])
    assert set(choice.rotated.gains) == set(told)
    assert choice.held is None
    assert choice.chosen == next(iter(choice.standing)) == "sam"
    assert choice.standing["mean"] == 0
    over = [records.over_mean(group, "sam") for group in ("seen", "unseen")]
    if {name for _, name in choice.by_fold} == {"sam"}:
        assert choice.rotated.mean == pytest.approx(fmean(one.mean for one in over if one))


def test_sets_held_out_take_no_part(tmp_path: Path) -> None:
    """A policy that is good on the held-out sets alone is not chosen."""
    writer = Writer(tmp_path)
    writer.measure("base", 0, {"seen": 0, "unseen": 0})
    writer.measure("mean", 1, {"seen": 5, "unseen": 1})
    held = [*writer.plan.seen[4:], *writer.plan.unseen[4:]]
    rest = [*writer.plan.seen[:4], *writer.plan.unseen[:4]]
    for name, there, elsewhere in (("steady", 8, 8), ("lucky", 0, 30)):
        writer.measure(name, 1, {"seen": there, "unseen": there}, tasks=rest)
        writer.measure(name, 1, {"seen": elsewhere, "unseen": elsewhere}, tasks=held)
    records = Records.read(tmp_path)
    choice = choose(records.measured, records.policies, records.effort, held=held)
    assert choice is not None
    assert choice.held is not None
    assert choice.chosen == "steady"
    assert sorted(choice.held.gains) == sorted(held)
    assert not {task for fold, _ in choice.by_fold for task in fold} & set(held)
    assert choice.verdict is choice.held
    assert choice.held.interval.low < choice.held.mean < choice.held.interval.high


def test_where_nothing_is_better_the_mean_is_chosen(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.measure("mean", 1, {"seen": 5, "unseen": 5})
    writer.measure("worse", 1, {"seen": 0, "unseen": 0})
    records = Records.read(tmp_path)
    choice = records.choice
    assert choice is not None
    assert (choice.chosen, choice.verdict.mean) == ("mean", 0)
    assert str(choice.verdict.interval) == "[+0.0, +0.0]"


def test_without_policies_there_is_no_choice(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.measure("mean", 1, {"seen": 5, "unseen": 5})
    records = Records.read(tmp_path)
    assert records.choice is None
    assert records.effort[Place("mean", 1)].steps == STEPS
