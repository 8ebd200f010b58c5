"""Consensus merging: task arithmetic, without the entries that only few inputs want."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block
from coldmerge.merging.merger import Merger


class Consensus(Merger):
    """TALL masks and Consensus Merging (arXiv 2405.07813): λ Σ wᵢτᵢ where enough masks agree.

    Input i's mask holds where |wᵢτᵢ| > mask_lambda · |Σ wτ − wᵢτᵢ|. Entries in few masks are
    catastrophic to the others, or to all: they stay as in the base. The authors choose both
    λ by validation: `mask_lambda` from 0.2 to 0.6, `lambda` as in task arithmetic.
    """

    name: ClassVar[str] = "consensus"

    lambda_: float = Field(default=0.3, alias="lambda", description="Scale of the merged delta.")
    mask_lambda: float = Field(
        default=0.4, gt=0, description="Larger values make the inputs' masks sparser."
    )
    least_masks: int = Field(
        default=2,
        ge=1,
        description="How many masks an entry must be in; with fewer inputs, in all of them.",
    )

    def merge(self, block: Block, facts: Any) -> Floats32:
        """The sum of one block, where there is consensus. Holds all inputs of the block."""
        rows = []
        total = np.zeros(block.size, np.float32)
        for i, tau in block.rows():
            tau *= np.float32(block.weights[i])
            total += tau
            rows.append(tau)
        masks = np.zeros(block.size, np.uint16)
        room = np.empty(block.size, np.float32)
        for tau in rows:
            np.abs(np.subtract(total, tau, out=room), out=room)
            room *= np.float32(self.mask_lambda)
            masks += np.abs(tau, out=tau) > room
        total *= masks >= min(self.least_masks, len(block.each))
        total *= np.float32(self.lambda_)
        return total
