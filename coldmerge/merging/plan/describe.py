"""Merge methods as people read about them: parameters, ranges, defaults, from the fields."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from coldmerge.merging.merger import Merger, PerInput
from coldmerge.merging.plan.adapter_methods import ADAPTER_METHODS
from coldmerge.merging.registry import merger_class, method_names


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method. `default` says nothing where it is `required`."""

    word: str
    kind: str
    range: str
    required: bool
    default: object
    per_input: bool
    meaning: str


@dataclass(frozen=True)
class Method:
    """A merge method: its paper, what it looks at, what inputs must ship, its parameters."""

    name: str
    paper: str
    details: str
    base: str
    scope: str
    cut: str
    needs: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def methods() -> list[Method]:
    """Every merge method there is, sorted by name."""
    return [describe(method_class(name)) for name in sorted({*method_names(), *ADAPTER_METHODS})]


def method_class(name: str) -> type[Merger]:
    """The merge method called `name`, those that make adapters included.

    Raises:
        ConfigError: there is none.
    """
    return ADAPTER_METHODS.get(name) or merger_class(name)


def describe(method: type[Merger]) -> Method:
    """What there is to say about a method, with its parameters' defaults."""
    paper, _, details = (inspect.getdoc(method) or "").partition("\n")
    plain = method.model_construct()
    return Method(
        name=method.name,
        paper=paper,
        details=" ".join(details.split()),
        base=method.base_role.value,
        scope=plain.scope.value,
        cut=method.cut.value,
        needs=tuple(sorted(plain.needs)),
        parameters=(*_parameters(method.Each, True), *_parameters(method, False)),
    )


def schema(method: type[Merger]) -> dict[str, Any]:
    """JSON schemas of the parameters of the merge and of each input."""
    return {
        "method": method.name,
        "parameters": method.model_json_schema(),
        "each": method.Each.model_json_schema(),
    }


def _parameters(model: type[Merger] | type[PerInput], per_input: bool) -> list[Parameter]:
    fields = model.model_json_schema()
    required = fields.get("required", [])
    return [
        Parameter(
            word=word,
            kind=_kind(field),
            range=_range(field),
            required=word in required,
            default=field.get("default"),
            per_input=per_input,
            meaning=field.get("description", ""),
        )
        for word, field in fields.get("properties", {}).items()
        if not _has_one_value(field)
    ]


def _has_one_value(field: dict[str, Any]) -> bool:
    """Whether there is nothing to choose, as with the weight of an unweighted input."""
    return "minimum" in field and field["minimum"] == field.get("maximum")


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(o) for o in field["anyOf"] if o.get("type") != "null")
    if "enum" in field or "const" in field:
        return "word"
    words = {"number": "number", "integer": "whole number", "boolean": "true or false"}
    words |= {"array": "list of texts", "string": "text"}
    kind = str(field.get("type", "value"))
    return words.get(kind, kind)


def _range(field: dict[str, Any]) -> str:
    for option in field.get("anyOf", []):
        if _range(option):
            return _range(option)
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    low = field.get("exclusiveMinimum", field.get("minimum"))
    high = field.get("exclusiveMaximum", field.get("maximum"))
    if low is None and high is None:
        return ""
    left = "(" if "exclusiveMinimum" in field or low is None else "["
    right = ")" if "exclusiveMaximum" in field or high is None else "]"
    return f"{left}{'−∞' if low is None else low}, {'∞' if high is None else high}{right}"
