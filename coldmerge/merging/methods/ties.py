"""TIES: trim, elect signs, merge the entries that agree."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats32
from coldmerge.core.selection import kth_magnitude
from coldmerge.merging.block import Block, View
from coldmerge.merging.merger import Merger, PerInput, Scope


class Trimmed(PerInput):
    """An input of TIES."""

    density: float = Field(
        default=1.0, gt=0, le=1, description="Share of the entries, the largest, that is kept."
    )


class Ties(Merger):
    """TIES-Merging (arXiv 2306.01708), with mergekit's words and weights in the election.

    Every entry as large as the smallest kept one is kept. Where positive and negative mass
    balance, the positive wins.
    """

    name: ClassVar[str] = "ties"
    Each: ClassVar[type[PerInput]] = Trimmed

    normalize: bool = Field(
        default=True, description="Divide each entry by the weights that agreed on it."
    )
    lambda_: float = Field(default=1.0, alias="lambda", description="Scale of the merged delta.")
    trim_scope: Literal["tensor", "global"] = Field(
        default="tensor", description="Trim each tensor, or the whole task vector as the paper."
    )
    thresholds: Literal["exact", "shipped"] = Field(
        default="exact", description="Find the trim thresholds, or take the contributors'."
    )

    @property
    def scope(self) -> Scope:
        """The whole model, if the task vector is trimmed as one."""
        return Scope(self.trim_scope)

    @property
    def needs(self) -> frozenset[str]:
        """Trim thresholds, if contributors ship them."""
        return frozenset({"trim"}) if self.thresholds == "shipped" else frozenset()

    def measure(self, view: View) -> list[np.float32]:
        """The smallest magnitude that is kept of every input."""
        if self.thresholds == "shipped":
            return [shipped_threshold(view, i) for i in view.inputs]
        return view.map_inputs(lambda i: threshold(view, i, view.each[i].density))

    def merge(self, block: Block, facts: list[np.float32]) -> Floats32:
        """The elected delta of one block."""
        elected = Election(block.size, self.normalize)
        for i, tau in block.rows():
            tau *= np.abs(tau) >= facts[i]
            elected.add(tau, np.float32(block.weights[i]))
        merged = elected.result()
        merged *= np.float32(self.lambda_)
        return merged


def threshold(view: View, i: int, density: float) -> np.float32:
    """The magnitude that at least `density` of the elements of input `i` reach; 0: all."""
    keep = max(1, int(density * view.size))
    if keep >= view.size:
        return np.float32(0)
    return kth_magnitude(lambda start, stop: view.read(i, start, stop), view.size, keep)


def shipped_threshold(view: View, i: int) -> np.float32:
    """The threshold that contributor `i` computed; 0 where it shipped none: nothing changed."""
    found = view.shipped(i, "trim")
    return np.float32(0 if found is None else found[0])


class Election:
    """Sign election in two sums, of the positive and of the negative entries.

    Their order does not matter but for rounding, and memory does not grow with the inputs.
    """

    def __init__(self, size: int, normalize: bool) -> None:
        self._sums = np.zeros((2, size), np.float32)
        self._weights = np.zeros((2, size), np.float32) if normalize else None
        self._zero = np.zeros(size, np.float32)

    def add(self, tau: Floats32, weight: np.float32) -> None:
        """Count one input: its entries, shape (size,), are used up."""
        tau *= weight
        for side, pick, sign in ((0, np.maximum, np.greater), (1, np.minimum, np.less)):
            if self._weights is not None:
                self._weights[side] += sign(tau, self._zero) * weight
            self._sums[side] += pick(tau, self._zero)

    def result(self) -> Floats32:
        """The sums of the winning side, normalized if asked; 0 where nobody voted."""
        positive = self._sums[0] + self._sums[1] >= 0
        chosen = np.where(positive, *self._sums)
        if self._weights is not None:
            weights = np.where(positive, *self._weights)
            weights[weights == 0] = 1
            chosen /= weights
        return chosen
