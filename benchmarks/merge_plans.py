"""Plan files for every method that the merge benchmark knows, the same for both programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DENSITY = 0.2
TRIM = "trim"
"""Inputs of `ties_trim`: task vectors with the thresholds that their contributors found."""


@dataclass(frozen=True)
class Method:
    """How a method is run: `word` in the plan, parameters, and what it may be given."""

    word: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True
    at_most: int | None = None
    random: bool = False
    inputs: str = "models"

    def sources(self, asked: int) -> int:
        """How many fine-tunes are merged when `asked` are wanted."""
        return asked if self.at_most is None else min(asked, self.at_most)


WEIGHT = {"weight": 1.0}
TRIMMED = {"weight": 1.0, "density": DENSITY}
METHODS = {
    "linear": Method("linear", each=WEIGHT, base=False),
    "task_arithmetic": Method("task_arithmetic", {"lambda": 0.3}, WEIGHT),
    "ties": Method("ties", each=TRIMMED),
    "ties_trim": Method("ties", each=TRIMMED, inputs=TRIM),
    "dare_linear": Method("dare_linear", {"lambda": 0.3}, TRIMMED, random=True),
    "dare_ties": Method("dare_ties", {"lambda": 0.3}, TRIMMED, random=True),
    "della": Method("della", each=TRIMMED, random=True),
    "della_linear": Method("della_linear", {"lambda": 0.3}, TRIMMED, random=True),
    "breadcrumbs": Method("breadcrumbs", {"lambda": 0.3}, {**TRIMMED, "gamma": 0.01}),
    "breadcrumbs_ties": Method("breadcrumbs_ties", {"lambda": 0.3}, {**TRIMMED, "gamma": 0.01}),
    "sce": Method("sce", {"select_topk": DENSITY}),
    "model_stock": Method("model_stock"),
    "karcher": Method("karcher", base=False),
    "multislerp": Method("multislerp", each=WEIGHT),
    "nuslerp": Method("nuslerp", each=WEIGHT, at_most=2),
    "slerp": Method("slerp", {"t": 0.4}, at_most=1),
}


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of a merge lie: model folders or task vectors, and the base."""

    base: Path
    sources: Sequence[Path]


def plan(method: Method, inputs: Inputs, dtype: str) -> str:
    """The YAML of a merge of these inputs: computed in float32, written as `dtype`."""
    models: list[dict[str, Any]] = []
    for source in inputs.sources:
        models.append({"model": str(source)})
        if method.each:
            models[-1]["parameters"] = dict(method.each)
    body: dict[str, Any] = {"merge_method": method.word, "models": models, "dtype": "float32"}
    if method.base:
        body["base_model"] = str(inputs.base)
    shared = dict(method.shared)
    if method.inputs == TRIM and inputs.sources[0].is_file():  # task vectors: ours
        shared["thresholds"] = "shipped"
    if shared:
        body["parameters"] = shared
    if dtype != "float32":
        body["out_dtype"] = dtype
    return yaml.safe_dump(body, sort_keys=False)
