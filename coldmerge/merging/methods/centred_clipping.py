"""Centred clipping: a mean of task vectors that are shortened where they leave the centre."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.combination import Robust
from coldmerge.merging.gram import distances


class CentredClipping(Robust):
    """Centred clipping (arXiv 2012.10333): v ← v + mean of (τᵢ − v)·min(1, radius / |τᵢ − v|).

    It starts from the base. No input moves the result by more than radius · max_iter times
    its share, whatever it sends.
    """

    name: ClassVar[str] = "centred_clipping"

    radius: float | None = Field(
        default=None,
        gt=0,
        description="Length beyond which a difference is shortened; by default the median one.",
    )
    max_iter: int = Field(default=3, ge=1, description="Steps.")

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """Those of the centre after the last step; their sum is below one until it arrives."""
        shares = weights / weights.sum()
        centre = np.zeros(len(weights))
        for _ in range(self.max_iter):
            lengths = distances(inner, centre)
            radius = self.radius or np.sort(lengths)[(len(lengths) - 1) // 2]
            pulls = shares.copy()
            np.divide(shares * radius, lengths, out=pulls, where=lengths > radius)
            centre += pulls - pulls.sum() * centre
        return centre
