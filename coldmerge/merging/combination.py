"""Methods whose result is a combination of the inputs, by coefficients from their Gram matrix."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from coldmerge.merging.block import Block, View
from coldmerge.merging.gram import base_and_deltas, gram, of_weights
from coldmerge.merging.merger import BaseRole, Merger, PerInput, Scope, Share


class Unweighted(PerInput):
    """An input of a method that has no weights."""

    weight: float = Field(default=1.0, ge=1, le=1, description="Always 1: no input counts more.")


class Combination(Merger):
    """A method that merges to Σ cᵢvᵢ, where c depends on the vectors' inner products alone.

    The vectors are the inputs' τ, or where `from_zero` their θ.
    """

    @property
    def from_zero(self) -> bool:
        """Whether vectors are measured from zero (θ) instead of from the base (τ)."""
        return False

    @abstractmethod
    def coefficients(self, inner: Floats64, weights: Floats64) -> Floats64:
        """c, shape (N,), from the vectors' Gram matrix (N, N) and the inputs' weights (N,)."""

    def measure(self, view: View) -> Floats64 | None:
        """The coefficients of the base and of every τ in the merged delta, shape (N + 1,)."""
        self.check_inputs(len(view.inputs))
        weights = np.array([each.weight for each in view.each], np.float64)
        if not self.from_zero:
            return np.concatenate([[0.0], self.coefficients(gram(view), weights)])
        found = self.coefficients(of_weights(gram(view, base_and_deltas)), weights)
        return np.concatenate([[math.fsum(found) - 1], found])

    def merge(self, block: Block, facts: Floats64) -> Floats64:
        """The combination, summed in float64."""
        return combined(block, facts)


class Turning(Combination):
    """A combination on a sphere around the base, or around zero where a plan names no base."""

    base_role: ClassVar[BaseRole] = BaseRole.OPTIONAL

    origin: Literal["base", "zero"] = Field(
        default="base", description="Turn task vectors (base), or the weights themselves (zero)."
    )

    @property
    def from_zero(self) -> bool:
        """Whether the weights themselves are turned."""
        return self.origin == "zero"


class Robust(Combination):
    """A combination that compares the inputs as wholes, so that no tensor can hide a lie."""

    scope_: Literal["global", "tensor"] = Field(
        default="global",
        alias="scope",
        description="Judge whole task vectors (global), or every tensor by itself.",
    )

    Each: ClassVar[type[PerInput]] = Share

    @property
    def scope(self) -> Scope:
        """The whole model by default."""
        return Scope(self.scope_)


def combined(block: Block, coefficients: Floats64) -> Floats64:
    """c₀·base + Σ cᵢτᵢ. An input whose coefficient is zero is not read."""
    total = np.zeros(block.size, np.float64)
    if coefficients[0]:
        np.multiply(block.base, coefficients[0], out=total)
    for i in block.touching:
        if coefficients[1 + i]:
            total += np.multiply(block.row(i), coefficients[1 + i], dtype=np.float64)
    return total


def wrong_count(method: str, expected: str, got: int, hint: str) -> ConfigError:
    """The error that a method cannot merge `got` inputs."""
    return ConfigError(
        "merge.input_count",
        f"Merge method {method} cannot merge {got} input{'' if got == 1 else 's'}.",
        expected=expected,
        got=got,
        hint=hint,
    )
