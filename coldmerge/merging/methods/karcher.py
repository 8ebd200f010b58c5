"""Karcher mean of the models: the point on the sphere nearest to all directions."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.combination import Combination
from coldmerge.merging.gram import norms
from coldmerge.merging.merger import BaseRole, PerInput, Share


class Karcher(Combination):
    """Karcher mean (arXiv 2603.04972) of the weights' directions, times their mean length.

    An input opposite to the mean has no shortest way there, and does not pull.
    """

    name: ClassVar[str] = "karcher"
    Each: ClassVar[type[PerInput]] = Share
    base_role: ClassVar[BaseRole] = BaseRole.INPUT

    max_iter: int = Field(default=10, ge=0, description="Steps on the sphere at most.")
    tol: float = Field(
        default=1e-5, gt=0, description="A step, angle or length that counts as zero."
    )

    @property
    def from_zero(self) -> bool:
        """Weights are the points, not task vectors."""
        return True

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """Those of the mean; zero for tensors of length zero, which have no direction."""
        if len(weights) == 1:
            return np.ones(1)
        shares, lengths = weights / weights.sum(), norms(inner)
        some = lengths > self.tol
        found = np.zeros(len(weights))
        if some.any():
            units = inner[np.ix_(some, some)] / np.outer(lengths[some], lengths[some])
            mean = self._mean(units, shares[some] / shares[some].sum())
            found[some] = shares @ lengths * mean / lengths[some]
        return found

    def _mean(self, units: Floats64, shares: Floats64) -> Floats64:
        """The mean of unit vectors, by its coefficients, from their Gram matrix."""
        length = _length(units, shares)
        mean = shares / length if length >= self.tol else np.eye(len(shares))[0]
        for _ in range(self.max_iter):
            cosines = np.clip(units @ mean, -1, 1)
            angles = np.arccos(cosines)
            pulls = (angles >= self.tol) & (angles <= np.pi - self.tol)
            pull = np.zeros(len(shares))
            np.divide(shares * angles, np.sin(angles), out=pull, where=pulls)
            step = pull - pull @ cosines * mean
            length = _length(units, step)
            if length < self.tol:
                break
            mean = np.cos(length) * mean + np.sin(length) / length * step
            mean /= _length(units, mean)
        return mean


def _length(units: Floats64, coefficients: Floats64) -> float:
    return math.sqrt(max(0.0, float(coefficients @ units @ coefficients)))
