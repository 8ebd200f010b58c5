"""The data folder: which sets it holds, which of them can be used, who trains and who measures.

A set is a folder with train.jsonl and test.jsonl (validation.jsonl if there is one), a JSON
object a line: `text`, perhaps `text_pair`, and `label`, a word or an integer. Nothing is
assumed about names. A set that cannot be used is an error when it was asked for by name, and
is left out, with the reason, when it was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coldmerge.core.errors import ConfigError, DataError

SHOTS = 100
LEAST_TEST = 50
MOST_SEEN = 8
"""How many sets train, unless --seen names them."""


@dataclass(frozen=True)
class Item:
    """One example; `label` is a position in the set's labels."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class TaskSet:
    """One set: everything that is measured on it, in the order of its files."""

    name: str
    folder: Path
    labels: tuple[str, ...]
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]

    def digest(self) -> str:
        """sha256 of what the files say, so that a changed set is noticed."""
        total = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for item in part:
                line = [item.text, item.pair, self.labels[item.label]]
                total.update(json.dumps(line).encode())
        return total.hexdigest()


@dataclass(frozen=True)
class Split:
    """Who trains and who measures, and what takes no part, with the reason."""

    seen: tuple[TaskSet, ...]
    unseen: tuple[TaskSet, ...]
    dropped: dict[str, str]


def read(folder: Path, seen: Sequence[str] | None, unseen: Sequence[str] | None) -> Split:
    """The sets of a data folder; without names every other set trains, up to eight.

    With seen sets named all others are unseen; with unseen sets named the others train, up to
    eight.

    Raises:
        ConfigError: there are no such sets, or one is named twice.
        DataError: a set that was named cannot be used, or too few can.
    """
    there = _names(folder)
    _check_names(folder, there, seen or (), unseen or ())
    asked = {*(seen or ()), *(unseen or ())}
    wanted = sorted(asked if seen is not None and unseen is not None else there)
    found: dict[str, TaskSet] = {}
    dropped: dict[str, str] = {}
    for name in wanted:
        try:
            found[name] = read_set(folder / name)
        except DataError as error:
            if name in asked:
                raise
            dropped[name] = f"{error.message} ({error.got})" if error.got else error.message
    free = [name for name in found if name not in asked]
    if seen is None:
        seen = (free[::2] if unseen is None else free)[:MOST_SEEN]
    if unseen is None:
        unseen = [name for name in free if name not in seen]
    _check_enough(folder, seen, unseen, dropped)
    used = {*seen, *unseen, *dropped}
    dropped |= {name: "not asked for" for name in there if name not in used}
    return Split(tuple(found[n] for n in seen), tuple(found[n] for n in unseen), dropped)


def _names(folder: Path) -> list[str]:
    there = sorted({path.parent.name for path in folder.glob("*/*.jsonl")})
    if not there:
        raise ConfigError(
            "cold.no_data",
            f"There are no sets in {folder}.",
            expected="folders with train.jsonl and test.jsonl",
            got="a folder without them" if folder.is_dir() else "no such folder",
            hint="Give --data a folder with one folder per set.",
        )
    return there


def _check_names(
    folder: Path, there: Sequence[str], seen: Sequence[str], unseen: Sequence[str]
) -> None:
    both = [*seen, *unseen]
    missing = [name for name in both if name not in there]
    if missing:
        raise ConfigError(
            "cold.unknown_set",
            f"{folder} has no set {missing[0]}.",
            expected=", ".join(there),
            got=", ".join(missing),
            hint="Name folders of --data in --seen and --unseen.",
        )
    twice = sorted({name for name in both if both.count(name) > 1})
    if twice:
        raise ConfigError(
            "cold.set_named_twice",
            f"The set {twice[0]} is named twice.",
            expected="each set once, in --seen or in --unseen",
            got=", ".join(twice),
            hint="What somebody trains on cannot measure what nobody trained on.",
        )


def _check_enough(
    folder: Path, seen: Sequence[str], unseen: Sequence[str], dropped: dict[str, str]
) -> None:
    if len(seen) >= 2 and unseen:
        return
    why = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
    raise DataError(
        "cold.too_few_sets",
        f"{folder} has too few sets that can be used.",
        expected="two that contributors train on, and one that nobody does",
        got=f"{len(seen)} seen, {len(unseen)} unseen" + (f"; left out: {why}" if why else ""),
        hint="Add sets, or correct those that were left out.",
    )


