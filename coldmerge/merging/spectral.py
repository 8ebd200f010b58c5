"""What methods have in common that merge matrices by their singular values."""

from __future__ import annotations

from abc import abstractmethod
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.core.threads import one_blas_thread
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import weighted_mean
from coldmerge.merging.merger import Cut, Merger, PerInput

NOT_MAPS = ("*embed*", "*lm_head*", "*text_projection*", "*wte*", "*wpe*", "*shared.weight")


class Term(PerInput):
    """An input of a merge of matrices."""

    weight: float = Field(
        default=1.0, gt=0, description="Factor of this input's matrices; its share in a mean."
    )


class Spectral(Merger):
    """A merger of matrices: tensors of two dimensions. Any other tensor gets the mean.

    Kernels of convolutions are not folded into matrices, as the authors' code does not.
    Tables of embeddings and output heads are matrices that map nothing between features;
    they get the mean too, unless `mean_for` is changed (the authors except the
    `text_projection` of CLIP only, and merge its positions as a matrix).
    """

    cut: ClassVar[Cut] = Cut.WHOLE
    Each: ClassVar[type[PerInput]] = Term

    lambda_: float = Field(default=1.0, alias="lambda", description="Scale of the merged delta.")
    mean_for: tuple[str, ...] = Field(
        default=NOT_MAPS,
        description="Patterns of names of matrices that get the mean, as vectors do.",
    )

    def cut_for(self, name: str, shape: tuple[int, ...]) -> Cut:
        """Whole, if singular values are looked at; the mean may be cut anywhere."""
        return Cut.WHOLE if self._is_map(name, shape) else Cut.ELEMENTS

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The merged delta of one matrix, or of a part of another tensor."""
        if self._is_map(block.name, block.tensor_shape):
            with one_blas_thread():
                merged = self.merge_matrix(block, block.tensor_shape)
        else:
            merged = weighted_mean(block)
        merged *= self.lambda_
        return merged.reshape(-1)

    @abstractmethod
    def merge_matrix(self, block: Block, shape: tuple[int, ...]) -> Floats64:
        """The merged delta of a matrix of `shape` (m, n), before λ: an array of its own."""

    def _is_map(self, name: str, shape: tuple[int, ...]) -> bool:
        excepted = any(fnmatchcase(name, pattern) for pattern in self.mean_for)
        return len(shape) == 2 and not excepted


def flattened(left: Floats64, values: Floats64, right: Floats64) -> Floats64:
    """The product left · diag(mean(values)) · right; zeros where there is no triple at all."""
    if not len(values):
        return np.zeros((len(left), right.shape[1]))
    product = left @ right
    product *= values.mean()
    return product
