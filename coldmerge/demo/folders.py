"""Tasks as folders: train.jsonl, validation.jsonl and test.jsonl, one example a line."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldmerge.core.errors import DataError

PARTS = ("train", "validation", "test")
VALIDATION_SHARE = 0.2
TEST_SHARE = 0.25


@dataclass(frozen=True)
class Example:
    """One labelled item: a text, or (in the tiny demo) an image as a list of numbers."""

    content: str | tuple[int, ...]
    label: int
    pair: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The example as a line of JSON holds it."""
        if not isinstance(self.content, str):
            return {"pixels": list(self.content), "label": self.label}
        pair = {} if self.pair is None else {"text_pair": self.pair}
        return {"text": self.content, **pair, "label": self.label}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Example:
        """Read what `as_json` wrote. Raises KeyError or TypeError on anything else."""
        content = tuple(row["pixels"]) if "pixels" in row else str(row["text"])
        return cls(content, int(row["label"]), row.get("text_pair"))


@dataclass(frozen=True)
class Task:
    """One organization's labelled data, or data that nobody trains on."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def pairs(self) -> bool:
        """Whether the items are pairs of texts."""
        return any(example.pair is not None for example in self.train)

    def save(self, folder: Path) -> Path:
        """Write the three files into `folder` (made if needed) and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            examples: tuple[Example, ...] = getattr(self, part)
            lines = [json.dumps(e.as_json(), ensure_ascii=False) for e in examples]
            (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder


def split(name: str, examples: Sequence[Example], labels: Sequence[str], seed: int) -> Task:
    """Shuffle and cut, each label in the same shares."""
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    generator = random.Random(f"{seed}/{name}")  # noqa: S311 - no secret, only a shuffle
    for group in _by_label(examples):
        generator.shuffle(group)
        test = round(TEST_SHARE * len(group))
        validation = test + round(VALIDATION_SHARE * len(group))
        parts["test"] += group[:test]
        parts["validation"] += group[test:validation]
        parts["train"] += group[validation:]
    for part in PARTS:
        generator.shuffle(parts[part])
    return Task(
        name, tuple(labels), tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"])
    )


def load(folder: Path, seed: int = 0) -> Task:
    """Read a task folder; without validation.jsonl a fifth of the training part is set aside.

    Raises:
        DataError: a file is missing or empty, or a line is not an example.

    """
    train, validation = load_training(folder, seed)
    test = _read(folder / "test.jsonl")
    labels = sorted({example.label for example in train})
    return Task(folder.name, tuple(map(str, labels)), tuple(train), tuple(validation), tuple(test))


def load_training(folder: Path, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The training and the validation part of a task folder, which may have no other.

    Raises:
        DataError: as `load`.

    """
    train = _read(folder / "train.jsonl")
    held = folder / "validation.jsonl"
    return (train, _read(held)) if held.exists() else _hold_out(train, f"{seed}/{folder.name}")


def _hold_out(train: list[Example], seed: str) -> tuple[list[Example], list[Example]]:
    generator = random.Random(seed)  # noqa: S311 - no secret, only a shuffle
    kept: list[Example] = []
    held: list[Example] = []
    for group in _by_label(train):
        generator.shuffle(group)
        cut = round(VALIDATION_SHARE * len(group))
        held += group[:cut]
        kept += group[cut:]
    generator.shuffle(kept)
    return kept, held


def _by_label(examples: Sequence[Example]) -> list[list[Example]]:
    groups: defaultdict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.label].append(example)
    return [groups[label] for label in sorted(groups)]


def _read(path: Path) -> list[Example]:
    try:
        # Not `splitlines`: texts hold other characters that it takes for the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(
            "demo.no_data_file",
            f"A task folder has no {path.name}.",
            expected="train.jsonl and test.jsonl, validation.jsonl if there is one",
            got=path.parent,
            hint="Give --data a folder with one folder per task.",
        ) from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(Example.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "demo.bad_line",
                f"Line {number} of {path} is not an example.",
                expected='{"text": "…", "label": 0}',
                got=line[:80],
                hint="Write one JSON object a line with `text` and an integer `label`.",
            ) from error
    if not examples:
        raise DataError(
            "demo.empty_data_file",
            f"A task's {path.name} holds no example.",
            got=path,
            hint="Leave the task out of --seen and --unseen, or fill the file.",
        )
    return examples
