"""Model stock: how far to go towards the mean, by how alike the task vectors are."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block, View
from coldmerge.merging.combination import Combination, Unweighted, combined, wrong_count
from coldmerge.merging.gram import products
from coldmerge.merging.merger import Cut, PerInput

TINY = 1e-6
"""Product of lengths, and denominator, below which mergekit takes them for zero."""


class ModelStock(Combination):
    """Model Stock (arXiv 2403.19522): base + t·mean(τ), t = N·cos / (1 + (N − 1)·cos).

    cos is the mean cosine between two task vectors. Where the ratio has no value, t is zero.
    """

    name: ClassVar[str] = "model_stock"
    Each: ClassVar[type[PerInput]] = Unweighted
    cut: ClassVar[Cut] = Cut.ROWS

    filter_wise: bool = Field(
        default=False, description="A ratio per row (the last axis), not one per tensor."
    )

    def check_inputs(self, count: int) -> None:
        """Two or more.

        Raises:
            ConfigError: one alone.
        """
        if count < 2:
            hint = "There is no cosine between fewer; use `task_arithmetic` for one."
            raise wrong_count(self.name, "two models or more beside the base", count, hint)

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """Those of t·mean(τ)."""
        return np.repeat(ratio(inner) / len(weights), len(weights))

    def measure(self, view: View) -> Floats64 | None:
        """The coefficients of a tensor; None where each row has its own."""
        if not self.filter_wise:
            return super().measure(view)
        self.check_inputs(len(view.inputs))
        return None

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The part of the mean."""
        if not self.filter_wise:
            return combined(block, facts)
        stacked = block.stack()
        rows = stacked.reshape(
            len(stacked), -1, block.tensor_shape[-1] if block.tensor_shape else 1
        )
        mean: Floats64 = rows.mean(axis=0, dtype=np.float64)
        mean *= ratio(products(rows.swapaxes(0, 1)))[:, None]
        return mean.reshape(-1)


def ratio(inner: Floats64) -> Floats64:
    """The ratio t from Gram matrices (…, N, N)."""
    count = inner.shape[-1]
    lengths = np.sqrt(np.diagonal(inner, axis1=-2, axis2=-1))
    both = np.maximum(lengths[..., :, None] * lengths[..., None, :], TINY)
    upper = np.triu_indices(count, 1)
    cosine: Floats64 = np.clip(inner / both, -1, 1)[..., *upper].mean(axis=-1)
    below = 1 + (count - 1) * cosine
    found = np.zeros_like(cosine)
    np.divide(count * cosine, below, out=found, where=np.abs(below) >= TINY)
    return found
