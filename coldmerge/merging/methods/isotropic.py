"""Isotropic merging: every direction that the models learned counts alike."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import ZERO, Triples, polar, triples, weighted, weighted_sum
from coldmerge.merging.spectral import Spectral, flattened


class IsoC(Spectral):
    """Iso-C (arXiv 2502.04959): Σ wᵢτᵢ = UΣVᵀ becomes mean(Σ) · UVᵀ.

    The mean is over the singular values that are not zero: the nuclear norm is kept, and a
    sum of low rank stays of low rank. One accumulated matrix is in memory, however many
    inputs there are. Tensors that are no matrices, or that `mean_for` names, get the mean.
    """

    name: ClassVar[str] = "iso_c"

    def merge_matrix(self, block: Block, shape: tuple[int, ...]) -> Floats64:
        """The sum with its spectrum made flat."""
        found = triples(weighted_sum(block).reshape(shape))
        return flattened(found.left, found.values, found.right)


class IsoCTS(Spectral):
    """Iso-CTS (arXiv 2502.04959): as Iso-C, with room for what single inputs alone learned.

    The top directions of Σ wᵢτᵢ are kept; the others give way to the top directions of each
    wᵢτᵢ outside of them. All are orthogonalized and get the mean singular value. Tensors
    that are no matrices, or that `mean_for` names, get the mean.
    """

    name: ClassVar[str] = "iso_cts"

    common_space_fraction: float = Field(
        default=0.8, ge=0, le=1, description="Share of the directions taken from the sum."
    )

    def merge_matrix(self, block: Block, shape: tuple[int, ...]) -> Floats64:
        """The common and the single directions, orthogonalized, with a flat spectrum."""
        common, single = self._dimensions(min(shape), len(block.each))
        parts = [triples(weighted_sum(block).reshape(shape), common)]
        if single:
            rest = _Rest(parts[0].left, shape)
            for i, tau in block.rows():
                parts.append(rest.triples(weighted(tau, block.weights[i], shape), single))
        left = np.concatenate([part.left for part in parts], axis=1)
        right = np.concatenate([part.right for part in parts])
        values = np.concatenate([part.values for part in parts])
        return flattened(polar(left), values, polar(right))

    def _dimensions(self, full: int, inputs: int) -> tuple[int, int]:
        """Directions from the sum, and from each input: all of `full`, as the authors round."""
        left_over = full - int(full * self.common_space_fraction)
        single = min(round(left_over / inputs), full // inputs)
        return full - single * inputs, single


class _Rest:
    """The space beside orthonormal columns `common` (m, c)."""

    def __init__(self, common: Floats64, shape: tuple[int, ...]) -> None:
        self._common = common
        self._basis: Floats64 | None = None
        if shape[0] <= shape[1]:
            # a basis of the rest is small here, and so is the SVD in its coordinates
            self._basis = np.linalg.qr(common, mode="complete")[0][:, common.shape[1] :]

    def triples(self, matrix: Floats64, most: int) -> Triples:
        """The top triples of (I − CCᵀ) · matrix."""
        above = ZERO * float(np.linalg.norm(matrix))
        if self._basis is None:
            beyond = matrix - self._common @ (self._common.T @ matrix)
            return triples(beyond, most, above)
        found = triples(self._basis.T @ matrix, most, above)
        return Triples(self._basis @ found.left, found.values, found.right)
