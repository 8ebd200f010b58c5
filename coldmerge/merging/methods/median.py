"""Median of every coordinate."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.merging.block import Block
from coldmerge.merging.combination import Unweighted
from coldmerge.merging.merger import Merger, PerInput


class Median(Merger):
    """Coordinate-wise median (arXiv 1803.01498): of an even number, the mean of both middles.

    An input that does not touch a tensor counts there as a zero.
    """

    name: ClassVar[str] = "median"
    Each: ClassVar[type[PerInput]] = Unweighted

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The median."""
        stacked = block.stack()
        return middle_mean(stacked, (len(stacked) - 1) // 2)


def middle_mean(stacked: Floats32, trimmed: int) -> Floats64:
    """The mean of each column (N, n) but its `trimmed` lowest and highest; shape (n,).

    `stacked` is used up.
    """
    rows, spare = list(stacked), np.empty(stacked.shape[1:], np.float32)
    for low, high in comparators(len(rows), trimmed):
        least = np.minimum(rows[low], rows[high], out=spare)
        np.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = least, rows[low]
    kept = rows[trimmed : len(rows) - trimmed]
    total: Floats64 = kept[0].astype(np.float64)
    for row in kept[1:]:
        total += row
    total /= len(kept)
    total += 0.0  # -0, of which the order of equal values decides, becomes 0
    return total


@lru_cache(maxsize=64)
def comparators(count: int, trimmed: int) -> tuple[tuple[int, int], ...]:
    """Pairs (low, high) to put in order, one after the other, so that the middle is in order.

    Without branches, a sorting network beats a sort of each column ten times over.
    """
    needed = set(range(trimmed, count - trimmed))
    found = []
    for low, high in reversed(list(_network(count))):
        if low in needed or high in needed:
            needed |= {low, high}
            found.append((low, high))
    return tuple(reversed(found))


def _network(count: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2M), for any count."""
    top = 1 << max(0, (count - 1).bit_length() - 1)
    part = top
    while part:
        step, rest, apart = top, 0, part
        while True:
            yield from ((i, i + apart) for i in range(count - apart) if i & part == rest)
            if step == part:
                break
            apart, step, rest = step - part, step // 2, part
        part //= 2
