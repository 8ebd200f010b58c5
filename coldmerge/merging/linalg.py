"""Sums over the rows of a block; matrices on one BLAS thread, and an SVD that knows zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coldmerge.core.dtypes import Floats32, Floats64, blocks
from coldmerge.merging.block import Block

ZERO = 1e-6
"""Singular values below this share of the largest are rounding of float32 inputs, not change."""

_RESOLVED = 3e-5
"""The smallest share of the largest singular value that a Gram matrix resolves to 1e-6."""

_STEP = 2**16


@dataclass(frozen=True)
class Triples:
    """Singular triples: left (m, q), values (q,) from the largest down, right (q, n), float64."""

    left: Floats64
    values: Floats64
    right: Floats64

    @property
    def polar(self) -> Floats64:
        """U Vᵀ, shape (m, n): orthonormal on the range of the matrix, zero beyond it."""
        return self.left @ self.right


def triples(matrix: Floats64, most: int | None = None, above: float = 0.0) -> Triples:
    """The singular triples of a float64 `matrix` (m, n), at most `most`, the largest first.

    Those with values below `ZERO` times the largest, or not above `above`, do not exist: a
    matrix of zeros has none. Signs, and bases of equal values, are arbitrary.
    """
    if len(matrix) > matrix.shape[1]:
        turned = triples(matrix.T, most, above)
        return Triples(turned.right.T, turned.values, turned.left.T)
    squares, basis = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    count = _count(values, most, above)
    if count and values[count - 1] < _RESOLVED * values[0]:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        count = _count(values, most, above)
        return Triples(left[:, :count].copy(), values[:count], right[:count].copy())
    left = basis[:, ::-1][:, :count].copy()  # copies: a view would keep the whole basis
    return Triples(left, values[:count], (left.T @ matrix) / values[:count, None])


def _count(values: Floats64, most: int | None, above: float) -> int:
    largest = values[0] if len(values) else 0.0
    real = int(np.count_nonzero(values > max(above, ZERO * largest)))
    return real if most is None else min(real, most)


def polar(matrix: Floats64) -> Floats64:
    """The polar factor U Vᵀ of `matrix` on its range, float64, of the same shape."""
    return triples(matrix).polar


def weighted(row: Floats32, weight: float, shape: tuple[int, ...]) -> Floats64:
    """The matrix weight · row of `shape`, float64."""
    return np.multiply(row.reshape(shape), weight, dtype=np.float64)


def weighted_sum(block: Block) -> Floats64:
    """Σ wᵢ · rowᵢ of a block, float64, shape (size,), with one row in memory at a time."""
    total = np.zeros(block.size, np.float64)
    part = np.empty(min(_STEP, block.size), np.float64)
    for i, row in block.rows():
        for start, stop in blocks(block.size, _STEP):
            scaled = part[: stop - start]
            np.multiply(row[start:stop], block.weights[i], out=scaled)
            total[start:stop] += scaled
    return total


def weighted_mean(block: Block) -> Floats64:
    """Σ wᵢ · rowᵢ / Σ wᵢ over all inputs, float64, shape (size,): the merge `mean`."""
    total = weighted_sum(block)
    total /= math.fsum(block.weights)
    return total