def read_set(folder: Path) -> TaskSet:
    """One set.

    Raises:
        DataError: a part is missing, a line is no example, a text is empty, there is one label
            only, a label is absent from the training part, or there are too few examples.
    """
    rows = {part: _rows(folder / f"{part}.jsonl") for part in ("train", "validation", "test")}
    labels = sorted({row["label"] for row in rows["train"]}, key=_natural)
    if len(labels) < 2:
        raise _unusable(
            folder, "one_class", "has one label only: there is nothing to learn", labels
        )
    place = {label: position for position, label in enumerate(labels)}
    for part in ("validation", "test"):
        strange = sorted({row["label"] for row in rows[part]} - place.keys())
        if strange:
            what = f"has labels in {part}.jsonl that train.jsonl lacks"
            raise _unusable(folder, "unknown_label", what, strange[:10])
    least = SHOTS + len(labels)
    if len(rows["train"]) < least or len(rows["test"]) < LEAST_TEST:
        counts = [f"{len(rows['train'])} to train on", f"{len(rows['test'])} to test with"]
        what = f"needs {least} examples to train on and {LEAST_TEST} to test with"
        raise _unusable(folder, "too_small", what, counts)

    def items(part: str) -> tuple[Item, ...]:
        return tuple(
            Item(row["text"], row.get("text_pair"), place[row["label"]]) for row in rows[part]
        )

    return TaskSet(
        folder.name, folder, tuple(labels), items("train"), items("validation"), items("test")
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists() and path.stem == "validation":
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path.parent, "no_split", f"has no readable {path.name}", None) from error
    found = [_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise _unusable(path.parent, "no_split", f"has no example in {path.name}", None)
    if len({isinstance(row["label"], str) for row in found}) > 1:
        what = f"has words and integers as labels in {path.name}: one column has one type"
        raise _unusable(path.parent, "mixed_labels", what, None)
    return [{**row, "label": str(row["label"]).strip()} for row in found]


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    where = f"line {number} of {path.name}"
    if not isinstance(row, dict) or not _is_label(row.get("label")):
        what = f"has no example with a text and a label in {where}"
        raise _unusable(path.parent, "bad_line", what, [line[:80]])
    pair = row.get("text_pair")
    if not isinstance(row.get("text"), str) or not isinstance(pair, str | None):
        what = f"has no example with a text and a label in {where}"
        raise _unusable(path.parent, "bad_line", what, [line[:80]])
    if not _is_unicode(row["text"], pair or "", str(row["label"])):
        raise _unusable(path.parent, "bad_line", f"has half a character in {where}", None)
    if not row["text"].strip():
        raise _unusable(path.parent, "empty_text", f"has an empty text in {where}", None)
    return row


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip() != ""


def _is_unicode(*texts: str) -> bool:
    """JSON can hold half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unusable(folder: Path, what: str, why: str, got: Sequence[str] | None) -> DataError:
    return DataError(
        f"cold.{what}",
        f"The set {folder.name} {why}.",
        got=", ".join(got) if got else None,
        hint="Correct its files, or leave it out of --seen and --unseen.",
        set=folder,
    )


def held(task: TaskSet) -> int:
    """How many training examples a contributor has: without a validation part, a fifth less."""
    return len(task.train) if task.validation else len(task.train) - round(0.2 * len(task.train))


def draw(task: TaskSet, pool: Sequence[int], shots: int, *purpose: int) -> list[int]:
    """`shots` of the training examples in `pool`: one of each label, then any.

    What is drawn depends on the set's name and `purpose` (a seed, a number of a draw) alone.
    """
    generator = np.random.default_rng([*purpose, *task.name.encode()])
    order = [pool[int(place)] for place in generator.permutation(len(pool))]
    first = {task.train[position].label: position for position in reversed(order)}
    return list(dict.fromkeys([*sorted(first.values()), *order]))[:shots]


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.removeprefix("-").isdecimal() else (1, 0, label)
