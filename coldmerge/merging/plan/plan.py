"""What a plan file says, in mergekit's words: methods, models, parameters, types.

Nothing is opened here but the plan itself. What cannot be done is refused by its name and
line, and so is what mergekit would ignore in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.errors import ConfigError
from coldmerge.merging.merger import BaseRole, Merger
from coldmerge.merging.plan.adapter_methods import ADAPTER_METHODS
from coldmerge.merging.plan.document import Node, Where, read, suggestion
from coldmerge.merging.plan.refusals import METHODS, WORDS, refuse
from coldmerge.merging.registry import merger_class, method_names

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Element types by mergekit's words."""

TOP = frozenset(
    {
        "merge_method",
        "base_model",
        "models",
        "slices",
        "parameters",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "tokenizer",
        "chat_template",
        "name",
    }
)
"""Keys of a plan."""
_MODEL = frozenset({"model", "parameters"})
_SLICE = frozenset({"sources", "parameters", "base_model"})
_SOURCE = frozenset({"model", "layer_range", "parameters"})


@dataclass(frozen=True)
class Named:
    """A model as the plan names it, and where."""

    name: str
    where: Where


@dataclass(frozen=True)
class Slice:
    """Layers [first, last) and their parameters; `layers` is None for all of the model.

    `each` has the parameters of the models, in the order of `Plan.models`.
    """

    layers: tuple[int, int] | None
    each: tuple[Node | None, ...]
    own: Node | None
    where: Where


@dataclass(frozen=True)
class Plan:
    """A plan file, read and checked as far as that goes without its models.

    `base` is None where the method has none. `vocabulary` is `base` where rows of the
    vocabulary are to be matched by their tokens, and None where they must agree.
    """

    path: Path
    text: str
    method: type[Merger]
    method_at: Where
    base: Named | None
    models: tuple[Named, ...]
    slices: tuple[Slice, ...]
    parameters: Node | None
    dtype: str | None
    vocabulary: Named | None
    chat_template: str | None

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is a LoRA adapter and not a model."""
        return self.method.name in ADAPTER_METHODS

    @property
    def fixed(self) -> dict[str, str]:
        """Parameters that follow from the plan's form and are not written in it."""
        optional = self.method.base_role is BaseRole.OPTIONAL
        return {"origin": "zero"} if optional and self.base is None else {}


def load(path: Path | str) -> Plan:
    """Read a plan file.

    Raises:
        ConfigError: it is not a plan, or asks for what coldmerge does not do; with the line.
    """
    text, root = read(Path(path))
    if isinstance(root.value, dict):
        refuse(root, WORDS)
    top = root.mapping("A plan", TOP)
    method = _method(top, root)
    models, slices = _models(top, root)
    return Plan(
        path=Path(path),
        text=text,
        method=method,
        method_at=top["merge_method"].where,
        base=_named(top.get("base_model"), "base_model"),
        models=models,
        slices=slices,
        parameters=given(top, "parameters"),
        dtype=_dtype(given(top, "out_dtype") or given(top, "dtype")),
        vocabulary=_vocabulary(top),
        chat_template=_chat_template(given(top, "chat_template")),
    )


def given(table: dict[str, Node], key: str) -> Node | None:
    """The node of `key`, unless it is missing or says nothing."""
    node = table.get(key)
    return None if node is None or node.value is None else node


def _method(top: dict[str, Node], root: Node) -> type[Merger]:
    node = _required(top, "merge_method", root)
    name = node.text("merge_method")
    refuse(node, METHODS)
    if name in ADAPTER_METHODS:
        return ADAPTER_METHODS[name]
    try:
        return merger_class(name)
    except ConfigError as error:
        if error.code != "merge.unknown_method":
            raise
        raise ConfigError(
            "plan.unknown_method",
            f"{node.where}: there is no merge method `{name}`.",
            expected=error.expected,
            got=name,
            hint=suggestion(name, {*method_names(), *ADAPTER_METHODS})
            + " `coldmerge methods` lists them.",
            at=node.where,
        ) from error


def _required(table: dict[str, Node], key: str, around: Node) -> Node:
    node = given(table, key)
    if node is None:
        raise ConfigError(
            "plan.missing_key",
            f"{around.where}: the key `{key}` is missing.",
            expected=key,
            got=", ".join(around.keys) or "nothing",
            hint=f"Add `{key}:`; docs/merging.md says what it means.",
            at=around.where,
        )
    return node


def _named(node: Node | None, what: str) -> Named | None:
    if node is None or node.value is None:
        return None
    return Named(node.text(what), node.where)


