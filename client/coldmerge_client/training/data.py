"""Examples for the trainers: cleaned, split, and with one vocabulary of labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from coldmerge.core.errors import DataError
from coldmerge_client.training import tables
from coldmerge_client.training.config import DataConfig
from coldmerge_client.training.tables import Table

Label = TypeVar("Label")


@dataclass(frozen=True)
class Example(Generic[Label]):
    """One item. `text` is a sentence or, for token tasks, a tuple of words."""

    text: str | tuple[str, ...]
    pair: str | None
    label: Label


@dataclass(frozen=True)
class Examples(Generic[Label]):
    """Training and validation items. `dropped` counts rows without text."""

    train: tuple[Example[Label], ...]
    validation: tuple[Example[Label], ...]
    labels: tuple[str, ...] = ()
    dropped: int = 0


def classification(
    data: DataConfig, known: Sequence[str] = (), scratch: Path | None = None
) -> Examples[int]:
    """Texts (and pairs) with one label each, as positions in `Examples.labels`.

    `known` are labels of earlier rounds: they keep their positions, new ones follow.

    Raises:
        DataError: see the codes in this module and in `tables`.
    """
    raw = _split(data, scratch, _classification_rows)
    labels = _vocabulary(data, known, [example.label for example in raw.train])
    _require_two({example.label for example in raw.train}, data)
    _require_seen({example.label for example in raw.validation}, labels, data)
    place = {label: position for position, label in enumerate(labels)}
    return Examples(
        tuple(replace(example, label=place[example.label]) for example in raw.train),
        tuple(replace(example, label=place[example.label]) for example in raw.validation),
        labels,
        raw.dropped,
    )


def tokens(
    data: DataConfig, known: Sequence[str] = (), scratch: Path | None = None
) -> Examples[tuple[int, ...]]:
    """Tuples of words with a tag each, as positions in `Examples.labels`.

    Raises:
        DataError: see the codes in this module and in `tables`.
    """
    raw = _split(data, scratch, _token_rows)
    train = [tag for example in raw.train for tag in example.label]
    labels = _vocabulary(data, known, train)
    _require_two(set(train), data)
    _require_seen({tag for example in raw.validation for tag in example.label}, labels, data)
    place = {label: position for position, label in enumerate(labels)}

    def numbered(example: Example[tuple[str, ...]]) -> Example[tuple[int, ...]]:
        return Example(example.text, None, tuple(place[tag] for tag in example.label))

    return Examples(
        tuple(numbered(example) for example in raw.train),
        tuple(numbered(example) for example in raw.validation),
        labels,
        raw.dropped,
    )


def texts(data: DataConfig, scratch: Path | None = None) -> Examples[None]:
    """Texts alone, for language modelling.

    Raises:
        DataError: see the codes in this module and in `tables`.
    """
    return _split(data, scratch, _text_rows)


def subset(examples: Sequence[Example[int]], limit: int | None, seed: int) -> list[Example[int]]:
    """At most `limit` items drawn by `seed`, every class among them while there is room."""
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(examples))]
    if limit is None or limit >= len(examples):
        return list(examples)
    first: dict[int, int] = {}
    for position in order:
        first.setdefault(examples[position].label, position)
    chosen = list(dict.fromkeys([*first.values(), *order]))[:limit]
    return [examples[position] for position in sorted(chosen)]


def draw(examples: Sequence[Example[Label]], limit: int | None, seed: int) -> list[Example[Label]]:
    """At most `limit` items drawn by `seed`, in their order."""
    order = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[int(position)] for position in sorted(order)]


Rows = tuple[list[Example[Label]], int]
"""Examples of one file, and how many rows were dropped for want of text."""


def _split(data: DataConfig, scratch: Path | None, rows: Any) -> Examples[Any]:
    train_path, validation_path = tables.locate(data)
    train, dropped = rows(tables.read_table(train_path, scratch), data, train_path)
    if validation_path is not None:
        validation, more = rows(tables.read_table(validation_path, scratch), data, validation_path)
        dropped += more
    else:
        train, validation = _hold_out(train, data.holdout)
    if not train and not validation:
        raise tables.empty(train_path)
    if not (train and validation):
        if validation_path is None:
            raise _too_few(train_path, data)
        raise tables.empty(validation_path if train else train_path)
    return Examples(tuple(train), tuple(validation), (), dropped)


def _hold_out(
    examples: Sequence[Example[Any]], share: float
) -> tuple[list[Example[Any]], list[Example[Any]]]:
    """Split by the text alone, so that what was held out once is not trained on later.

    An item whose label would then be missing from the training part stays there.
    """
    keys = [_position(example) for example in examples]
    bound = max(share, min(keys, default=0.0))
    train = [example for example, key in zip(examples, keys, strict=True) if key > bound]
    seen = {label for example in train for label in _labels(example)}
    validation: list[Example[Any]] = []
    for example, key in zip(examples, keys, strict=True):
        if key <= bound:
            rare = not seen.issuperset(_labels(example))
            (train if rare else validation).append(example)
    return train, validation


def _too_few(path: Path, data: DataConfig) -> DataError:
    return DataError(
        "data.too_few_to_hold_out",
        f"{path.name} has too few examples to hold out a part for validation.",
        expected=f"several examples of each label, of which {data.holdout:.0%} are held out",
        hint="Name a validation file in `data.validation`.",
        path=path,
    )


def _position(example: Example[Any]) -> float:
    text = "\0".join([*_words(example.text), example.pair or ""])
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def _labels(example: Example[Any]) -> tuple[Any, ...]:
    return example.label if isinstance(example.label, tuple) else (example.label,)


def _words(text: str | tuple[str, ...]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _classification_rows(table: Table, data: DataConfig, path: Path) -> Rows[str]:
    columns = data.columns
    first = tables.column(table, columns.text, path)
    labels = tables.column(table, columns.label, path)
    if columns.text_pair is not None:
        second = tables.column(table, columns.text_pair, path)
    else:
        second = table.get("text_pair", [None] * len(first))
    found = [
        Example(_text(text), _text(pair) or None, _label(label, columns.label, data, path))
        for text, pair, label in zip(first, second, labels, strict=True)
        if _text(text)
    ]
    return found, len(first) - len(found)


def _token_rows(table: Table, data: DataConfig, path: Path) -> Rows[tuple[str, ...]]:
    columns = data.columns
    words = [_list(cell) for cell in tables.column(table, columns.tokens, path)]
    tags = [_list(cell) for cell in tables.column(table, columns.tags, path)]
    found: list[Example[tuple[str, ...]]] = []
    for row, (sentence, marks) in enumerate(zip(words, tags, strict=True)):
        if len(sentence) != len(marks):
            raise DataError(
                "data.unaligned_tags",
                f"Row {row} of {path.name} does not have one tag per token.",
                expected=f"{len(sentence)} tags",
                got=f"{len(marks)} tags",
                hint="Correct the row; tokens and tags are lists, or words with spaces between.",
                path=path,
            )
        if sentence:
            labels = tuple(_label(mark, columns.tags, data, path) for mark in marks)
            found.append(Example(tuple(str(word) for word in sentence), None, labels))
    return found, len(words) - len(found)


def _text_rows(table: Table, data: DataConfig, path: Path) -> Rows[None]:
    column = tables.column(table, data.columns.text, path)
    found: list[Example[None]] = [Example(_text(cell), None, None) for cell in column]
    kept = [example for example in found if example.text]
    return kept, len(found) - len(kept)


def _text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _list(cell: object) -> list[object]:
    if isinstance(cell, str):
        return list(cell.split())
    return list(cell) if isinstance(cell, list | tuple) else []


def _label(cell: object, column: str, data: DataConfig, path: Path) -> str:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, str | int) and str(cell).strip():
        label, names = str(cell).strip(), data.labels or ()
        by_position = label not in names and label.isdecimal() and int(label) < len(names)
        return names[int(label)] if by_position else label
    raise DataError(
        "data.bad_label",
        f"{path.name} has a row whose label is not a word or an integer.",
        expected="a word or an integer",
        got="an empty cell" if cell is None or cell == "" else type(cell).__name__,
        hint=f"Correct the column {column}, or map another with `data: {{columns: …}}`.",
        path=path,
    )


def _vocabulary(data: DataConfig, known: Sequence[str], found: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*known, *(data.labels or ()), *sorted(set(found), key=_natural)]))


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.removeprefix("-").isdecimal() else (1, 0, label)


def _require_two(found: set[str], data: DataConfig) -> None:
    if len(found) < 2:
        raise DataError(
            "data.one_class",
            "All training examples have the same label: there is nothing to learn.",
            expected="at least two labels",
            got=", ".join(sorted(found)),
            hint="Check the label column, or train on data that shows more than one label.",
            path=data.train,
        )


def _require_seen(found: set[str], labels: Sequence[str], data: DataConfig) -> None:
    unseen = sorted(found - set(labels), key=_natural)
    if unseen:
        raise DataError(
            "data.unseen_labels",
            f"The validation data has {len(unseen)} labels that the training data lacks.",
            expected="labels among " + ", ".join(labels[:20]),
            got=", ".join(unseen[:20]),
            hint="Add training examples for them, or list all labels in `data.labels`.",
            path=data.validation or data.train,
        )
