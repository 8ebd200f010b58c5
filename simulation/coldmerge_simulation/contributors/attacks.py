"""Attacks of simulated contributors, on what they extracted or on what they train with.

The manifest is made and signed afterwards: it says truly what the attacker sends, as one
who runs the real client on a model of its own making would have it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coldmerge.core.dtypes import Floats32, blocks
from coldmerge.core.extraction import Extraction
from coldmerge.core.task_vector import TaskVector, sum_of_squares
from coldmerge.core.vector_writer import VectorWriter
from coldmerge_simulation.contributors.conduct import Attack

Change = Callable[[Floats32], Floats32]


def attack(how: Attack, found: Extraction, seed: int) -> Extraction:
    """Replace an extracted task vector by what the attacker sends; the same file, other bytes.

    One block is in memory at a time. Statistics stay as they were measured. `norm` is that of
    what is sent, where that is a number. Attacks on the data change nothing here.
    """
    if how.on_data:
        return found
    vector, path = found.task_vector, found.task_vector.path
    beside = path.with_name(f".{path.name}.attack")
    factor = {"sign_flip": -how.amount, "scale": how.amount}.get(how.kind, 1.0)
    with VectorWriter(
        beside,
        ((key, spec.shape) for key, spec in vector.specs.items()),
        kind=vector.kind,
        encoding=vector.encoding,
        base_digest=vector.base_digest,
        # Of a pair of factors the scaling changes, not both of them.
        scaling={name: value * factor for name, value in vector.scaling.items()},
        statistics=vector.statistics,
    ) as writer:
        for key, spec in vector.specs.items():
            if key in vector.deltas:
                change = _change(how, vector, key, seed, 1.0 if key not in vector.names else factor)
                for start, stop in blocks(spec.size):
                    writer.append(change(vector.stored(key, start, stop)))
            else:
                for start, stop in blocks(spec.size):
                    writer.append_statistic(vector.stored(key, start, stop))
            writer.keep(key, spec.shape)
    beside.rename(path)
    sent = TaskVector.open(path)
    norm = _norm(sent)
    return replace(found, task_vector=sent, norm=norm if math.isfinite(norm) else found.norm)


def _change(how: Attack, vector: TaskVector, key: str, seed: int, factor: float) -> Change:
    """What happens to the blocks of one tensor, which come in order."""
    if how.kind == "nan":
        return _Poisoned()
    if how.kind == "noise":
        return _Noisy(how.amount * _deviation(vector, key), seed, key)
    return lambda values: _as_float32(values.astype(np.float64) * factor)


class _Poisoned:
    """A NaN in the first place of a tensor."""

    def __init__(self) -> None:
        self._first = True

    def __call__(self, values: Floats32) -> Floats32:
        changed = values.copy()
        if self._first:
            changed[:1] = np.nan
        self._first = False
        return changed


class _Noisy:
    """Normal noise of one deviation on top, the same however a tensor is cut into blocks."""

    def __init__(self, deviation: float, seed: int, key: str) -> None:
        drawn = hashlib.sha256(f"attack/{seed}/{key}".encode()).digest()
        self._draw = np.random.default_rng(list(drawn))
        self._deviation = deviation

    def __call__(self, values: Floats32) -> Floats32:
        noise = self._deviation * self._draw.standard_normal(len(values))
        return _as_float32(values + noise)


def _as_float32(values: np.ndarray[Any, np.dtype[np.float64]]) -> Floats32:
    """Rounded; what is too large becomes infinite, and is the coordinator's to refuse."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _deviation(vector: TaskVector, key: str) -> float:
    """Root of the mean square of a stored tensor."""
    size, total = vector.specs[key].size, 0.0
    for start, stop in blocks(size):
        total += sum_of_squares(vector.stored(key, start, stop))
    return math.sqrt(total / max(1, size))


def _norm(vector: TaskVector) -> float:
    return math.sqrt(math.fsum(vector.square(name) for name in sorted(vector.names)))


def flip_labels(how: Attack, folder: Path, out: Path, seed: int) -> Path:
    """Copy a contributor's data with wrong labels in its training part, and return the copy.

    A share `how.amount` of the examples gets another label, drawn at random. (If each label
    were replaced by one other, heads being private, nothing at all would be wrong.)
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    path = out / "train.jsonl"
    lines = path.read_text("utf-8").split("\n")
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
    kinds = sorted({row["label"] for row in rows}, key=str)
    draw = np.random.default_rng(list(hashlib.sha256(f"labels/{seed}".encode()).digest()))
    count = math.ceil(how.amount * len(rows))
    for position in draw.permutation(len(rows))[:count].tolist():
        others = [kind for kind in kinds if kind != rows[position]["label"]]
        if others:
            rows[position]["label"] = others[int(draw.integers(len(others)))]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out
