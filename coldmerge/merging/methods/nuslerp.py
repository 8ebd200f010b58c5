"""Spherical interpolation between two models, whole tensors or vector by vector."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32, Floats64, size
from coldmerge.merging.block import Block, View
from coldmerge.merging.combination import Turning, combined, wrong_count
from coldmerge.merging.merger import Cut
from coldmerge.merging.methods.slerp import arc

STRAIGHT = 1 - 2.0**-25
"""The largest cosine that float32, mergekit's precision, tells from one."""


class Nuslerp(Turning):
    """Slerp (Shoemake, 1985) between two models by weight, around the base or zero.

    mergekit's `nuslerp`, whose base is the origin if there is one.
    """

    name: ClassVar[str] = "nuslerp"
    cut: ClassVar[Cut] = Cut.ROWS

    nuslerp_flatten: bool = Field(default=True, description="Take each tensor as one vector.")
    nuslerp_row_wise: bool = Field(
        default=False,
        description="Where not flattened: vectors lie along the first axis, not the last.",
    )

    def check_inputs(self, count: int) -> None:
        """Two models.

        Raises:
            ConfigError: not two.
        """
        if count != 2:
            hint = "`slerp` goes from the base to one model, `karcher` takes any number."
            raise wrong_count(self.name, "two models", count, hint)

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """Those of two flattened tensors."""
        return np.array(arc(inner[0, 0], inner[1, 1], inner[0, 1], place(weights), STRAIGHT))

    def measure(self, view: View) -> Floats64 | None:
        """The coefficients of a flattened tensor, or the inner products by column, if asked.

        Vectors along the last axis lie in one block and need no facts.
        """
        if self.nuslerp_flatten:
            return super().measure(view)
        self.check_inputs(len(view.inputs))
        if not self.nuslerp_row_wise:
            return None
        total = np.zeros(1)
        for block in view.blocks():  # a part per thread would be as large as the tensor
            total = total + inner_products(self._vectors(block), 0)
        return total

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The turned tensor, as a delta."""
        if self.nuslerp_flatten:
            return combined(block, facts)
        pair = self._vectors(block)
        aa, bb, ab = inner_products(pair, -1) if facts is None else facts
        a, b = arc(aa, bb, ab, place(block.weights), STRAIGHT)
        merged: Floats64 = a * pair[0]
        merged += b * pair[1]
        flat = merged.reshape(-1)
        return flat - block.base if self.from_zero else flat

    def _vectors(self, block: Block) -> Floats32:
        """Both inputs, shape (2, rows, columns), vectors along one of these axes."""
        rows = block.stack()
        if self.from_zero:
            rows += block.base
        shape = block.tensor_shape
        if self.nuslerp_row_wise:
            return rows.reshape(2, -1, size(shape[1:]))
        return rows.reshape(2, -1, shape[-1] if shape else 1)


def place(weights: Floats64) -> float:
    """Where between two models: the second one's share of the weights."""
    total = weights.sum()
    return 0.5 if abs(total) < 1e-6 else float(weights[1] / total)


def inner_products(pair: Floats32, axis: int) -> Floats64:
    """|a|², |b|² and a·b of vectors along `axis`, which stays with length 1: shape (3, …)."""
    pairs = ((pair[0], pair[0]), (pair[1], pair[1]), (pair[0], pair[1]))
    return np.stack(
        [np.multiply(a, b, dtype=np.float64).sum(axis=axis, keepdims=True) for a, b in pairs]
    )
