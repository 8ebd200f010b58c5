"""The merge engine: blocks of task vectors through a merger, in the order of their keys.

Memory is O(block), whatever the number of inputs. The order is that of the sorted keys
(manifest digests) and sums are float64, so the same inputs give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coldmerge.core.algebra import Delta, check_fits, common_base, rewrite, round_once
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.dtypes import BLOCK, Floats32, Floats64, blocks
from coldmerge.core.errors import ConfigError
from coldmerge.core.progress import Advance


class Source(Protocol):
    """Anything that gives float32 blocks of named tensors: a checkpoint, a task vector."""

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened tensor, float32, shape (stop - start,)."""
        ...


@dataclass(frozen=True)
class Input:
    """One contribution to a merge: `key` (the manifest digest) fixes its place in the order."""

    key: str
    source: Delta
    weight: float = 1.0


class Merger(Protocol):
    """A merge method: folds the deltas of one block, one after the other."""

    @property
    def name(self) -> str:
        """The name in round policies and recipes."""
        ...

    def init(self, n: int) -> Any:
        """Fresh state for a block of `n` elements."""
        ...

    def fold(self, state: Any, tau: Floats32, weight: float) -> None:
        """Take in one delta, shape (n,). Inputs that do not touch the tensor are not folded."""
        ...

    def finish(self, state: Any, total_weight: float) -> Floats64:
        """The merged delta, shape (n,). `total_weight` is over all inputs."""
        ...


def in_order(inputs: Sequence[Input]) -> tuple[list[Input], float]:
    """The inputs sorted by key, and the sum of their weights.

    Raises:
        ConfigError: no input, one key twice, or a weight that is not positive and finite.
    """
    ordered = sorted(inputs, key=lambda item: item.key)
    keys = [item.key for item in ordered]
    wrong = [i.key for i in ordered if not (math.isfinite(i.weight) and i.weight > 0)]
    total = sum(item.weight for item in ordered)
    if wrong or not ordered or not math.isfinite(total):
        raise ConfigError(
            "merge.bad_weights",
            "A merge needs at least one input, and each weight positive and finite.",
            expected="weights > 0",
            got=[f"{item.key[:12]}: {item.weight}" for item in ordered if item.key in wrong]
            or f"{len(ordered)} inputs, total weight {total}",
            hint="Leave out inputs that should not count.",
        )
    if len(set(keys)) != len(keys):
        raise ConfigError(
            "merge.duplicate_input",
            "A merge was given the same input twice.",
            got=next(key for key in keys if keys.count(key) > 1),
            hint="Give each manifest digest once; use weights to count one more.",
        )
    return ordered, total


def merged_blocks(
    name: str, size: int, inputs: Sequence[Input], merger: Merger, block: int = BLOCK
) -> Iterator[tuple[int, int, Floats64]]:
    """The merged delta of one tensor of `size` elements, as (start, stop, τ) from 0 to size.

    Raises:
        ConfigError: the inputs or weights are unusable.
    """
    ordered, total = in_order(inputs)
    touching = [item for item in ordered if name in item.source.names]
    for start, stop in blocks(size, block):
        state = merger.init(stop - start)
        for item in touching:
            merger.fold(state, item.source.block(name, start, stop), item.weight)
        yield start, stop, merger.finish(state, total)


def merge_tensor(
    name: str,
    size: int,
    master: Source,
    inputs: Sequence[Input],
    merger: Merger,
    block: int = BLOCK,
) -> Iterator[Floats32]:
    """The new fp32 master of one tensor, block by block: master + τ in float64, rounded once.

    Raises:
        ConfigError: the inputs or weights are unusable.
        TaskVectorError: a result is NaN or Inf.
    """
    for start, stop, tau in merged_blocks(name, size, inputs, merger, block):
        tau += master.block(name, start, stop)
        yield round_once(name, tau)


def merge(
    base: Checkpoint,
    inputs: Sequence[Input],
    merger: Merger,
    out: Path | str,
    progress: Advance | None = None,
) -> Checkpoint:
    """Merge task vectors into a new model folder, in the base's own types.

    `progress` is called with the number of bytes written since the last call.

    Raises:
        ConfigError: the inputs or weights are unusable.
        TaskVectorError: an input does not fit the base, or the inputs' bases differ.
        ConflictError: `out` exists and is not empty.
    """
    in_order(inputs)
    vectors = [item.source for item in inputs]
    common_base(vectors)
    for vector in vectors:
        check_fits(base, vector)
    touched = frozenset[str]().union(*(vector.names for vector in vectors))

    def rows(name: str) -> Iterator[Floats32]:
        return merge_tensor(name, base.tensors[name].size, base, inputs, merger)

    return rewrite(base, out, touched, rows, progress)
