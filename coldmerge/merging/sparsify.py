"""What the relatives of task arithmetic share: sparsify, rescale, weigh, elect a sign or add up.

Every τ is first made sparse, in a way of each method's own, and may be scaled back to the
L1 norm it had; then it is weighed, and the entries are added up, all or those of the sign
that has more mass. Words, defaults and order of steps are mergekit's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.core.selection import WHOLE, Bracket, Seen, kept, kth_magnitude, sample_places
from coldmerge.merging.block import Block, View
from coldmerge.merging.merger import Merger, PerInput
from coldmerge.merging.methods.linear import sum_of_weights

Mask = npt.NDArray[np.bool_]

SMALLEST_NORM = 1e-7
"""Below this L1 norm, before or after, nothing is rescaled."""


class Sparse(PerInput):
    """An input that is made sparse."""

    density: float = Field(
        default=1.0, gt=0, le=1, description="Share of the entries that is kept; 1: all of them."
    )


class Known(NamedTuple):
    """What the first pass found: for each input, what `mask` wants to know, and a factor."""

    facts: Sequence[Any]
    factors: Floats32


class SparseMerger(Merger):
    """A relative of task arithmetic: a subclass says which entries of a τ are kept."""

    Each: ClassVar[type[PerInput]] = Sparse
    elects: ClassVar[bool]
    """Whether entries against the elected sign are left out."""

    normalize: bool = Field(
        default=False, description="Divide each entry by the weights of the inputs it comes from."
    )
    rescale: bool = Field(
        default=False, description="Scale what was kept of a tensor to the L1 norm it had."
    )
    lambda_: float = Field(default=1.0, alias="lambda", description="Scale of the merged delta.")

    @property
    def linear(self) -> bool:
        """Where all that is kept is added up: what is kept depends on no weight."""
        return not (self.elects or self.normalize)

    @abstractmethod
    def mask(self, block: Block, i: int, tau: Floats32, fact: Any) -> Mask | None:
        """Which entries of `tau`, a row of the block, are kept; None: all of them."""

    def prepare(self, view: View) -> Sequence[Any]:
        """What `mask` must know about each input."""
        return [None for _ in view.inputs]

    def factors(self, view: View, facts: Sequence[Any]) -> Floats32:
        """What each input's kept entries are multiplied by, shape (N,): L1 before over after."""
        if not self.rescale:
            return np.ones(len(facts), np.float32)
        sums = view.map_blocks(lambda block: self._norms(block, facts))
        return np.array([_ratio([of.get(i) for of in sums]) for i in view.inputs], np.float32)

    def measure(self, view: View) -> Known:
        """What is kept of every input, and how it is rescaled."""
        facts = self.prepare(view)
        return Known(facts, self.factors(view, facts))

    def merge(self, block: Block, facts: Known) -> Floats32:
        """The sum, or the elected sum, of one block.

        Raises:
            ConfigError: weights that sum to zero shall be normalized.
        """
        weights = block.weights.astype(np.float32)
        total: Sum | Election
        total = (Election if self.elects else Sum)(weights, block.size, self.normalize)
        for i, tau in block.rows():
            mask = self.mask(block, i, tau, facts.facts[i])
            if mask is not None:
                tau *= mask
            factor = weights[i] * facts.factors[i]
            if factor != 1:
                tau *= factor
            total.add(i, tau)
        merged = total.result()
        if self.lambda_ != 1:
            merged *= np.float32(self.lambda_)
        return merged

    def _norms(self, block: Block, facts: Sequence[Any]) -> dict[int, tuple[float, float]]:
        """L1 norms of each input's row before and after, of those that lose anything."""
        found = {}
        for i, tau in block.rows():
            mask = self.mask(block, i, tau, facts[i])
            if mask is not None:
                np.abs(tau, out=tau)
                before = np.add.reduce(tau, dtype=np.float64)
                tau *= mask
                found[i] = (before, np.add.reduce(tau, dtype=np.float64))
        return found


class Sum:
    """All entries, added up; normalized by the sum of all weights."""

    def __init__(self, weights: Floats32, size: int, normalize: bool) -> None:
        """Raises ConfigError where the weights sum to zero and shall be normalized."""
        self._divisor = sum_of_weights(weights) if normalize else None
        self._sum = np.zeros(size, np.float32)

    def add(self, _: int, tau: Floats32) -> None:
        """Add the weighed entries of an input."""
        self._sum += tau

    def result(self) -> Floats32:
        """The sum."""
        if self._divisor is not None:
            self._sum /= self._divisor
        return self._sum


