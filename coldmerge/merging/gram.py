"""Gram matrices: the inner products of a merge's inputs, in one pass over them.

They are all that a method must know whose result lies in the span of its inputs: norms,
angles, distances and every iteration follow in N × N arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.merging.block import Block, View

WORK = 2**18
"""Multiplications per product. BLAS does so few on one thread, always the same way."""


def products(rows: Floats32) -> Floats64:
    """Inner products of rows, float32 (…, N, n), among each other: float64 (…, N, N)."""
    *outer, count, size = rows.shape
    step = max(1, min(8192, WORK // max(1, count * count)))
    total = np.zeros((*outer, count, count), np.float64)
    for start in range(0, size, step):
        wide = rows[..., start : start + step].astype(np.float64)
        if count <= 4:  # where dot products are faster than a matrix product
            total += np.vecdot(wide[..., :, None, :], wide[..., None, :, :])
        else:
            total += wide @ wide.swapaxes(-1, -2)
    return total


def gram(view: View, rows: Callable[[Block], Floats32] = Block.stack) -> Floats64:
    """Inner products over a whole view of `rows(block)`, by default of the inputs' τ.

    The parts are added in the view's order, whichever thread found them.
    """
    parts = view.map_blocks(lambda block: products(rows(block)))
    count = len(parts[0]) if parts else len(view.inputs)
    return np.sum(parts, axis=0) if parts else np.zeros((count, count), np.float64)


def base_and_deltas(block: Block) -> Floats32:
    """The base's row above those of the inputs, shape (N + 1, size)."""
    return np.concatenate([block.base[None], block.stack()])


def of_weights(inner: Floats64) -> Floats64:
    """The Gram matrix of θ₁ … θ_N, θ = base + τ, from that of base, τ₁ … τ_N.

    Weights are nearly parallel. Found this way, their angles keep the digits of the deltas.
    """
    cross = inner[0, 1:]
    found: Floats64 = inner[0, 0] + cross[:, None] + cross[None, :] + inner[1:, 1:]
    return found


def norms(inner: Floats64) -> Floats64:
    """The length of every vector of a Gram matrix, shape (N,)."""
    found: Floats64 = np.sqrt(np.diagonal(inner))
    return found


def distances(inner: Floats64, point: Floats64) -> Floats64:
    """How far every vector is from Σ pointᵢ·vectorᵢ, shape (N,)."""
    along = inner @ point
    squared = np.diagonal(inner) - 2 * along + point @ along
    found: Floats64 = np.sqrt(np.maximum(squared, 0))
    return found
