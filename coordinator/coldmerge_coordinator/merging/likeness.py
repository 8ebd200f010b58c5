"""How alike the inputs of a merge are, seen while it runs: inner products, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coldmerge.core.dtypes import Floats32, Floats64, blocks
from coldmerge.merging import Block, Input
from coldmerge.merging.gram import products
from coldmerge.screening.report import Inner

MOST = 200
"""Inputs that are compared with each other; of more there are only norms."""

DENSE = 32
"""Inputs that are compared in every element. Of more, every k-th: the work stays the same."""

ELEMENTS = 2**20
"""Elements of all rows together that a thread holds."""


class Likeness:
    """Inner products of a merge's inputs and of what it makes of them."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self._inputs = inputs
        self._rows = len(inputs) + 1
        self._step = -(-(self._rows**2) // (DENSE + 1) ** 2)
        self._total = np.zeros((self._rows, self._rows)) if len(inputs) <= MOST else None

    def of(self, block: Block, merged: Floats32 | Floats64) -> Floats64 | None:
        """Of one block, whose merged delta is `merged`: from any thread."""
        if self._total is None:
            return None
        total = np.zeros_like(self._total)
        for start, stop in blocks(block.size, max(1, ELEMENTS // self._rows)):
            total += products(self._stack(block, merged, start, stop))
        return total

    def _stack(self, block: Block, merged: Floats32 | Floats64, start: int, stop: int) -> Floats32:
        part = merged[start : stop : self._step]
        rows = np.zeros((self._rows, len(part)), np.float32)
        for i in block.touching:
            values = self._inputs[i].source.block(
                block.name, block.start + start, block.start + stop
            )
            rows[i] = values[:: self._step]
        with np.errstate(over="ignore"):  # a result that large ends the merge
            rows[-1] = part
        return rows

    def add(self, found: Floats64 | None) -> None:
        """Add what `of` found: block after block, so that the sum is always the same."""
        if self._total is not None and found is not None:
            self._total += found

    def inner(self) -> Inner | None:
        """All of it; None: there are too many inputs."""
        if self._total is None:
            return None
        return Inner(tuple(item.key for item in self._inputs), self._total, self._step)
