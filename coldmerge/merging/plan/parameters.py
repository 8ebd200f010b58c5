"""Gradients and filters: from a plan's parameters to the setting of every tensor.

As in mergekit: a model's own parameters come before those of its slice, and these before
those of the plan. A list of numbers is a gradient over the layers of a slice, a list of
`{filter, value}` takes the first whose filter is a part of the tensor's name. Tensors
outside the layers (embeddings, the last norm, heads) are at the gradient's beginning.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from coldmerge.core.errors import ConfigError
from coldmerge.merging.merger import Merger, PerInput
from coldmerge.merging.plan.document import Node, Where
from coldmerge.merging.plan.plan import Plan, Slice
from coldmerge.merging.recipe import Setting, checked, fields

IGNORED = frozenset({"int8_mask"})
"""Words that say how mergekit saves memory and change no value."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e\.")

Scopes = tuple[Node | None, ...]
Model = type[Merger] | type[PerInput]


@dataclass(frozen=True)
class Settings:
    """A recipe with a setting of its own for each tensor."""

    table: Mapping[str, Setting]

    def setting(self, name: str) -> Setting:
        """How tensor `name` is merged."""
        return self.table[name]


def layer(name: str) -> int | None:
    """The layer that a tensor belongs to; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def settings(
    plan: Plan,
    inputs: Sequence[int | None],
    names: Sequence[str],
    covering: Iterable[str] | None = None,
) -> Settings:
    """The settings of the tensors `names`, of a model with the tensors `covering` (default: these).

    `inputs` are the places in `plan.models` of the merge's inputs, in the order of their
    keys; None is the base, where the plan does not list it.

    Raises:
        ConfigError: a parameter is unknown, missing, of the wrong type or out of range, or
            the slices do not cover the layers; with the line.
    """
    check_words(plan)
    layers = [found for found in map(layer, covering or names) if found is not None]
    count = 1 + max(layers, default=-1)
    _check_cover(plan, count)
    resolver = _Resolver(plan, inputs)
    return Settings({name: resolver.setting(name, *_place(plan, name, count)) for name in names})


def check_words(plan: Plan) -> None:
    """Check every parameter of a plan by itself: its name, its place, its type and range.

    Raises:
        ConfigError: one is wrong; with the line.
    """
    own, each = fields(plan.method), fields(plan.method.Each)
    shared = [plan.parameters, *(part.own for part in plan.slices)]
    for node in shared:
        _check_table(plan, node, {**each, **own})
    for part in plan.slices:
        for node in part.each:
            _check_table(plan, node, each)


def _check_table(plan: Plan, table: Node | None, words: Mapping[str, str]) -> None:
    if table is None:
        return
    everywhere = {*fields(plan.method), *fields(plan.method.Each)}
    allowed = frozenset({*words, *IGNORED, *everywhere})
    for word, node in table.mapping(f"The parameters of {plan.method.name}", allowed).items():
        if word in words:
            model = plan.method if word in fields(plan.method) else plan.method.Each
            for value in [node] if _takes_lists(model, word) else _leaves(node):
                _validated(plan, model, word, value.plain, value.where)
        elif word not in IGNORED:
            where = table.keys[word]
            raise ConfigError(
                "plan.parameter_place",
                f"{where}: `{word}` is a parameter of the whole merge, not of one model.",
                expected=f"one of {', '.join(sorted(words))}",
                got=word,
                hint="Move it under `parameters:` of the plan or of the slice.",
                at=where,
            )


def _leaves(node: Node) -> list[Node]:
    """The scalars of a parameter: its value, a gradient's ends, or those under filters.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(node.value, dict):
        table = node.mapping("A filtered value", frozenset({"filter", "value"}))
        if "value" not in table:
            raise _malformed(node)
        if given_filter := table.get("filter"):
            given_filter.text("filter")
        return _leaves(table["value"])
    if isinstance(node.value, list):
        kinds = {isinstance(item.value, dict) for item in node.value}
        if len(kinds) != 1 or any(isinstance(item.value, list) for item in node.value):
            raise _malformed(node)
        return [leaf for item in node.value for leaf in _leaves(item)]
    if node.value is None:
        raise _malformed(node)
    return [node]


def _malformed(node: Node) -> ConfigError:
    return ConfigError(
        "plan.bad_gradient",
        f"{node.where}: this is not a value of a parameter.",
        expected="a number, a list of numbers, or a list of {filter: …, value: …}",
        got=node.kind if node.value else "nothing",
        hint="For example `weight: [0, 0.5, 1]`, or `- filter: mlp` with a `value:`.",
        at=node.where,
    )


def _check_cover(plan: Plan, count: int) -> None:
    last = plan.slices[-1]
    if last.layers is not None and last.layers[1] != count:
        raise ConfigError(
            "plan.layers_not_covered",
            f"{last.where}: the slices end with layer {last.layers[1] - 1}, and the model has"
            f" the layers 0 to {count - 1}.",
            expected=f"slices that cover the layers 0 to {count - 1}",
            got=f"up to {last.layers[1] - 1}",
            hint="Give the last slice `layer_range: [" + f"{last.layers[0]}, {count}]`.",
            at=last.where,
        )


