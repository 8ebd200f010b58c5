"""The culprit search on text with real processes; the long one takes a folder of real tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.culprit import ORGANIZATIONS, permuted, shares
from coldmerge.demo.folders import Example, Task

DATA = "COLDMERGE_TASKS"


def a_task(count: int = 60) -> Task:
    examples = tuple(Example(f"text {number}", number % 3) for number in range(count))
    return Task("t", ("0", "1", "2"), examples, examples[:12], examples[12:24])


def test_shares_have_no_text_in_common_and_lose_none() -> None:
    task = a_task()
    parts = shares(task)
    assert len({part.name for part in parts}) == ORGANIZATIONS
    texts = [example.content for part in parts for example in part.train]
    assert sorted(map(str, texts)) == sorted(str(example.content) for example in task.train)


def test_permuted_labels_are_mostly_wrong_and_only_in_training() -> None:
    task = a_task()
    wrong = permuted(task)
    pairs = list(zip(task.train, wrong.train, strict=True))
    assert all(one.content == two.content for one, two in pairs)
    assert sum(one.label != two.label for one, two in pairs) > len(pairs) / 2
    assert sorted(one.label for one in wrong.train) == sorted(one.label for one in task.train)
    assert wrong.validation == task.validation


@pytest.mark.slow
@pytest.mark.skipif(DATA not in os.environ, reason=f"{DATA} names no folder of tasks")
def test_a_flipped_update_is_left_out() -> None:
    """`COLDMERGE_TASKS=FOLDER pytest tests/benchmarks/test_culprit.py`: about three minutes."""
    words = ["--data", os.environ[DATA], "--attack", "sign_flip", "--strength", "8", "--clip", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.culprit", *words, "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=1500,
    )
    found = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert found["state"] == "PUBLISHED"
    assert found["culprit"] in found["left_out"]
    assert len(found["left_out"]) == 2
