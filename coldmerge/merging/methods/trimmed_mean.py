"""Trimmed mean of every coordinate."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block
from coldmerge.merging.combination import Unweighted
from coldmerge.merging.merger import Merger, PerInput
from coldmerge.merging.methods.median import middle_mean


class TrimmedMean(Merger):
    """Coordinate-wise trimmed mean (arXiv 1803.01498): without the extremes at both ends.

    An input that does not touch a tensor counts there as a zero.
    """

    name: ClassVar[str] = "trimmed_mean"
    Each: ClassVar[type[PerInput]] = Unweighted

    trim: float = Field(
        default=0.2,
        ge=0,
        lt=0.5,
        description="Share of the inputs left out at each end, rounded up while any remain.",
    )

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The mean of what remains."""
        stacked = block.stack()
        return middle_mean(stacked, self.trimmed(len(stacked)))

    def trimmed(self, count: int) -> int:
        """How many of `count` inputs are left out at each end."""
        return min(math.ceil(self.trim * count - 1e-9), (count - 1) // 2)
