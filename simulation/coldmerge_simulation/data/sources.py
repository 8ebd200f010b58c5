"""Where tasks come from: the digits, the documentation of libraries, or folders of files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldmerge.core.errors import ConfigError, DataError
from coldmerge.demo import digits, documentation
from coldmerge.demo.folders import PARTS, Example, Task
from coldmerge_simulation.data.config import Columns, DataConfig
from coldmerge_simulation.data.partitioners import ByTask

POOLED_DIGITS = ("digits-23456",)


@dataclass(frozen=True)
class Source:
    """A task that contributors train on.

    Attributes:
        task: the task as releases are measured on it, its labels as positions.
        train: the rows of its training part, as its file holds them.
        validation: the rows of its validation part; empty where the source has none.

    """

    task: Task
    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]


def read(config: DataConfig, seed: int) -> tuple[list[Source], list[Task]]:
    """The tasks to train on, and those that only measure.

    Raises:
        ConfigError: the source has no such task, or there is no such folder.
        DataError: a file is missing, or a row cannot be used.
    """
    if config.source == "digits":
        default = digits.SEEN if config.partition.name == ByTask.name else POOLED_DIGITS
        seen, unseen = _names(config, default, digits.UNSEEN)
        return [_from(digits.task(name, seed)) for name in seen], [
            digits.task(name, seed) for name in unseen
        ]
    if config.source == "documentation":
        seen, unseen = _names(config, documentation.SEEN, documentation.UNSEEN)
        return [_from(documentation.task(name, seed)) for name in seen], [
            documentation.task(name, seed) for name in unseen
        ]
    places = _folders(Path(config.source))
    rest = tuple(name for name in places if name not in (config.unseen or ()))
    seen, unseen = _names(config, rest, ())
    missing = [name for name in (*seen, *unseen) if name not in places]
    if missing or not seen:
        raise ConfigError(
            "simulation.no_task",
            f"{config.source} has no task {missing[0]}."
            if missing
            else "Every task of the source is unseen: nobody has anything to train on.",
            expected=", ".join(places),
            got=missing[0] if missing else None,
            hint="Name folders of data.source in data.tasks and data.unseen.",
        )
    return [_read(places[name], config.columns) for name in seen], [
        _read(places[name], config.columns).task for name in unseen
    ]


def _names(
    config: DataConfig, seen: tuple[str, ...], unseen: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The source's own choice where the configuration has none; nobody trains on what measures."""
    measured = config.unseen or ()
    chosen = config.tasks or tuple(name for name in seen if name not in measured)
    if config.unseen is not None:
        return chosen, config.unseen
    return chosen, tuple(name for name in unseen if name not in chosen)


def _from(task: Task) -> Source:
    rows = [[example.as_json() for example in part] for part in (task.train, task.validation)]
    return Source(task, rows[0], rows[1])


def _folders(place: Path) -> dict[str, Path]:
    """Task folders by name: `place` itself if it is one, else those in it."""
    if (place / "train.jsonl").is_file():
        return {place.name: place}
    found = {path.parent.name: path.parent for path in sorted(place.glob("*/train.jsonl"))}
    if not found:
        raise ConfigError(
            "simulation.no_source",
            f"There are no tasks to train on in {place}.",
            expected="digits, documentation, or a folder of folders with train.jsonl",
            got=place.name if place.is_dir() else "no such folder",
            hint="Correct data.source; paths are relative to the simulation's file.",
        )
    return found


def _read(folder: Path, columns: Columns) -> Source:
    rows = {part: _rows(folder / f"{part}.jsonl", columns) for part in PARTS}
    names = sorted({str(row["label"]) for part in rows.values() for row in part}, key=_natural)
    labels = {name: position for position, name in enumerate(names)}

    def examples(part: str) -> tuple[Example, ...]:
        return tuple(_example(row, labels[str(row["label"])]) for row in rows[part])

    # Where nothing is set aside, each contributor sets a part aside of what it gets.
    task = Task(folder.name, tuple(names), *(examples(part) for part in PARTS))
    return Source(task, rows["train"], rows["validation"])


def _example(row: dict[str, Any], label: int) -> Example:
    if "pixels" in row:
        return Example(tuple(row["pixels"]), label)
    return Example(str(row["text"]), label, row.get("text_pair"))


def _rows(path: Path, columns: Columns) -> list[dict[str, Any]]:
    if not path.is_file() and path.stem == "validation":
        return []
    try:
        # Not `splitlines`: texts hold other characters that it takes for the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(
            "simulation.no_split",
            f"The task {path.parent.name} has no {path.name}.",
            expected="train.jsonl and test.jsonl, validation.jsonl if there is one",
            got=path.parent,
            hint="Releases are measured on the test part, so every task needs one.",
        ) from error
    found = [
        _row(line, f"line {number} of {path}", columns)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(
            "simulation.empty_split",
            f"{path.name} of the task {path.parent.name} holds no example.",
            got=path,
            hint="Fill the file, or leave the task out of data.tasks and data.unseen.",
        )
    return found


def _row(line: str, where: str, columns: Columns) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(
            "simulation.bad_line",
            f"There is no example in {where}.",
            expected='{"text": "…", "label": 0}',
            got=line[:80],
            hint="Write one JSON object a line.",
        )
    content = "pixels" if "pixels" in row else columns.text
    for name in (content, columns.label):
        if name not in row:
            raise DataError(
                "simulation.no_label_or_text",
                f"There is no column {name} in {where}.",
                expected=name,
                got=", ".join(map(str, row)),
                hint="Map it: `data: {columns: {text: …, label: …}}`.",
            )
    wanted = {columns.text: "text", columns.text_pair: "text_pair", columns.label: "label"}
    found = {wanted.get(str(key), str(key)): value for key, value in row.items()}
    if not isinstance(found["label"], str | int) or found["label"] == "":
        raise DataError(
            "simulation.bad_label",
            f"The label in {where} is not a word or an integer.",
            got=type(found["label"]).__name__,
            hint="Correct the row, or map another column: `data: {columns: {label: …}}`.",
        )
    return found


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.removeprefix("-").isdecimal() else (1, 0, label)
