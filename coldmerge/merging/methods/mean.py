"""Weighted mean of task vectors: the merge of ColD Fusion."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block
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
        total = np.zeros(block.size, np.float64)
        for i, tau in block.rows():
            total += np.multiply(tau, block.weights[i], dtype=np.float64)
        return np.divide(total, math.fsum(block.weights), out=total)
