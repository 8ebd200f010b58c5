"""How much of the say one contributor's statistics may claim.

Fisher merging and RegMean weigh contributors by what they ship about their own data, and
nobody can count it again. A Fisher information or Gram matrix of a tensor whose trace is
more than `most` times the median of the round's is scaled down to that: a contributor
then counts for at most as much as `most` ordinary ones, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coldmerge.core.documents import Statistic
from coldmerge.core.dtypes import blocks, size
from coldmerge.screening.bounds import reference_norm
from coldmerge.screening.scaled import Vector

BOUNDED: frozenset[Statistic] = frozenset({"fisher", "gram"})
"""Statistics of which a contributor may claim too much: thresholds are counted again."""

Shares = dict[tuple[str, str], float]
"""(tensor, kind of statistic) → what the statistic is multiplied by; nothing where it is 1."""

Spread = Callable[[Callable[[str], list[float]], Sequence[str]], list[list[float]]]
"""Calls a function for every name, on as many threads as it likes; answers in order."""


def bounded_shares(
    vectors: Sequence[Vector], kind: str, most: float, spread: Spread
) -> list[Shares]:
    """The shares of each of `vectors` in one kind of statistic, `fisher` or `gram`.

    Reads every such statistic once (of a Gram matrix only the diagonal), a block at a time.
    """
    names = sorted(frozenset[str]().union(*(vector.names for vector in vectors)))
    found: list[Shares] = [{} for _ in vectors]

    def traces(name: str) -> list[float]:
        return [
            trace(vector, name, kind) if vector.has_statistic(name, kind) else 0.0
            for vector in vectors
        ]

    for name, sizes in zip(names, spread(traces, names), strict=True):
        ordinary = reference_norm(sizes)
        for shares, own in zip(found, sizes, strict=True):
            if ordinary is not None and own > most * ordinary:
                shares[name, kind] = most * ordinary / own
    return found


def trace(vector: Vector, name: str, kind: str) -> float:
    """The sum of a diagonal Fisher information, or of the diagonal of a Gram matrix, float64."""
    if kind == "gram":
        side = vector.shape(name)[1]
        return math.fsum(_diagonal(vector, name, side))
    return math.fsum(
        float(np.sum(vector.statistic(name, kind, start, stop), dtype=np.float64))
        for start, stop in blocks(size(vector.shape(name)))
    )


def _diagonal(vector: Vector, name: str, side: int) -> Iterator[float]:
    for at in range(side):
        place = at * (side + 1)
        yield float(vector.statistic(name, "gram", place, place + 1)[0])
