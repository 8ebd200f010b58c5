"""Weighted average of the models' weights: mergekit's `linear`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ConfigError
from coldmerge.merging.block import Block
from coldmerge.merging.merger import BaseRole, Merger, Space


class Linear(Merger):
    """Model soups (arXiv 2203.05482): Σ wᵢθᵢ / Σ wᵢ in float32, as mergekit computes it."""

    name: ClassVar[str] = "linear"
    block: ClassVar[int] = 2**17
    space: ClassVar[Space] = Space.WEIGHTS
    base_role: ClassVar[BaseRole] = BaseRole.INPUT

    normalize: bool = Field(default=True, description="Divide by the sum of the weights.")

    def merge(self, block: Block, facts: Any) -> Floats32:
        """The average.

        Raises:
            ConfigError: the weights sum to zero and shall be normalized.
        """
        weights = block.weights.astype(np.float32)
        total = np.zeros(block.size, np.float32)
        for i, theta in block.rows():
            theta *= weights[i]
            total += theta
        if self.normalize:
            total /= sum_of_weights(weights)
        return total


def sum_of_weights(weights: Floats32) -> np.float32:
    """The sum that weights are normalized by.

    Raises:
        ConfigError: it is zero.
    """
    total = weights.sum(dtype=np.float32)
    if abs(total) < 1e-8:
        raise ConfigError(
            "merge.weights_sum_to_zero",
            "The weights of a merge sum to zero, so they cannot be normalized.",
            expected="a sum other than zero",
            got=", ".join(f"{weight:g}" for weight in weights),
            hint="Set `normalize: false`, or change a weight.",
        )
    return np.float32(total)
