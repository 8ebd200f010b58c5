"""Models whose vocabularies differ from the base's: rows matched by their tokens."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coldmerge.core.checkpoint import Checkpoint, read_json
from coldmerge.core.deltas import Tuned
from coldmerge.core.dtypes import Floats32, size
from coldmerge.core.errors import CheckpointError
from coldmerge.core.header import TensorSpec
from coldmerge.core.names import match_names

FILES = ("tokenizer.json", "vocab.json", "vocab.txt")

Rows = npt.NDArray[np.int64]


class Recoded(Tuned):
    """A fine-tuned model whose rows of the vocabulary are read in the base's order.

    `rows[i]` is the model's row for the base's row i, −1 where the model has none: that row
    counts as unchanged. `names` are the base's tensors that have a row for each token.
    """

    def __init__(
        self,
        base: Checkpoint,
        model: Checkpoint,
        pairs: dict[str, str],
        base_digest: str,
        rows: Rows,
        names: frozenset[str],
    ) -> None:
        super().__init__(base, model, pairs, base_digest)
        self._rows, self._recoded = rows, names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor: that of the base."""
        return self._base.shape(name)

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the fine-tuned tensor, rows in the base's order."""
        if name not in self._recoded:
            return super().theta(name, start, stop)
        columns = size(self._base.shape(name)[1:])
        first, last = start // columns, -(-stop // columns)
        out = self._base.block(name, first * columns, last * columns)
        rows = self._rows[first:last]
        cuts = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
        for low, high in pairwise([0, *cuts.tolist(), len(rows)]):
            at = int(rows[low])
            if at >= 0:
                out[low * columns : high * columns] = self._model.block(
                    self._pairs[name], at * columns, (at + high - low) * columns
                )
        return out[start - first * columns : stop - first * columns]


def vocabulary_size(model: Checkpoint) -> int | None:
    """The number of tokens that the model's configuration states."""
    try:
        config = model.config
    except CheckpointError:
        return None
    inner = config.get("text_config")
    found = config.get("vocab_size") or (isinstance(inner, dict) and inner.get("vocab_size"))
    return found if isinstance(found, int) and found > 1 else None


def recoded_names(base: Checkpoint, model: Checkpoint) -> dict[str, str]:
    """The base's tensors with a row for each token, with the model's names for them."""
    sizes = vocabulary_size(base), vocabulary_size(model)
    if None in sizes:
        return {}
    found = {}
    for name, target in match_names(base.tensors, model.tensors).items():
        if target is not None:
            shapes = base.shape(target), model.shape(name)
            rows = (shapes[0][:1], shapes[1][:1])
            if rows == ((sizes[0],), (sizes[1],)) and shapes[0][1:] == shapes[1][1:]:
                found[target] = name
    return found


def as_in_base(
    base: Checkpoint, model: Checkpoint, names: Mapping[str, str]
) -> dict[str, TensorSpec]:
    """The model's tensors, those of the vocabulary with the base's shape."""
    specs = dict(model.tensors)
    for target, name in names.items():
        specs[name] = replace(specs[name], shape=base.shape(target))
    return specs


def rows_of(base: Mapping[str, int], model: Mapping[str, int], count: int, available: int) -> Rows:
    """For each of the base's `count` rows the model's row of the same token, or −1."""
    rows = np.full(count, -1, np.int64)
    for token, row in base.items():
        there = model.get(token, -1)
        if row < count and there < available:
            rows[row] = there
    return rows


def tokens(folder: Path) -> dict[str, int] | None:
    """Token → row of a model's tokenizer; None where it has no file that says so.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return _tokens(folder)
    except (TypeError, AttributeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(
            "checkpoint.bad_tokenizer",
            f"The vocabulary of a model cannot be read: {error}.",
            expected="a tokenizer.json, vocab.json or vocab.txt as `save_pretrained` writes it",
            hint="Save the tokenizer beside the model again with `save_pretrained`.",
            folder=folder,
        ) from error


def _tokens(folder: Path) -> dict[str, int] | None:
    found: dict[str, int] | None = None
    if (folder / "tokenizer.json").is_file():
        found = _fast(read_json(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file():
        found = _table(read_json(folder / "vocab.json"))
    elif (folder / "vocab.txt").is_file():
        # not splitlines: tokens may hold what Unicode takes for the end of a line
        lines = (folder / "vocab.txt").read_text("utf-8").removesuffix("\n").split("\n")
        found = {token: row for row, token in enumerate(lines)}
    if found is not None and (folder / "added_tokens.json").is_file():
        found |= _table(read_json(folder / "added_tokens.json"))
    return found or None


def _fast(body: dict[str, Any]) -> dict[str, int]:
    model = body.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        found = {str(entry[0]): row for row, entry in enumerate(vocabulary) if entry}
    else:
        found = _table(vocabulary or {})
    for entry in body.get("added_tokens") or []:
        found |= _table({entry.get("content"): entry.get("id")})
    return found


def _table(body: Mapping[Any, Any]) -> dict[str, int]:
    return {k: v for k, v in body.items() if isinstance(k, str) and type(v) is int and v >= 0}


def disagreement(base: Path, model: Path) -> tuple[float, str]:
    """The share of rows that stand for other tokens in the two tokenizers, and the first such.

    Zero where one of them has no tokenizer, or both have the same file.
    """
    if all(_same(base / name, model / name) for name in (*FILES, "added_tokens.json")):
        return 0.0, ""
    ours, theirs = tokens(base), tokens(model)
    if ours is None or theirs is None:
        return 0.0, ""
    by_row = {row: token for token, row in theirs.items()}
    shared = [(row, token, by_row[row]) for token, row in ours.items() if row in by_row]
    wrong = sorted(entry for entry in shared if entry[1] != entry[2])
    if not wrong:
        return 0.0, ""
    row, here, there = wrong[0]
    example = f"row {row} is {json.dumps(here)} in the base and {json.dumps(there)} here"
    return len(wrong) / len(shared), example


def _same(one: Path, two: Path) -> bool:
    if one.is_file() != two.is_file():
        return False
    return not one.is_file() or filecmp.cmp(one, two, shallow=False)
