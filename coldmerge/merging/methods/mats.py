"""Matching models in their task subspaces, by conjugate gradients."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.core.threads import one_blas_thread
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import weighted_mean
from coldmerge.merging.merger import Cut, Merger, PerInput, Share
from coldmerge.merging.shipped import shipped


class Mats(Merger):
    """MaTS (arXiv 2312.04339): (Σ wᵢCᵢ)W = Σ wᵢCᵢWᵢ by conjugate gradients from the mean.

    C is the Gram matrix of a linear layer's inputs, or the diagonal Fisher information, as
    inputs ship them; a tensor without gets the mean. Directions in which no C is move no
    step away from the mean, so a singular ΣC does no harm. The steps are taken for deltas.
    """

    name: ClassVar[str] = "mats"
    Each: ClassVar[type[PerInput]] = Share
    cut: ClassVar[Cut] = Cut.WHOLE

    statistic: Literal["gram", "fisher"] = Field(
        default="gram", description="What C is: what the inputs must ship."
    )
    iterations: int = Field(default=100, ge=0, description="Steps at most; 0: the mean.")
    tolerance: float = Field(
        default=1e-5, ge=0, description="Stop at ‖ΣCτ − (ΣC)x‖ of this share of ‖ΣCτ‖."
    )

    @property
    def needs(self) -> frozenset[str]:
        """What C is."""
        return frozenset({self.statistic})

    def cut_for(self, name: str, shape: tuple[int, ...]) -> Cut:
        """Whole, if it is solved for; the mean may be cut anywhere."""
        return Cut.WHOLE if len(shape) == 2 or self.statistic == "fisher" else Cut.ELEMENTS

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The merged delta of one tensor, which must be whole."""
        if self.statistic == "gram" and len(block.tensor_shape) != 2:
            return weighted_mean(block)
        with one_blas_thread():
            return self._solve(block)

    def _solve(self, block: Block) -> Floats64:
        gram = self.statistic == "gram"
        shape = block.tensor_shape if gram else (1, block.size)
        operator = np.zeros((shape[1], shape[1]) if gram else shape)
        right, start, weights = np.zeros(shape), np.zeros(shape), 0.0
        for i, found in shipped(block, self.statistic):
            part = np.multiply(found.reshape(operator.shape), block.weights[i], dtype=np.float64)
            tau = block.row(i).reshape(shape).astype(np.float64)
            operator += part
            right += tau @ part if gram else tau * part
            start += tau * block.weights[i]
            weights += block.weights[i]
        if not weights:
            return weighted_mean(block)
        start /= weights
        if not gram:
            return self._descend(operator, right, start).reshape(-1)
        # in the basis of its eigenvectors ΣG is a diagonal, and a step costs no product
        values, basis = np.linalg.eigh(operator)
        np.maximum(values, 0, out=values)
        solution: Floats64 = self._descend(values, right @ basis, start @ basis) @ basis.T
        return solution.reshape(-1)

    def _descend(self, diagonal: Floats64, right: Floats64, start: Floats64) -> Floats64:
        """Conjugate gradients on diagonal · x = right, all entries together, from `start`."""
        rest = right - diagonal * start
        direction, square = rest.copy(), _square(rest)
        goal = (self.tolerance * math.sqrt(_square(right))) ** 2
        for _ in range(self.iterations):
            image = diagonal * direction
            bend = float(np.vdot(direction, image))
            if square <= goal or bend <= 0:
                break
            start += (square / bend) * direction
            rest -= (square / bend) * image
            square, before = _square(rest), square
            direction *= square / before
            direction += rest
        return start


def _square(values: Floats64) -> float:
    return float(np.vdot(values, values))
