"""Spherical mean of several models, by one step from their weighted mean."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from coldmerge.merging.combination import Turning
from coldmerge.merging.gram import norms
from coldmerge.merging.methods.linear import sum_of_weights

NOISE = 1e-7
"""Length of a mean of unit vectors that float64 does not tell from zero by a Gram matrix."""


class Multislerp(Turning):
    """Multi-SLERP (goddard.blog/posts/multislerp-wow-what-a-cool-idea): a mean of directions.

    The mean of the unit vectors, as long as the mean of the lengths. The step in the tangent
    space that the method adds is zero there, since that mean is where the tangents balance.
    """

    name: ClassVar[str] = "multislerp"

    normalize_weights: bool = Field(default=True, description="Divide weights by their sum.")
    eps: float = Field(default=1e-8, gt=0, description="Added to lengths before dividing.")

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """Those of the mean direction.

        Raises:
            ConfigError: three or more inputs whose directions cancel out.
        """
        if len(weights) == 1:
            return np.ones(1)
        if self.normalize_weights:
            weights = weights / sum_of_weights(weights.astype(np.float32))
        lengths = norms(inner)
        units: Floats64 = weights / (lengths + self.eps)
        length = math.sqrt(max(0.0, float(units @ inner @ units)))
        if length >= max(self.eps, NOISE):
            return units * float(weights @ lengths / length)
        if len(weights) == 2 or not lengths.any():
            return weights
        raise ConfigError(
            "merge.opposed_inputs",
            "Multi-SLERP has no direction to go where those of the inputs cancel out.",
            expected="inputs whose directions have a mean other than zero",
            got=f"{len(weights)} inputs that balance",
            hint="Change a weight, or use `karcher` or `linear`.",
        )
