"""The three files of benchmarks/cold: what is written is read again, and nothing is mixed up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cold.outcome import RUNS, Outcome, Plan, Run, Score, pack, unpack
from coldmerge.core.errors import ConflictError, DataError

PLAN = Plan({"rounds": 3}, ("a",), ("b",), settings={"lr": 1e-4}, costs={"total": 12.5})
RUN = Run("mean", 0, 1, "d" * 64, bytes=10, train_seconds=1.5, steps=4, examples=64)


def score(variant: str, release: int, hits: list[bool]) -> Score:
    return Score(
        variant, 0, release, "a", "seen", "lp100", 2, sum(hits) / len(hits), 0.5, pack(hits), 3
    )


def test_hits_survive_packing() -> None:
    hits = np.random.default_rng(0).random(301) < 0.7
    assert np.array_equal(unpack(pack(hits), 301), hits)


def test_lines_are_read_again_and_half_a_line_is_none(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path)
    assert outcome.runs() == []
    mine = score("mean", 1, [True, False, True])
    outcome.note(RUN, mine)
    with (tmp_path / RUNS).open("a") as file:
        file.write('{"variant": "mean", "see')
    assert outcome.runs() == [RUN]
    again = replace(RUN, release=2)
    outcome.note(again, replace(RUN, digest="other"))
    assert outcome.runs() == [RUN, again]
    assert outcome.scores() == [mine]
    assert outcome.scores()[0].hits().tolist() == [True, False, True]


def test_a_folder_holds_one_plan(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path / "out")
    with pytest.raises(DataError, match=r"cold\.no_plan"):
        outcome.plan()
    assert outcome.claim(PLAN) == PLAN
    slower = replace(PLAN, costs={"total": 99.0}, left_out=("seeds",))
    assert outcome.claim(slower) == PLAN
    with pytest.raises(ConflictError, match=r"cold\.other_plan") as caught:
        outcome.claim(replace(PLAN, settings={"lr": 1e-3}))
    assert (caught.value.expected, caught.value.got) == ("settings.lr = 0.0001", "0.001")
