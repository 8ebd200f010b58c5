"""Recipes: which merger with which parameters merges which tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from coldmerge.core.errors import ConfigError
from coldmerge.core.validation import first_problem
from coldmerge.merging.merger import Merger, PerInput

M = TypeVar("M", Merger, PerInput)


@dataclass(frozen=True)
class Setting:
    """How one tensor is merged: the merger, and the parameters of each input in order."""

    merger: Merger
    each: tuple[PerInput, ...]


class Recipe(Protocol):
    """The setting of every tensor. Inputs are counted in the order of their keys."""

    def setting(self, name: str) -> Setting:
        """How tensor `name` is merged."""
        ...


@dataclass(frozen=True)
class Uniform:
    """One setting for every tensor."""

    merger: Merger
    each: tuple[PerInput, ...]

    def setting(self, name: str) -> Setting:
        """The same, whatever the tensor."""
        return Setting(self.merger, self.each)


def uniform(
    method: type[Merger], parameters: Mapping[str, Any], weights: Sequence[float]
) -> Uniform:
    """A recipe from flat parameters, which go to the merger or to every input by their names.

    Raises:
        ConfigError: `merge.bad_parameter`, naming the parameter.
    """
    for_each = {key: value for key, value in parameters.items() if key in fields(method.Each)}
    own = {key: value for key, value in parameters.items() if key not in for_each}
    factor = checked(method.Each, for_each, method).weight if "weight" in for_each else 1.0
    return Uniform(
        checked(method, own, method),
        tuple(
            checked(method.Each, {**for_each, "weight": weight * factor}, method)
            for weight in weights
        ),
    )


def fields(model: type[Merger] | type[PerInput]) -> dict[str, str]:
    """The words of a model's parameters (as a plan writes them), each with its field's name."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def checked(model: type[M], values: Mapping[str, Any], method: type[Merger]) -> M:
    """`model` with these parameters.

    Raises:
        ConfigError: one is unknown, missing or out of range.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problem = first_problem(error)
        words = sorted({*fields(method), *fields(method.Each)})
        raise ConfigError(
            "merge.bad_parameter",
            f"Merge method {method.name} cannot take its parameters: {problem.key}: "
            f"{problem.text}.",
            expected=f"parameters of {method.name}: {', '.join(words)}",
            got=", ".join(f"{key}={value}" for key, value in values.items()) or "none",
            hint=f"`coldmerge methods {method.name}` lists them with their ranges and defaults.",
            parameter=problem.key,
        ) from error
