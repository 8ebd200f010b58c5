"""The model card (README.md) of a folder that `coldmerge merge` wrote: what was merged, and how."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class MergeFacts:
    """What the card of one merge is made from.

    Attributes:
        name: what to call the merged model.
        method: the merge method, as a plan writes it.
        paper: one line about it.
        base: the base's name in the plan; None where the method has none.
        inputs: the inputs' names in the plan, in its order.
        recipe: the plan, as it was written.
        parameters: how many numbers the model has.
        dtype: the type they are in.
        model_type: the `model_type` of its config.json, if it has one.
        notes: what a reader should know about this merge.
        version: of coldmerge.
    """

    name: str
    method: str
    paper: str
    base: str | None
    inputs: Sequence[str]
    recipe: str
    parameters: int
    dtype: str
    model_type: str | None
    notes: Sequence[str]
    version: str


def merge_card(facts: MergeFacts) -> str:
    """The whole README.md: metadata block, then Markdown, ending in one newline."""
    # Made by hand: importing huggingface_hub's ModelCard takes as long as a small merge.
    named = dict.fromkeys([*filter(None, [facts.base]), *facts.inputs])
    hub = [name for name in named if _HUB.fullmatch(name)]
    data: dict[str, object] = {"library_name": "transformers"} if facts.model_type else {}
    data |= {"base_model": hub} if hub else {}
    data |= {"tags": ["coldmerge", "merge", "model-merging"]}
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    sections = [f"# {_line(facts.name)}", _made(facts), _recipe(facts), _check(facts)]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _made(facts: MergeFacts) -> str:
    count = len(facts.inputs)
    lines = [
        f"A {facts.model_type or 'model'} of {facts.parameters:,} parameters ({facts.dtype}), made"
        f" from {count} input{'' if count == 1 else 's'} by the merge method `{facts.method}`:"
        f" {facts.paper}",
        "",
        *([f"Base: {_code(facts.base)}", ""] if facts.base else []),
        "Merged:",
        "",
        *(f"- {_code(name)}" for name in facts.inputs),
    ]
    if facts.notes:
        lines += ["", "Notes:", "", *(f"- {_line(note)}" for note in facts.notes)]
    return "\n".join(lines)


def _recipe(facts: MergeFacts) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", facts.recipe)), default=0))
    return f"## Recipe\n\n{fence}yaml\n{facts.recipe.rstrip()}\n{fence}"


def _check(facts: MergeFacts) -> str:
    return (
        f"Made with coldmerge {facts.version}. The same"
        " recipe over the same inputs gives the same bytes, on any number of processors."
    )


def _code(name: str) -> str:
    return "`" + _line(name).replace("`", "'") + "`"


def _line(text: str) -> str:
    return " ".join(text.split())
