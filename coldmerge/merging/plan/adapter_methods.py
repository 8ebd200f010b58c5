"""Methods that merge LoRA adapters into one adapter, as a plan names them."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.merging.block import Block
from coldmerge.merging.linalg import weighted_mean, weighted_sum
from coldmerge.merging.merger import Merger


class LoraCat(Merger):
    """LoRA (arXiv 2106.09685): Σ wᵢsᵢBᵢAᵢ exactly, as one adapter of rank Σr.

    Factors are concatenated, never averaged: an average of A and of B has terms BᵢAⱼ that no
    input has. The result is an adapter folder.
    """

    name: ClassVar[str] = "lora_cat"

    normalize: bool = Field(default=False, description="Divide by the sum of the weights.")
    alpha: float | None = Field(
        default=None, gt=0, description="`lora_alpha` to write; by default the largest rank."
    )

    def merge(self, block: Block, facts: Any) -> Floats64:
        """The sum that the factors stand for."""
        return weighted_mean(block) if self.normalize else weighted_sum(block)


class LoraSvd(LoraCat):
    """LoRA (arXiv 2106.09685): Σ wᵢsᵢBᵢAᵢ brought back to rank r with the least error.

    By QR of the concatenated factors and the SVD of the small core between them. The result
    is an adapter folder, and what it lost is told.
    """

    name: ClassVar[str] = "lora_svd"

    rank: int | None = Field(
        default=None, ge=1, description="The rank to write; by default the inputs' largest."
    )


ADAPTER_METHODS: dict[str, type[LoraCat]] = {"lora_cat": LoraCat, "lora_svd": LoraSvd}
"""They merge factors, not blocks, and are therefore not in the registry."""
