"""DARE: drop entries at random, rescale what is left, then add up or elect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block, View
from coldmerge.merging.random import below, bits
from coldmerge.merging.sparsify import Mask, SparseMerger


class Dare(SparseMerger):
    """DARE (arXiv 2311.03099): keep each entry with probability `density`, rescale the rest."""

    caution: ClassVar[str] = (
        "each round drops anew from what the last one left, so that a model decays over rounds "
        "(mergekit issue 258)"
    )

    block: ClassVar[int] = 2**18

    rescale: bool = Field(default=True, description="Scale up what was kept.")
    rescale_by: Literal["norm", "density"] = Field(
        default="norm",
        description="Rescale a tensor to the L1 norm it had (as mergekit), or by 1/density (as "
        "the paper), which needs one pass instead of two.",
    )
    seed: int = Field(default=0, ge=0, description="What is dropped follows from it.")

    def mask(self, block: Block, i: int, tau: Floats32, fact: Any) -> Mask | None:
        """The entries that chance keeps."""
        density = block.each[i].density
        if density == 1:
            return None
        place = (block.name, block.keys[i], block.start, block.stop)
        return bits(self.seed, *place) < below(density)

    def factors(self, view: View, facts: Sequence[Any]) -> Floats32:
        """L1 before over after, or 1/density."""
        if self.rescale and self.rescale_by == "density":
            return np.array([1 / each.density for each in view.each], np.float32)
        return super().factors(view, facts)


class DareLinear(Dare):
    """DARE (arXiv 2311.03099): drop entries at random, rescale the rest, add up.

    Not for rounds that follow each other, as in ColD Fusion: each one drops anew from what
    the last one left, so that the model decays (mergekit issue 258).
    """

    name: ClassVar[str] = "dare_linear"
    elects: ClassVar[bool] = False


class DareTies(Dare):
    """DARE (arXiv 2311.03099): drop entries at random, rescale the rest, elect signs as TIES.

    Not for rounds that follow each other, as in ColD Fusion: each one drops anew from what
    the last one left, so that the model decays (mergekit issue 258).
    """

    name: ClassVar[str] = "dare_ties"
    elects: ClassVar[bool] = True