def _place(plan: Plan, name: str, count: int) -> tuple[Slice, float]:
    """The slice that rules a tensor, and where in it (0 to 1) the tensor is."""
    at = layer(name)
    if at is None:
        return plan.slices[0 if _EMBEDDING.search(name) else -1], 0.0
    part = next((s for s in plan.slices if s.layers and at < s.layers[1]), plan.slices[-1])
    first, last = part.layers or (0, count)
    return part, (at - first) / (last - first - 1) if last - first > 1 else 1.0


class _Resolver:
    def __init__(self, plan: Plan, inputs: Sequence[int | None]) -> None:
        self._plan, self._inputs = plan, inputs
        self._made: dict[Hashable, Any] = {}

    def setting(self, name: str, part: Slice, t: float) -> Setting:
        shared: Scopes = (part.own, self._plan.parameters)
        each = tuple(
            self._resolved(
                self._plan.method.Each,
                (None if i is None else part.each[i], *shared),
                (name, t),
            )
            for i in self._inputs
        )
        merger = self._resolved(self._plan.method, shared, (name, t), self._plan.fixed)
        return Setting(merger, each)

    def _resolved(
        self,
        model: Any,
        scopes: Scopes,
        place: tuple[str, float],
        fixed: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        values = dict(fixed)
        for word in fields(model):
            for scope in scopes:
                node = scope.value.get(word) if scope else None
                found = None if node is None else self._value(model, word, node, place)
                if found is not None:
                    values[word] = found
                    break
        key = (model, *values.items())
        if key not in self._made:
            self._made[key] = self._checked(model, values)
        return self._made[key]

    def _checked(self, model: Any, values: dict[str, Any]) -> Any:
        try:
            return checked(model, values, self._plan.method)
        except ConfigError as error:
            raise ConfigError(
                "plan.bad_parameters",
                f"{self._plan.method_at}: {error.message}",
                expected=error.expected,
                got=error.got,
                hint=error.hint,
                at=self._plan.method_at,
            ) from error

    def _value(self, model: Model, word: str, node: Node, place: tuple[str, float]) -> Any:
        """The value for a tensor; None where no filter fits it."""
        if not isinstance(node.value, list | dict) or _takes_lists(model, word):
            return _validated(self._plan, model, word, node.plain, node.where)
        if isinstance(node.value, dict):
            return self._filtered(model, word, [node], place)
        if isinstance(node.value[0].value, dict):
            return self._filtered(model, word, node.value, place)
        return self._interpolated(model, word, node, place[1])

    def _filtered(
        self, model: Model, word: str, nodes: Sequence[Node], place: tuple[str, float]
    ) -> Any:
        for node in nodes:
            part = node.value.get("filter")
            if part is None or part.value == "*" or part.value in place[0]:
                return self._value(model, word, node.value["value"], place)
        return None

    def _interpolated(self, model: Model, word: str, node: Node, t: float) -> Any:
        ends = [_validated(self._plan, model, word, e.value, e.where) for e in node.value]
        if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
            return ends[int(t * (len(ends) - 1))]
        at = t * (len(ends) - 1)
        low = int(at)
        high = min(len(ends) - 1, low + 1)
        value = (1 - (at - low)) * ends[low] + (at - low) * ends[high]
        return _validated(self._plan, model, word, value, node.where)


@cache
def _takes_lists(model: Model, word: str) -> bool:
    """Whether a list is one value of the parameter, and not a gradient."""
    return _validator(model, word).json_schema().get("type") == "array"


@cache
def _validator(model: Model, word: str) -> TypeAdapter[Any]:
    field = model.model_fields[fields(model)[word]]
    kind: Any = field.annotation
    if field.metadata:
        kind = Annotated[(kind, *field.metadata)]
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _validated(plan: Plan, model: Model, word: str, value: object, where: Where) -> Any:
    """A parameter's value in its own type.

    Raises:
        ConfigError: it has another type or is out of range.
    """
    try:
        found = _validator(model, word).validate_python(value)
        if isinstance(value, bool) and not isinstance(found, bool):
            raise _bad_value(plan, word, value, where, "Input should be a number")
        return found
    except ValidationError as error:
        text = error.errors(include_url=False, include_context=False)[0]["msg"]
        raise _bad_value(plan, word, value, where, text) from error


def _bad_value(plan: Plan, word: str, value: object, where: Where, text: str) -> ConfigError:
    return ConfigError(
        "plan.bad_value",
        f"{where}: `{word}` of {plan.method.name} cannot be {value}.",
        expected=text.removeprefix("Input should be "),
        got=value,
        hint=f"`coldmerge methods {plan.method.name}` lists ranges and defaults.",
        at=where,
    )