def _models(top: dict[str, Node], root: Node) -> tuple[tuple[Named, ...], tuple[Slice, ...]]:
    models, slices = given(top, "models"), given(top, "slices")
    if (models is None) == (slices is None):
        at = root.where if slices is None else slices.where
        raise ConfigError(
            "plan.models_or_slices",
            f"{at}: a plan has either `models` or `slices`.",
            expected="one of the two",
            got="neither" if slices is None else "both",
            hint="List the models under `models:`; `slices:` is for parameters by layers.",
            at=at,
        )
    if models is not None:
        named, each = _inputs(models, "models", _MODEL)
        return named, (Slice(None, each, None, models.where),)
    return _slices(_required(top, "slices", root))


def _inputs(
    node: Node, what: str, allowed: frozenset[str]
) -> tuple[tuple[Named, ...], tuple[Node | None, ...]]:
    named: list[Named] = []
    each = []
    for item in node.items(what):
        table = item.mapping(f"An entry of {what}", allowed)
        model = _required(table, "model", item)
        name = Named(model.text("model"), model.where)
        twin = next((other for other in named if other.name == name.name), None)
        if twin is not None:
            raise ConfigError(
                "plan.model_twice",
                f"{name.where}: the model {name.name} stands in line {twin.where.line} already.",
                expected="every model once",
                got=name.name,
                hint="Give it a larger weight instead.",
                at=name.where,
            )
        named.append(name)
        each.append(given(table, "parameters"))
    return tuple(named), tuple(each)


def _slices(node: Node) -> tuple[tuple[Named, ...], tuple[Slice, ...]]:
    models: tuple[Named, ...] = ()
    slices: list[Slice] = []
    for item in node.items("slices"):
        refuse(item, WORDS)
        table = item.mapping("A slice", _SLICE)
        sources = _required(table, "sources", item)
        named, each = _inputs(sources, "sources", _SOURCE)
        models = models or named
        if sorted(m.name for m in named) != sorted(m.name for m in models):
            raise ConfigError(
                "plan.slices_differ",
                f"{sources.where}: this slice has other models than the first one.",
                expected=", ".join(m.name for m in models),
                got=", ".join(m.name for m in named),
                hint="Name the same models in every slice; a weight of 0 leaves one out.",
                at=sources.where,
            )
        place = {m.name: i for i, m in enumerate(named)}
        slices.append(
            Slice(
                _layers(sources, slices[-1] if slices else None),
                tuple(each[place[m.name]] for m in models),
                given(table, "parameters"),
                item.where,
            )
        )
    return models, tuple(slices)


def _layers(sources: Node, before: Slice | None) -> tuple[int, int]:
    """The one range that all sources of a slice must have: layers stay in their places."""
    first = before.layers[1] if before and before.layers else 0
    found = (0, 0)
    for item in sources.value:
        node = _required(item.value, "layer_range", item)
        ends = [end.value for end in node.items("layer_range")]
        if len(ends) != 2 or any(type(end) is not int for end in ends) or ends[0] >= ends[1]:
            raise ConfigError(
                "plan.bad_layer_range",
                f"{node.where}: a layer range is two whole numbers, the first the smaller.",
                expected="[first, last + 1]",
                got=ends,
                hint="[0, 32] are the layers 0 to 31.",
                at=node.where,
            )
        if ends[0] != first or (any(found) and found != (ends[0], ends[1])):
            raise ConfigError(
                "plan.layer_stacking",
                f"{node.where}: layers would not stay in their places (a stacked model, or"
                " frankenmerge), which is not supported.",
                expected=list(found) if any(found) else f"a range that begins with layer {first}",
                got=ends,
                hint="Give every source of a slice the same range, and let each slice begin"
                " where the one before it ends; for stacking use mergekit.",
                at=node.where,
            )
        found = (ends[0], ends[1])
    return found


def _dtype(node: Node | None) -> str | None:
    if node is None:
        return None
    name = str(node.value).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            "plan.unknown_dtype",
            f"{node.where}: models cannot be written in the type {node.value}.",
            expected=", ".join(DTYPES),
            got=node.value,
            hint="Choose one of these; sums are always made in float32 or float64.",
            at=node.where,
        )
    return DTYPES[name]


def _vocabulary(top: dict[str, Node]) -> Named | None:
    source, table = given(top, "tokenizer_source"), given(top, "tokenizer")
    if table is not None:
        refuse(table, WORDS)
        inner = table.mapping("tokenizer", frozenset({"source"}))
        source = given(inner, "source") or source
    if source is None:
        return None
    refuse(source, {"union": WORDS["union"]})
    return Named(source.text("tokenizer_source"), source.where)


def _chat_template(node: Node | None) -> str | None:
    if node is None:
        return None
    text = node.text("chat_template")
    if text != "auto" and "{" not in text:
        raise ConfigError(
            "plan.chat_template_name",
            f"{node.where}: no chat template is called `{text}` here.",
            expected="the template itself, in Jinja, or auto: the models' most common one",
            got=text,
            hint="Paste the template, or leave the key out to keep the base's own.",
            at=node.where,
        )
    return text
