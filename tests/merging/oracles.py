"""mergekit's results, as tests/oracles/README.md describes them, against ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

from coldmerge.core.dtypes import Floats32
from coldmerge.merging import merger_class
from coldmerge.merging.merger import BaseRole
from tests.merging.sources import ArrayDelta, merged

FOLDER = Path(__file__).parents[1] / "oracles"
TOLERANCE = 2e-6
"""Of a tensor's largest element: what float32 costs mergekit."""

BF16 = 2.0**-8
"""What rounding to bf16 costs an element, at most."""


class ArrayModel(ArrayDelta):
    """A fine-tune: its own weights, and its deltas against a base."""

    def __init__(self, base: Mapping[str, Floats32], thetas: Mapping[str, Floats32]) -> None:
        super().__init__({name: theta - base[name] for name, theta in thetas.items()})
        self._thetas = dict(thetas)

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        return self._thetas[name].reshape(-1)[start:stop].copy()


def cases(*methods: str) -> list[dict[str, Any]]:
    """The cases of these methods."""
    found = json.loads((FOLDER / "cases.json").read_text())
    return [case for case in found if case["method"] in methods]


@cache
def tensors(path: str) -> dict[str, Floats32]:
    """The tensors of a file below tests/oracles, as float32."""
    return {name: x.float().numpy() for name, x in load_file(FOLDER / path).items()}


def ours(case: Mapping[str, Any], **how: Any) -> dict[str, Floats32]:
    """Our merge of a case. Where mergekit had no base, any must do: it gets one."""
    method = merger_class(case["method"])
    base = tensors(case["base"] or case["inputs"][0].replace("tuned-1", "base"))
    models = [tensors(path) for path in case["inputs"]]
    each, parameters = list(case["per_model"]), dict(case["parameters"])
    if case["base"] and method.base_role is BaseRole.INPUT:
        models, each = [*models, base], [*each, each[0]]
    if not case["base"] and method.base_role is BaseRole.OPTIONAL:
        parameters["origin"] = "zero"
    taus = [ArrayModel(base, theta) for theta in models]
    return merged(case["method"], base, taus, parameters, each, **how)


def check(case: Mapping[str, Any], found: Mapping[str, Floats32]) -> None:
    """Compare with mergekit's tensors, but for the places that a method leaves open."""
    expected = tensors(case["expected"])
    assert set(expected) <= set(found)
    for name, values in expected.items():
        keep = np.ones(values.size, bool)
        keep[case["open"].get(name, [])] = False
        room = TOLERANCE * np.abs(values).max() + (
            BF16 * np.abs(values) if case["out_dtype"] == "bfloat16" else np.zeros_like(values)
        )
        gap: npt.NDArray[np.float32] = np.abs(found[name] - values)
        wrong = (gap > room).reshape(-1) & keep
        assert not wrong.any(), (name, float(gap.reshape(-1)[keep].max()), np.flatnonzero(wrong))
