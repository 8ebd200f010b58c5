"""TIES: trim, elect signs, merge the entries that agree."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block, View
from coldmerge.merging.merger import Scope
from coldmerge.merging.sparsify import Mask, SparseMerger, smallest_kept


class Ties(SparseMerger):
    """TIES-Merging (arXiv 2306.01708), with mergekit's words and weights in the election.

    Every entry as large as the smallest kept one is kept. Where positive and negative mass
    balance, the positive wins.
    """

    name: ClassVar[str] = "ties"
    elects: ClassVar[bool] = True

    normalize: bool = Field(
        default=True, description="Divide each entry by the weights that agreed on it."
    )
    trim_scope: Literal["tensor", "global"] = Field(
        default="tensor", description="Trim each tensor, or the whole task vector as the paper."
    )
    thresholds: Literal["exact", "shipped"] = Field(
        default="exact", description="Find the trim thresholds, or take the contributors'."
    )

    @model_validator(mode="after")
    def _shipped_per_tensor(self) -> Self:
        if self.thresholds == "shipped" and self.trim_scope == "global":
            raise ValueError("contributors ship thresholds of tensors: `trim_scope` is tensor then")
        return self

    @property
    def scope(self) -> Scope:
        """The whole model, if the task vector is trimmed as one."""
        return Scope(self.trim_scope)

    @property
    def needs(self) -> frozenset[str]:
        """Trim thresholds, if contributors ship them."""
        return frozenset({"trim"}) if self.thresholds == "shipped" else frozenset()

    def prepare(self, view: View) -> list[np.float32]:
        """The smallest magnitude that is kept of every input."""
        if self.thresholds == "shipped":
            return [_shipped(view, i) for i in view.inputs]
        return smallest_kept(view, [each.density for each in view.each])

    def mask(self, block: Block, i: int, tau: Floats32, fact: np.float32) -> Mask | None:
        """The entries that reach the threshold."""
        return np.abs(tau) >= fact if fact > 0 else None


def _shipped(view: View, i: int) -> np.float32:
    """The threshold that input `i` ships; 0 where it changes nothing and so ships none."""
    found = view.shipped(i, "trim")
    return np.float32(0 if found is None else found[0])
