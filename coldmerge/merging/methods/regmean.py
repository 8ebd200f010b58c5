"""Regression mean: linear layers that answer as the inputs did on their own data."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.threads import one_blas_thread
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import weighted_mean
from coldmerge.merging.merger import Cut, Merger, PerInput, Share
from coldmerge.merging.shipped import shipped


class RegMean(Merger):
    """RegMean (arXiv 2212.09849): W = (Σ wᵢGᵢ)⁻¹ Σ wᵢGᵢWᵢ with G = XᵀX of the layer's inputs.

    It minimizes Σ wᵢ‖XᵢW − XᵢWᵢ‖². Inputs ship G of their linear layers; any other tensor
    gets the mean. The solution is found for deltas, which is the same. A little of the
    diagonal pulls towards the mean: it decides where no data went, and makes ΣG regular.
    G tells the second moments of activations: it reveals more of the data than weights do.
    """

    name: ClassVar[str] = "regmean"
    Each: ClassVar[type[PerInput]] = Share
    cut: ClassVar[Cut] = Cut.WHOLE

    reduce: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Factor of the entries of G off its diagonal; the paper takes 0.1 for T5.",
    )
    ridge: float = Field(
        default=1e-6, gt=0, description="Pull towards the mean, in parts of the diagonal of ΣG."
    )

    @property
    def needs(self) -> frozenset[str]:
        """Gram matrices of the inputs of linear layers."""
        return frozenset({"gram"})

    def cut_for(self, name: str, shape: tuple[int, ...]) -> Cut:
        """Whole, if it is solved for; the mean may be cut anywhere."""
        return Cut.WHOLE if len(shape) == 2 else Cut.ELEMENTS

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The merged delta of one tensor, which must be whole.

        Raises:
            TaskVectorError: ΣG is singular, in spite of the ridge.
        """
        if len(block.tensor_shape) != 2:
            return weighted_mean(block)
        with one_blas_thread():
            return self._solve(block, block.tensor_shape[1])

    def _solve(self, block: Block, width: int) -> Floats64:
        grams = np.zeros((width, width))
        answers = np.zeros((block.size // width if width else 0, width))
        mean, weights = np.zeros_like(answers), 0.0
        for i, shipped_gram in shipped(block, "gram"):
            gram = np.multiply(shipped_gram, self.reduce * block.weights[i], dtype=np.float64)
            np.fill_diagonal(gram, shipped_gram.diagonal() * block.weights[i])
            tau = block.row(i).reshape(answers.shape).astype(np.float64)
            grams += gram
            answers += tau @ gram
            tau *= block.weights[i]
            mean += tau
            weights += block.weights[i]
        if not weights:
            return weighted_mean(block)
        pull = self.ridge * grams.diagonal()
        pull[pull <= 0] = 1.0  # no data in this direction: it is the mean, whatever the pull
        grams[np.diag_indices(width)] += pull
        answers += mean * (pull / weights)
        try:
            solution = np.linalg.solve(grams, answers.T)
        except np.linalg.LinAlgError as error:
            raise TaskVectorError(
                "merge.singular_gram",
                f"The Gram matrices of tensor {block.name} add up to a singular matrix.",
                expected="a sum that can be solved for",
                hint="Raise `ridge`, or leave out the input whose Gram matrix is not one.",
                tensor=block.name,
            ) from error
        return solution.astype(np.float64, copy=False).T.reshape(-1)
