"""Task singular vectors: the top directions of every input, made to not interfere."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import polar, triples, weighted
from coldmerge.merging.spectral import Spectral


class TsvM(Spectral):
    """TSV-Merging (arXiv 2412.00081): the top r/N singular triples of each of N matrices wᵢτᵢ.

    r is the smaller side, and at least one triple of each is taken. Left and right vectors
    are concatenated, made orthonormal (their polar factors) and multiplied with the singular
    values. Inputs that are alike share directions: what they have in common is not doubled.
    Tensors that are no matrices, or that `mean_for` names, get the mean.
    """

    name: ClassVar[str] = "tsv_m"

    def merge_matrix(self, block: Block, shape: tuple[int, ...]) -> Floats64:
        """The triples of all inputs, orthogonalized and multiplied out."""
        most = max(1, min(shape) // len(block.each))
        parts = [triples(weighted(tau, block.weights[i], shape), most) for i, tau in block.rows()]
        left = polar(np.concatenate([part.left for part in parts], axis=1))
        right = polar(np.concatenate([part.right for part in parts]))
        left *= np.concatenate([part.values for part in parts])
        return left @ right
