"""Mean of task vectors, as in ColD Fusion (arXiv 2212.01378): Σ wᵢτᵢ / Σ wᵢ in float64."""

from __future__ import annotations

import numpy as np

from coldmerge.core.dtypes import Floats32, Floats64


class Mean:
    """Weighted mean. A task vector that does not touch a tensor counts there as zero."""

    name = "mean"

    def init(self, n: int) -> Floats64:
        """An empty sum of `n` elements."""
        return np.zeros(n, np.float64)

    def fold(self, state: Floats64, tau: Floats32, weight: float) -> None:
        """Add weight·τ."""
        state += np.multiply(tau, weight, dtype=np.float64)

    def finish(self, state: Floats64, total_weight: float) -> Floats64:
        """Divide by the weight of all inputs, those that do not touch the tensor too."""
        return np.divide(state, total_weight, out=state)
