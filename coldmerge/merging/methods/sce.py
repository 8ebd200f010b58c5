"""SCE: select what varies, weigh inputs by their energy, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.core.selection import WHOLE, Bracket, Seen, kth_magnitude, sample_places
from coldmerge.merging.block import Block, View
from coldmerge.merging.combination import Unweighted
from coldmerge.merging.merger import Merger, PerInput
from coldmerge.merging.sparsify import Votes

SMALLEST_ENERGY = 1e-6
"""Below this sum of the inputs' mean squares all inputs count the same."""

SMALLEST_WEIGHT = np.float32(1e-6)

NOTHING = np.float32(np.inf)
"""The variance from which on an entry is selected, where none is."""


class Known(NamedTuple):
    """The smallest N²·variance that is selected, 0 where everything is, and weights (N,)."""

    variance: np.float32
    weights: Floats32


class Sce(Merger):
    """SCE of FuseChat (arXiv 2408.07990): select by variance, calculate weights, erase signs.

    As mergekit: a tensor's inputs are weighed by the mean square of what was selected, and
    all count the same where these sum to less than 1e-6, as small updates do. Entries that
    vary as much as the last selected one are selected.
    """

    name: ClassVar[str] = "sce"
    Each: ClassVar[type[PerInput]] = Unweighted

    select_topk: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share that is selected, those of most variance, of the entries that vary "
        "between inputs; 1: all entries.",
    )

    def measure(self, view: View) -> Known:
        """The threshold of the variance, then the weights by what it selects."""
        least = np.float32(0) if self.select_topk == 1 else self._threshold(view)
        squares = view.map_blocks(
            lambda block: {
                i: np.add.reduce(np.square(tau, out=tau), dtype=np.float64)
                for i, tau in _selected(block, least)
            }
        )
        energies = [math.fsum(of.get(i, 0.0) for of in squares) for i in view.inputs]
        mean = np.array(energies) / max(1, view.size)
        total = math.fsum(mean)
        if total < SMALLEST_ENERGY:
            return Known(least, np.full(len(mean), 1 / len(mean), np.float32))
        return Known(least, (mean / total).astype(np.float32))

    def merge(self, block: Block, facts: Known) -> Floats32:
        """Of one block, the weighed mean of the entries that have the majority's sign."""
        total, plus_sum, minus_sum, room, zero = np.zeros((5, block.size), np.float32)
        votes = Votes(facts.weights, block.size)
        for i, tau in _selected(block, facts.variance):
            total += tau
            votes.count(i, tau)
            tau *= facts.weights[i]
            plus_sum += np.maximum(tau, zero, out=room)
            minus_sum += np.minimum(tau, zero, out=tau)
        plus = total >= 0
        plus_sum *= plus
        minus_sum *= ~plus
        plus_sum += minus_sum
        plus_sum /= np.maximum(votes.agreed(plus), SMALLEST_WEIGHT)
        return plus_sum

    def _threshold(self, view: View) -> np.float32:
        """The variance of the last entry that is selected; infinity where none is."""
        if view.size <= WHOLE:
            whole = np.concatenate([np.empty(0, np.float32), *view.map_blocks(_variance)])
            rank = int(np.count_nonzero(whole) * self.select_topk)
            return np.float32(np.partition(whole, -rank)[-rank]) if rank else NOTHING

        def read(start: int, stop: int) -> Floats32:
            return np.concatenate([_variance(block) for block in view.between(start, stop)])

        sample = np.stack([read(*place) for place in sample_places(view.size)])
        bracket = Bracket(sample, self.select_topk * np.count_nonzero(sample) / sample.size)

        def look(block: Block) -> tuple[int, Seen]:
            values = _variance(block)
            return int(np.count_nonzero(values)), bracket.look(values)

        counts, seen = zip(*view.map_blocks(look), strict=True)
        rank = int(sum(counts) * self.select_topk)
        if not rank:
            return NOTHING
        found = bracket.find(seen, rank)
        return kth_magnitude(read, view.size, rank) if found is None else found


def _selected(block: Block, least: np.float32) -> Iterable[tuple[int, Floats32]]:
    """The rows of a block, with zeros for what varies less than `least`."""
    if least == 0:
        return block.rows()
    stack = block.stack()
    stack *= _variance_of(stack) >= least
    return enumerate(stack)


def _variance(block: Block) -> Floats32:
    return _variance_of(block.stack())


def _variance_of(stack: Floats32) -> Floats32:
    """N² times the inputs' population variance at each entry; exactly 0 where all are equal.

    N Σd² − (Σd)² of the distances to the first input: what the inputs have in common costs
    no digits, and on a lattice nothing is rounded, so that ties are ties in any order.
    """
    total, squares, room = np.zeros((3, stack.shape[1]), np.float32)
    for row in stack[1:]:
        np.subtract(row, stack[0], out=room)
        total += room
        room *= room
        squares += room
    squares *= np.float32(len(stack))
    squares -= np.square(total, out=total)
    return np.abs(squares, out=squares)
