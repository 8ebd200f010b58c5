"""DELLA: drop entries at random, small ones more often, then add up or elect."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.block import Block
from coldmerge.merging.merger import Cut, PerInput
from coldmerge.merging.random import below, bits
from coldmerge.merging.sparsify import Mask, Sparse, SparseMerger


class Ranked(Sparse):
    """An input of DELLA."""

    epsilon: float = Field(
        default=0.15,
        ge=0,
        lt=0.5,
        description="The smallest entry of a row is kept with probability density - epsilon, "
        "the largest with density + epsilon.",
    )

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.density < 1 and not self.epsilon < self.density < 1 - self.epsilon:
            raise ValueError("density - epsilon and density + epsilon must lie inside (0, 1)")
        return self


class MagPrune(SparseMerger):
    """DELLA (arXiv 2406.11617): keep entries at random, large ones of a row more often."""

    Each: ClassVar[type[PerInput]] = Ranked
    cut: ClassVar[Cut] = Cut.ROWS

    rescale: bool = Field(default=True, description="Scale what was kept to the L1 norm it had.")
    seed: int = Field(default=0, ge=0, description="What is dropped follows from it.")

    def mask(self, block: Block, i: int, tau: Floats32, fact: Any) -> Mask | None:
        """The entries that chance keeps; they are ranked along a tensor's second axis."""
        each = block.each[i]
        if each.density == 1:
            return None
        shape = block.tensor_shape
        rows = tau.reshape(1, -1) if len(shape) < 2 else tau.reshape(-1, *shape[1:])
        ranks = np.linspace(-1, 1, rows.shape[1]) if rows.shape[1] > 1 else np.zeros(1)
        bounds = below(each.density + ranks * each.epsilon)
        place = (block.name, block.keys[i], block.start, block.stop)
        return bits(self.seed, *place) < by_rank(rows, bounds).reshape(-1)


class Della(MagPrune):
    """DELLA (arXiv 2406.11617): drop small entries more often, elect signs as TIES.

    As with DARE, rounds that follow each other drop anew from what the last one left.
    """

    name: ClassVar[str] = "della"
    elects: ClassVar[bool] = True

    normalize: bool = Field(
        default=True, description="Divide each entry by the weights that agreed on it."
    )


class DellaLinear(MagPrune):
    """DELLA (arXiv 2406.11617): drop small entries more often, add up.

    As with DARE, rounds that follow each other drop anew from what the last one left.
    """

    name: ClassVar[str] = "della_linear"
    elects: ClassVar[bool] = False


def by_rank(rows: Floats32, values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """values[r] for the r-th smallest magnitude along the second axis, shape like `rows`.

    Of equal magnitudes the first is the smaller one.
    """
    keys = np.abs(rows).view(np.uint32).astype(np.uint64)  # magnitudes sort as their bits do
    keys <<= np.uint64(32)
    keys |= np.arange(rows.size, dtype=np.uint64).reshape(rows.shape)
    keys.sort(axis=1)
    keys &= np.uint64(2**32 - 1)
    found = np.empty(rows.size, np.uint32)
    along = values.reshape(1, -1, *(1 for _ in rows.shape[2:]))
    found[keys.view(np.int64).reshape(-1)] = np.broadcast_to(along, rows.shape).reshape(-1)
    return found.reshape(rows.shape)
