"""What a merge method is: parameters, how it wants its tensors cut, and one pure function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from coldmerge.merging.block import Block, View

Values = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class Cut(Enum):
    """How a tensor may be cut: anywhere, between rows (its first axis), or not at all."""

    ELEMENTS = "elements"
    ROWS = "rows"
    WHOLE = "whole"


class Space(Enum):
    """What the rows of a block are: τ = θ − base, or θ itself."""

    DELTAS = "deltas"
    WEIGHTS = "weights"


class Scope(Enum):
    """What one `measure` sees: one tensor, or the whole model."""

    TENSOR = "tensor"
    GLOBAL = "global"


class BaseRole(Enum):
    """What the model that a plan names as its base is to a method.

    ORIGIN: what the inputs are measured from, and none of them; a plan must name one.
    OPTIONAL: the same if a plan names one; if it does not, its merger gets `origin="zero"`
    and the inputs are measured from zero. INPUT: an input like the others (the last, if the
    plan's list of models leaves it out).
    """

    ORIGIN = "origin"
    OPTIONAL = "optional"
    INPUT = "input"


class PerInput(BaseModel):
    """Parameters that each input of a merge has of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(default=1.0, description="How much this input counts.")


class Share(PerInput):
    """The parameter of an input whose weight is a share: it must be positive."""

    weight: float = Field(default=1.0, gt=0, description="Share of this input.")


class Merger(BaseModel, ABC):
    """A merge method. Its fields are its parameters; `Each` those that every input has.

    A subclass is pure: the same blocks and facts give the same values, and no block depends
    on another but through `measure`. Its docstring's first line names the method's paper.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    name: ClassVar[str]
    Each: ClassVar[type[PerInput]] = PerInput
    cut: ClassVar[Cut] = Cut.ELEMENTS
    space: ClassVar[Space] = Space.DELTAS
    base_role: ClassVar[BaseRole] = BaseRole.ORIGIN
    block: ClassVar[int] = 2**16
    """Elements of a block: what `merge` works on at a time should fit a second-level cache."""
    caution: ClassVar[str] = ""
    """A sentence for whoever lets round after round of one model merge by it; mostly none."""

    @property
    def scope(self) -> Scope:
        """What `measure` sees; most methods look at one tensor at a time."""
        return Scope.TENSOR

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that every input must ship: of `fisher`, `gram`, `trim`."""
        return frozenset()

    @property
    def linear(self) -> bool:
        """Whether what is merged is linear in the weights of the inputs, all else being equal."""
        return False

    def cut_for(self, name: str, shape: tuple[int, ...]) -> Cut:
        """How one tensor may be cut, where not all are cut as `cut` says."""
        return self.cut

    def check_inputs(self, count: int) -> None:
        """Check that the method can merge `count` inputs; a base that is the origin is none.

        Raises:
            ConfigError: it cannot.
        """

    def check_size(self, elements: int, count: int) -> None:
        """Check that the method can merge `count` inputs of so many elements: most always can.

        Raises:
            ConfigError: it would need more memory than it may take.
        """

    def measure(self, view: View) -> Any:
        """The first pass: facts about the inputs that `merge` needs before the first block."""
        return None

    @abstractmethod
    def merge(self, block: Block, facts: Any) -> Values:
        """The merged values of one block, shape (block.size,): a delta, or θ by `space`."""
