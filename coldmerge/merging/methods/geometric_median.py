"""Geometric median: the point with the least sum of distances to the task vectors."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.combination import Robust
from coldmerge.merging.gram import distances


class GeometricMedian(Robust):
    """RFA (arXiv 1912.13445): the geometric median by smoothed Weiszfeld steps from the mean.

    Whoever holds less than half of the weight cannot move it arbitrarily far.
    """

    name: ClassVar[str] = "geometric_median"

    max_iter: int = Field(default=100, ge=1, description="Weiszfeld steps at most.")
    tol: float = Field(default=1e-9, gt=0, description="Change of the coefficients to stop at.")
    smoothing: float = Field(default=1e-6, gt=0, description="Distances count at least this much.")

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """Those of the last step: each input's weight by its distance, normalized."""
        point: Floats64 = weights / weights.sum()
        for _ in range(self.max_iter):
            pulls = weights / np.maximum(distances(inner, point), self.smoothing)
            before, point = point, pulls / pulls.sum()
            if np.abs(point - before).max() < self.tol:
                break
        return point
