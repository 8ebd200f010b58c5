"""Task arithmetic: add task vectors up, or take some away."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block
from coldmerge.merging.merger import Merger, PerInput
from coldmerge.merging.sparsify import Sum


class Added(PerInput):
    """An input of task arithmetic."""

    weight: float = Field(
        default=1.0, description="Scale of this input; a negative one forgets what it learned."
    )


class TaskArithmetic(Merger):
    """Task arithmetic (arXiv 2212.04089): λ Σ wᵢτᵢ; the paper's λ is about 0.3.

    A negative weight takes away what an input learned.
    """

    name: ClassVar[str] = "task_arithmetic"
    block: ClassVar[int] = 2**17
    Each: ClassVar[type[PerInput]] = Added

    normalize: bool = Field(default=False, description="Divide by the sum of the weights.")
    lambda_: float = Field(default=1.0, alias="lambda", description="Scale of the merged delta.")

    @property
    def linear(self) -> bool:
        """Yes, unless their sum divides."""
        return not self.normalize

    def merge(self, block: Block, facts: Any) -> Floats32:
        """The sum, in float32 as mergekit computes it.

        Raises:
            ConfigError: weights that sum to zero shall be normalized.
        """
        weights = block.weights.astype(np.float32)
        total = Sum(weights, block.size, self.normalize)
        for i, tau in block.rows():
            tau *= weights[i]
            total.add(i, tau)
        merged = total.result()
        merged *= np.float32(self.lambda_)
        return merged
