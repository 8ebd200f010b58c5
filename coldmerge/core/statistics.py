"""Statistics that contributors ship beside their deltas, in the same task vector file.

Of release tensor `<name>`, always as float32, whatever the encoding of the deltas:

- `<name>.fisher`: the diagonal of the Fisher information, in the shape of the tensor;
- `<name>.gram`: XᵀX of a linear layer's inputs, (in, in), for a weight of shape (out, in);
- `<name>.trim`: one number, the k-th largest magnitude of the delta at a density.

Fisher and gram are measured after training and wait in `statistics/` of the fine-tune:
`model.safetensors` (or shards) under these keys, and `statistics.json` with what they were
made of, {"fisher": examples, "gram": tokens}. Thresholds are computed by the extraction.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from coldmerge.core import strict_json
from coldmerge.core.checkpoint import Checkpoint, read_json
from coldmerge.core.documents import Statistic
from coldmerge.core.dtypes import FLOATS, Floats32
from coldmerge.core.errors import CheckpointError, NotFoundError

KINDS: tuple[Statistic, ...] = get_args(Statistic)
FOLDER = "statistics"
COUNTS = "statistics.json"
DTYPE = "F32"


def statistic_shape(kind: Statistic, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The shape of a statistic of a tensor of `shape` (None: of no tensor); None: there is none."""
    if shape is None or kind == "fisher":
        return shape
    if kind == "trim":
        return (1,)
    return (shape[1], shape[1]) if len(shape) == 2 else None


def parse_statistics(text: str) -> dict[Statistic, float]:
    """Read `statistics_json`.

    Raises:
        ValueError: it is something else.
    """
    found = strict_json.loads(text)
    if not isinstance(found, dict) or not set(found) <= set(KINDS):
        raise ValueError("it is not a table of statistics")
    return {kind: counted(found, kind) for kind in KINDS if kind in found}


def counted(found: Mapping[str, Any], kind: str) -> float:
    """What a statistic was made of: a positive, finite number.

    Raises:
        ValueError: there is none, or it is something else.
    """
    value: Any = found.get(kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{kind} is {value!r:.40}")
    return float(value)


def statistics_json(statistics: Mapping[Statistic, float]) -> str:
    """How a task vector's metadata says which statistics it ships."""
    return json.dumps(dict(sorted(statistics.items())), separators=(",", ":"))


@dataclass(frozen=True)
class Measured:
    """Fisher and gram as the trainer left them, read by block."""

    tensors: Checkpoint
    counts: dict[Statistic, float]

    @classmethod
    def open(cls, folder: Path, kinds: Collection[Statistic]) -> Self:
        """Open a folder of statistics and check that it holds these kinds.

        Raises:
            NotFoundError: it is not there, or holds other kinds.
            CheckpointError: it cannot be read.
        """
        found = read_json(folder / COUNTS) if (folder / COUNTS).is_file() else {}
        if missing := sorted(set(kinds) - set(found)):
            raise NotFoundError(
                "statistics.not_measured",
                f"The fine-tune has no {missing[0]} statistic, which the round asks for.",
                expected=", ".join(sorted(kinds)),
                got=", ".join(sorted(found)) or "none",
                hint="Run `coldmerge train` while the round is open, or see "
                "docs/training.md on how to bring statistics of your own.",
                folder=folder,
            )
        try:
            counts = {kind: counted(found, kind) for kind in kinds}
        except ValueError as error:
            raise CheckpointError(
                "statistics.bad_counts",
                f"{COUNTS} does not say what the statistics were made of: {error}.",
                expected='a positive number for each, such as {"fisher": 1000}',
                hint="Measure again with `coldmerge train`.",
                folder=folder,
            ) from error
        return cls(Checkpoint.open(folder), counts)

    def has(self, name: str, kind: Statistic, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of `shape` has this statistic.

        Raises:
            CheckpointError: it has one of another shape or type.
        """
        spec = self.tensors.tensors.get(f"{name}.{kind}")
        if spec is None:
            return False
        if spec.shape != statistic_shape(kind, shape) or spec.dtype not in FLOATS:
            raise CheckpointError(
                "statistics.wrong_shape",
                f"The {kind} statistic of tensor {name} does not fit it.",
                expected=statistic_shape(kind, shape) or f"no {kind} of {list(shape)}",
                got=f"{spec.dtype} {list(spec.shape)}",
                hint="Measure again with `coldmerge train`.",
                folder=self.tensors.folder,
            )
        return True

    def block(self, name: str, kind: Statistic, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened statistic."""
        return self.tensors.block(f"{name}.{kind}", start, stop)


@dataclass(frozen=True)
class Wanted:
    """What an extraction ships beside deltas. `density`: of trim thresholds; None: none."""

    density: float | None = None
    measured: Measured | None = None

    @property
    def counts(self) -> dict[Statistic, float]:
        """What the file's metadata and the manifest say of it."""
        found: dict[Statistic, float] = dict(self.measured.counts) if self.measured else {}
        return found if self.density is None else {**found, "trim": self.density}

    def has(self, name: str, kind: Statistic, shape: tuple[int, ...]) -> bool:
        """Whether there is such a statistic to ship of a tensor of `shape`, if it is shipped.

        Raises:
            CheckpointError: there is one of another shape or type.
        """
        return kind == "trim" or (
            self.measured is not None and self.measured.has(name, kind, shape)
        )


NOTHING = Wanted()
