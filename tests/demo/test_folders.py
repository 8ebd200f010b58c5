from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldmerge.core.errors import DataError
from coldmerge.demo.folders import Example, load, split

TEXTS = [Example(f"text {number}", number % 4) for number in range(80)]


def test_a_split_is_complete_disjoint_and_has_every_label() -> None:
    task = split("a", TEXTS, "0123", seed=0)
    parts = (task.train, task.validation, task.test)
    assert sorted(e.content for part in parts for e in part) == sorted(e.content for e in TEXTS)
    assert all({e.label for e in part} == {0, 1, 2, 3} for part in parts)
    assert split("a", TEXTS, "0123", seed=0) == task
    assert split("a", TEXTS, "0123", seed=1) != task


def test_saved_tasks_come_back(tmp_path: Path) -> None:
    # U+2028 and U+0085 end a line for `splitlines`, and are part of a text here.
    pairs = [Example("one\u2028more", 0, "other"), Example("zwei\x85ü", 1, "andere")] * 10
    for examples in (TEXTS, pairs, [Example((1, 2), n % 2) for n in range(20)]):
        task = split("a", examples, "0123", seed=0)
        folder = task.save(tmp_path / str(len(examples)) / "a")
        found = load(folder)
        assert (found.train, found.validation, found.test) == (
            task.train,
            task.validation,
            task.test,
        )
        assert found.pairs == (examples is pairs)


def test_without_validation_a_part_of_train_is_held_out(tmp_path: Path) -> None:
    folder = split("a", TEXTS, "0123", seed=0).save(tmp_path / "a")
    whole = load(folder)
    (folder / "validation.jsonl").unlink()
    found = load(folder)
    assert set(found.validation).isdisjoint(found.train)
    assert {*found.train, *found.validation} == set(whole.train)
    assert found.test == whole.test


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "demo.empty_data_file"),
        ("{not json", "demo.bad_line"),
        ("[1]", "demo.bad_line"),
        (json.dumps({"text": "no label"}), "demo.bad_line"),
        (json.dumps({"text": "x", "label": "word"}), "demo.bad_line"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, code: str) -> None:
    folder = split("a", TEXTS, "0123", seed=0).save(tmp_path / "a")
    (folder / "train.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert caught.value.code == code


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert caught.value.code == "demo.no_data_file"
