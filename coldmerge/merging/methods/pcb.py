"""PCB-Merging: entries compete within their task vector and across task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block, View
from coldmerge.merging.merger import Merger, PerInput, Scope, Share
from coldmerge.merging.sparsify import Rows, kth_magnitudes

TAIL = 0.0001
"""Share of the smallest, and of the largest, magnitudes that is clamped."""


class Range(NamedTuple):
    """The smallest and largest of some numbers, or bounds to clamp them to."""

    low: np.float32
    high: np.float32

    def scaled(self, values: Floats32) -> Floats32:
        """The values clamped and mapped to [0, 1], in place; zeros where the range is empty."""
        np.clip(values, self.low, self.high, out=values)
        values -= self.low
        if self.high > self.low:
            values /= self.high - self.low
        return values


class Known(NamedTuple):
    """Of every input the range of its magnitudes, and that of the scores that count."""

    magnitudes: Sequence[Range]
    scores: Sequence[Range]


class Pcb(Merger):
    """PCB-Merging (arXiv 2410.02396): means weighed by how entries win two competitions.

    An entry's score is exp(N·a²)·tanh(τᵢ Στ), where a is its magnitude on a scale from 0 to
    1 within its task vector, tails of 0.01% clamped. The scores above the `density`'s
    threshold, on a scale from 0 to 1, weigh the entries: λ Σ sᵢτᵢ / Σ sᵢ.
    """

    name: ClassVar[str] = "pcb"
    Each: ClassVar[type[PerInput]] = Share

    density: float = Field(
        default=0.1, gt=0, le=1, description="Share of an input's entries, by score, that counts."
    )
    lambda_: float = Field(default=1.2, alias="lambda", description="Scale of the merged delta.")
    scope_: Literal["global", "tensor"] = Field(
        default="global",
        alias="scope",
        description="Compete within the whole task vector as the paper, or within each tensor.",
    )

    @property
    def scope(self) -> Scope:
        """The whole model by default."""
        return Scope(self.scope_)

    def measure(self, view: View) -> Known:
        """The ranges of every input's magnitudes, then those of its scores."""
        low, high = int(view.size * TAIL), max(0, int(view.size * (1 - TAIL) - 1))
        tails = kth_magnitudes(view, [(view.size - low, view.size - high)] * len(view.inputs))
        magnitudes = [Range(*of) for of in tails]
        return Known(magnitudes, self._scores(view, magnitudes))

    def merge(self, block: Block, facts: Known) -> Floats32:
        """The weighed mean of one block."""
        stack = block.stack()
        total, weights, room = np.zeros((3, block.size), np.float32)
        for i, score in scores(stack, facts.magnitudes):
            share = facts.scores[i].scaled(score)
            share *= np.float32(block.weights[i])
            weights += share
            np.clip(np.abs(stack[i], out=room), *facts.magnitudes[i], out=room)
            room *= np.sign(stack[i])
            room *= share
            total += room
        total /= np.maximum(weights, np.float32(1e-12))
        total *= np.float32(self.lambda_)
        return total

    def _scores(self, view: View, magnitudes: Sequence[Range]) -> list[Range]:
        """From the threshold, the `density`'s quantile from above, to the largest score."""
        rank = view.size - min(view.size - 1, int(view.size * (1 - self.density)))

        def side(sign: int) -> Rows:
            def rows(block: Block) -> Iterator[tuple[int, Floats32]]:
                for i, score in scores(block.stack(), magnitudes):
                    score *= np.float32(sign)
                    yield i, np.maximum(score, np.float32(0), out=score)

            return rows

        found = [Range(*of) for of in kth_magnitudes(view, [(rank, 1)] * len(magnitudes), side(1))]
        lost = [of.low == 0 for of in found]
        if not any(lost):
            return found
        ranks = [(view.size - rank + 1, view.size) if there else () for there in lost]
        below = kth_magnitudes(view, ranks, side(-1))
        return [
            Range(-others[0], of.high or -others[1]) if there else of
            for of, there, others in zip(found, lost, below, strict=True)
        ]


def scores(stack: Floats32, magnitudes: Sequence[Range]) -> Iterator[tuple[int, Floats32]]:
    """(number, scores) of every input, all scaled by one factor so that none overflows."""
    total = np.zeros_like(stack[0])
    for tau in stack:  # one after the other, so that the rounding is that of every block
        total += tau
    shift = np.float32(max(0, len(stack) - 80))
    for i, tau in enumerate(stack):
        score = magnitudes[i].scaled(np.abs(tau))
        score *= score
        score *= np.float32(len(stack))
        score -= shift
        np.exp(score, out=score)
        score *= np.tanh(total * tau)
        yield i, score
