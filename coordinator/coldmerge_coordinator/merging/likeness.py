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
"""Inputs up to which the number of elements is not lowered further: the work stays the same."""

COMPARED = 2**22
"""Elements of which a model's inputs are compared: a sample of a larger one says as much."""

ELEMENTS = 2**20
"""Elements of all rows together that a thread holds."""


class Likeness:
    """Inner products of a merge's inputs and of what it makes of them.

    `elements`: how many the merged tensors have. Of a large model, or many inputs, one in
    `step` is looked at: the first ones of every block.
    """

    def __init__(self, inputs: Sequence[Input], elements: int) -> None:
        self._inputs = inputs
        self._rows = len(inputs) + 1
        pairs = -(-(self._rows**2) // (DENSE + 1) ** 2)
        self._step = max(1, elements // COMPARED) * pairs
        self._total = np.zeros((self._rows, self._rows)) if len(inputs) <= MOST else None

    def of(self, block: Block, merged: Floats32 | Floats64) -> Floats64 | None:
        """Of one block, whose merged delta is `merged`: from any thread."""
        if self._total is None:
            return None
        total = np.zeros_like(self._total)
        sample = -(-block.size // self._step)
        for start, stop in blocks(sample, max(1, ELEMENTS // self._rows)):
            total += products(self._stack(block, merged, start, stop))
        return total

    def _stack(self, block: Block, merged: Floats32 | Floats64, start: int, stop: int) -> Floats32:
        rows = np.zeros((self._rows, stop - start), np.float32)
        for i in block.touching:
            source = self._inputs[i].source
            rows[i] = source.block(block.name, block.start + start, block.start + stop)
        with np.errstate(over="ignore"):  # a result that large ends the merge
            rows[-1] = merged[start:stop]
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