class Votes:
    """Who is for plus and who for minus, a bit each: the weights that agree with a winner."""

    def __init__(self, weights: Floats32, size: int) -> None:
        self._weights = weights
        self._zero = np.zeros(size, np.float32)
        self._bits = np.zeros((-(-len(weights) // 8), 2, size), np.uint8)

    def count(self, i: int, tau: Floats32) -> None:
        """The votes of input `i`: the signs of its entries; zeros abstain."""
        for side, votes_for in enumerate((np.greater, np.less)):
            votes = votes_for(tau, self._zero).view(np.uint8)
            votes *= np.uint8(1 << i % 8)
            self._bits[i // 8, side] |= votes

    def agreed(self, plus: Mask) -> Floats32:
        """The sum of the weights that voted for plus where `plus`, elsewhere for minus."""
        total = np.zeros_like(self._zero)
        chosen = np.negative(plus.view(np.uint8))
        for eight, (for_plus, for_minus) in enumerate(self._bits):
            weights = self._weights[8 * eight : 8 * eight + 8]
            patterns = np.arange(256, dtype=np.uint8)[:, None]
            there = np.unpackbits(patterns, axis=1, count=len(weights), bitorder="little")
            sums = (there * weights).sum(axis=1, dtype=np.float32)
            total += sums.take(for_minus ^ ((for_plus ^ for_minus) & chosen))
        return total


class Election:
    """The entries whose sign has more mass, added up; where both have the same, plus wins.

    S = Σ t and A = Σ |t| hold both sides: their sums are (A + S) / 2 and (S − A) / 2, and
    the winner's, at least half of A, loses no digit. So memory does not grow with the
    inputs, but for the votes where the winner is normalized by its weights.
    """

    def __init__(self, weights: Floats32, size: int, normalize: bool) -> None:
        self._sum, self._mass = np.zeros((2, size), np.float32)
        self._votes = Votes(weights, size) if normalize else None

    def add(self, i: int, tau: Floats32) -> None:
        """Count the weighed entries of input `i`; they are used up."""
        self._sum += tau
        if self._votes is not None:
            self._votes.count(i, tau)
        self._mass += np.abs(tau, out=tau)

    def result(self) -> Floats32:
        """The sums of the winning side, normalized if asked; 0 where nobody voted."""
        plus = self._sum >= 0
        self._mass.view(np.uint32)[...] |= self._sum.view(np.uint32) & np.uint32(1 << 31)
        self._sum += self._mass
        self._sum *= np.float32(0.5)
        if self._votes is not None:
            weights = self._votes.agreed(plus)
            weights += weights == 0
            self._sum /= weights
        return self._sum


Rows = Callable[[Block], Iterable[tuple[int, Floats32]]]
"""Numbered rows of values, float32, shape (block.size,): the caller may change them."""


def kth_magnitudes(
    view: View, ranks: Sequence[Sequence[int]], rows: Rows = Block.rows
) -> list[tuple[np.float32, ...]]:
    """Of every row over the view the k-th largest magnitudes, for each of its own ranks.

    `ranks` has one entry for each row that there may be. Exact, and usually in one pass over
    all rows together. A row without ranks is not looked at; one that is left out is zeros.
    """
    found: list[tuple[np.float32, ...] | None] = [None if of else () for of in ranks]
    if view.size > WHOLE and any(ranks):
        found = _bracketed(view, ranks, rows)

    def alone(i: int) -> tuple[np.float32, ...]:
        known = found[i]
        if known is not None:
            return known

        def read(start: int, stop: int) -> Floats32:
            row: Floats32 = _between(view, rows, len(ranks), start, stop)[i]
            return row

        return kth_magnitude(read, view.size, ranks[i])

    return view.map_inputs(alone)


def smallest_kept(view: View, densities: Sequence[float]) -> list[np.float32]:
    """The magnitude that a density of each input's entries reach; 0 at density 1."""
    ranks = [(kept(density, view.size),) if density < 1 else () for density in densities]
    return [of[0] if of else np.float32(0) for of in kth_magnitudes(view, ranks)]


def _bracketed(
    view: View, ranks: Sequence[Sequence[int]], rows: Rows
) -> list[tuple[np.float32, ...] | None]:
    """By brackets from samples of all rows; None where one does not hold the threshold."""
    places = sample_places(view.size)
    samples = np.stack([_between(view, rows, len(ranks), *at) for at in places], axis=1)
    brackets = [
        [Bracket(np.abs(of), rank / view.size) for rank in own]
        for of, own in zip(samples, ranks, strict=True)
    ]
    del samples

    def look(block: Block) -> list[list[Seen]]:
        seen: list[list[Seen]] = [[] for _ in brackets]
        for i, values in rows(block):
            if brackets[i]:
                np.abs(values, out=values)
                seen[i] = [bracket.look(values) for bracket in brackets[i]]
        return seen

    seen = view.map_blocks(look)
    found: list[tuple[np.float32, ...] | None] = []
    for i, own in enumerate(ranks):
        values = [
            bracket.find([of[i][number] for of in seen if of[i]], rank)
            for number, (bracket, rank) in enumerate(zip(brackets[i], own, strict=True))
        ]
        whole = [value for value in values if value is not None]
        found.append(tuple(whole) if len(whole) == len(values) else None)
    return found


def _between(view: View, rows: Rows, count: int, start: int, stop: int) -> Floats32:
    """The rows over elements [start, stop) of the view, shape (count, stop − start)."""
    found = np.zeros((count, stop - start), np.float32)
    at = 0
    for block in view.between(start, stop):
        for i, values in rows(block):
            found[i, at : at + block.size] = values
        at += block.size
    return found


def _ratio(norms: Sequence[tuple[float, float] | None]) -> float:
    """The norm before over that after, from those of blocks."""
    parts = [of for of in norms if of is not None]
    before, after = (math.fsum(of[side] for of in parts) for side in (0, 1))
    return before / after if min(before, after) >= SMALLEST_NORM else 1.0
