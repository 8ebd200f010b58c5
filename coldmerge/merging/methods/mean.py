"""Weighted mean of task vectors: the merge of ColD Fusion."""

from __future__ import annotations

from typing import Any, ClassVar

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import weighted_mean
from coldmerge.merging.merger import Merger, PerInput, Share


class Mean(Merger):
    """ColD Fusion (arXiv 2212.01378): Σ wᵢτᵢ / Σ wᵢ, summed in float64.

    An input that does not touch a tensor counts there as a zero.
    """

    name: ClassVar[str] = "mean"
    block: ClassVar[int] = 2**17
    Each: ClassVar[type[PerInput]] = Share

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The mean, rounded once at the end of the sum."""
        return weighted_mean(block)
