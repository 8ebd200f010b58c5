"""Fisher-weighted averaging: each parameter follows the models that it matters to."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block, View
from coldmerge.merging.linalg import weighted_mean
from coldmerge.merging.merger import Merger, PerInput, Scope, Share
from coldmerge.merging.shipped import shipped


class Fisher(Merger):
    """Fisher merging (arXiv 2111.09832): Σ wᵢFᵢθᵢ / Σ wᵢFᵢ, F the diagonal Fisher information.

    Inputs ship F. Where none does for a tensor, its mean is taken; an input that neither
    changes a tensor nor ships its F has no say there.
    """

    name: ClassVar[str] = "fisher"
    Each: ClassVar[type[PerInput]] = Share

    floor: float = Field(
        default=1e-8, gt=0, description="F is at least this: where nobody cares, the mean."
    )
    normalize: bool = Field(
        default=False,
        description="Divide each input's F by its L2 norm over the model, before the floor.",
    )

    @property
    def scope(self) -> Scope:
        """The whole model, if norms are taken over it."""
        return Scope.GLOBAL if self.normalize else Scope.TENSOR

    @property
    def needs(self) -> frozenset[str]:
        """The diagonal Fisher information."""
        return frozenset({"fisher"})

    def measure(self, view: View) -> list[float]:
        """What each input's F is divided by."""
        if not self.normalize:
            return [1.0 for _ in view.inputs]
        squares = view.map_blocks(_squares)
        sums = (math.fsum(block.get(i, 0.0) for block in squares) for i in view.inputs)
        return [math.sqrt(total) or 1.0 for total in sums]

    def merge(self, block: Block, facts: list[float]) -> Floats64:
        """The weighted average of the deltas."""
        top, bottom = np.zeros(block.size), np.zeros(block.size)
        found = False
        for i, fisher in shipped(block, "fisher"):
            found = True
            share = np.divide(fisher, facts[i], dtype=np.float64)
            np.maximum(share, self.floor, out=share)
            share *= block.weights[i]
            bottom += share
            share *= block.row(i)
            top += share
        if not found:
            return weighted_mean(block)
        top /= bottom
        return top


def _squares(block: Block) -> dict[int, float]:
    """ΣF² of each input over a block."""
    found = {}
    for i, fisher in shipped(block, "fisher"):
        wide = fisher.astype(np.float64)
        found[i] = float(np.einsum("i,i->", wide, wide))
    return found
