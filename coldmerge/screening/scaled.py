"""A task vector as a merge may see it: clipped, with bounded statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from coldmerge.core.algebra import Delta
from coldmerge.core.dtypes import Floats32


class Vector(Delta, Protocol):
    """Deltas with statistics beside them: a `TaskVector`, or anything like it."""

    def has_statistic(self, name: str, kind: str) -> bool:
        """Whether the statistic of tensor `name` was shipped."""
        ...

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened statistic of tensor `name`."""
        ...


class Scaled:
    """`vector` times `factor`; its statistics times `shares`, by (tensor, kind).

    A product is taken in float64 and rounded once to float32. A trim threshold is a magnitude
    of the delta and is multiplied as the delta is, by the same rounding, so that it stays the
    k-th largest. Fisher information and Gram matrices tell of the data, not of the length of
    the delta: the clip leaves them alone.
    """

    def __init__(
        self, vector: Vector, factor: float, shares: Mapping[tuple[str, str], float]
    ) -> None:
        self._vector, self._factor, self._shares = vector, factor, shares
        self.base_digest, self.names = vector.base_digest, vector.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the delta of `name`."""
        return self._vector.shape(name)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened delta of `name`."""
        return _times(self._vector.block(name, start, stop), self._factor)

    def has_statistic(self, name: str, kind: str) -> bool:
        """Whether the statistic of tensor `name` was shipped."""
        return self._vector.has_statistic(name, kind)

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened statistic of tensor `name`."""
        share = self._factor if kind == "trim" else self._shares.get((name, kind), 1.0)
        return _times(self._vector.statistic(name, kind, start, stop), share)


def scaled(
    vector: Vector, factor: float, shares: Mapping[tuple[str, str], float] | None = None
) -> Vector:
    """`vector` itself where nothing is to be scaled, so that its bytes stay what they are."""
    return vector if factor == 1.0 and not shares else Scaled(vector, factor, shares or {})


def _times(values: Floats32, factor: float) -> Floats32:
    if factor == 1.0:
        return values
    return np.multiply(values, factor, dtype=np.float64).astype(np.float32)
