"""Krum: the task vector that has the nearest neighbours."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.combination import Robust, wrong_count


class Krum(Robust):
    """Krum and, where `keep` is more than one, Multi-Krum (arXiv 1703.02757).

    An input's score is the sum of its squared distances to the N − attackers − 2 nearest
    others. The lowest scores are kept; where they are equal, the lowest keys.
    """

    name: ClassVar[str] = "krum"

    attackers: int = Field(default=1, ge=0, description="How many inputs may be hostile.")
    keep: int = Field(default=1, ge=1, description="How many inputs are averaged.")

    def check_inputs(self, count: int) -> None:
        """At least 2·attackers + 3, of which at most N − attackers are kept.

        Raises:
            ConfigError: there are fewer.
        """
        if count < 2 * self.attackers + 3:
            need = f"at least {2 * self.attackers + 3} inputs against {self.attackers} attackers"
            hint = "Lower `attackers`, or use `median` or `geometric_median`."
            raise wrong_count(self.name, need, count, hint)
        if self.keep > count - self.attackers:
            need = f"at least keep + attackers = {self.keep + self.attackers} inputs"
            raise wrong_count(self.name, need, count, "Lower `keep`.")

    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """The weighted mean of those that are kept."""
        kept = np.argsort(self.scores(inner), kind="stable")[: self.keep]
        found = np.zeros(len(weights))
        found[kept] = weights[kept] / weights[kept].sum()
        return found

    def scores(self, inner: Floats64) -> Floats64:
        """The score of every input, shape (N,), rounded so that rounding makes no ranks."""
        squares = np.diagonal(inner)
        largest = squares[:, None] + squares[None, :]
        apart = largest - 2 * inner
        apart[apart < 1e-12 * largest] = 0
        np.fill_diagonal(apart, np.inf)
        nearest = np.sort(apart, axis=1)[:, : len(inner) - self.attackers - 2]
        mantissa, exponent = np.frexp(nearest.sum(axis=1))
        rounded: Floats64 = np.ldexp(np.round(mantissa, 9), exponent)
        return rounded
