"""Gradients, filters and precedence, against the values that mergekit gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coldmerge.core.errors import ConfigError
from coldmerge.merging.plan import load
from coldmerge.merging.plan.parameters import layer, settings
from tests.merging.models import write_plan

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "settings.json").read_text())
ENDS = {0.0: 3, 1 / 3: 7, 0.5: 5, 1.0: 3}
"""Layers of a model whose layer 2 is at this place (0: of a slice that begins there)."""


def plan_of(path: Path, body: dict[str, Any]) -> Any:
    return load(write_plan(path, yaml.safe_dump(body)))


@pytest.mark.parametrize("entry", [e for e in ORACLE if e["setting"] != []])
def test_gradients_and_filters_have_the_values_of_mergekit(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    word = "normalize" if entry["kind"] == "bool" else "weight"
    default = {"normalize": True, "weight": 1.0}[word]
    for at, expected in zip(entry["at"], entry["values"], strict=True):
        count = ENDS[at]
        ranges = [[0, 2], [2, 5]] if at == 0 else [[0, count]]
        body = {
            "merge_method": "ties",
            "base_model": "base",
            "slices": [{"sources": [{"model": "a", "layer_range": r}]} for r in ranges],
            "parameters": {word: entry["setting"]},
        }
        if entry["tensor"].startswith("model.embed") and at > 0:
            continue  # outside the layers everything is at 0
        names = [entry["tensor"], f"model.layers.{ranges[-1][1] - 1}.mlp.weight"]
        found = settings(plan_of(tmp_path, body), [0], names).setting(entry["tensor"])
        got = found.merger.normalize if word == "normalize" else found.each[0].weight  # type: ignore[attr-defined]
        assert got == (default if expected is None else expected)


def body(**changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        **changes,
    }


LAYERS = [f"model.layers.{i}.mlp.weight" for i in range(4)]


def test_a_models_own_parameter_comes_before_the_slices_and_the_plans(tmp_path: Path) -> None:
    given = {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1}},
                    {"model": "b", "layer_range": [0, 2]},
                ],
                "parameters": {"weight": 2},
            },
            {
                "sources": [
                    {"model": "b", "layer_range": [2, 4]},
                    {"model": "a", "layer_range": [2, 4], "parameters": {"weight": 3}},
                ]
            },
        ],
        "parameters": {"weight": 4, "density": 0.5},
    }
    found = settings(plan_of(tmp_path, given), [0, 1], [*LAYERS, "model.embed.w", "model.norm.w"])
    weights = {n: [each.weight for each in s.each] for n, s in found.table.items()}
    assert weights[LAYERS[0]] == weights["model.embed.w"] == [1, 2]
    assert weights[LAYERS[3]] == weights["model.norm.w"] == [3, 4]
    assert {each.density for s in found.table.values() for each in s.each} == {0.5}  # type: ignore[attr-defined]


def test_a_filter_that_fits_nothing_leaves_the_next_scope_its_say(tmp_path: Path) -> None:
    given = body(parameters={"weight": 0.25})
    given["models"][0]["parameters"] = {"weight": [{"filter": "attn", "value": 9}]}
    found = settings(plan_of(tmp_path, given), [0, 1], LAYERS).setting(LAYERS[1])
    assert [each.weight for each in found.each] == [0.25, 0.25]


def test_a_base_that_is_an_input_and_not_listed_has_the_plans_parameters(tmp_path: Path) -> None:
    given = body(merge_method="linear", parameters={"weight": 0.25})
    given["models"][0]["parameters"] = {"weight": 2}
    found = settings(plan_of(tmp_path, given), [0, 1, None], LAYERS).setting(LAYERS[0])
    assert [each.weight for each in found.each] == [2, 0.25, 0.25]


def test_equal_settings_are_one_object(tmp_path: Path) -> None:
    found = settings(plan_of(tmp_path, body()), [0, 1], LAYERS)
    assert len({id(setting.merger) for setting in found.table.values()}) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("transformer.h.3.ln_1.weight", 3),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", 2),
        ("bert.encoder.layer.5.output.dense.bias", 5),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", 1),
        ("lm_head.weight", None),
        ("classifier.0.weight", None),
    ],
)
def test_layers_are_known_by_name(name: str, expected: int | None) -> None:
    assert layer(name) == expected


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"parameters": {"densty": 0.5}}, "plan.unknown_key", "densty"),
    ({"parameters": {"density": 1.5}}, "plan.bad_value", "1.5"),
    ({"parameters": {"density": [0.5, 0]}}, "plan.bad_value", "0"),
    ({"parameters": {"density": "half"}}, "plan.bad_value", "half"),
    ({"parameters": {"density": True}}, "plan.bad_value", "True"),
    ({"parameters": {"density": float("nan")}}, "plan.bad_value", "nan"),
    ({"parameters": {"density": [{"filter": "a", "value": 7}]}}, "plan.bad_value", "7"),
    ({"parameters": {"density": [{"filter": "a"}]}}, "plan.bad_gradient", "not a value"),
    ({"parameters": {"density": [{"pattern": "a", "value": 1}]}}, "plan.unknown_key", "pattern"),
    ({"parameters": {"density": [[0.5]]}}, "plan.bad_gradient", "not a value"),
    ({"parameters": {"density": []}}, "plan.bad_gradient", "not a value"),
    ({"parameters": {"density": None}}, "plan.bad_gradient", "not a value"),
    ({"parameters": {"density": [0.5, {"value": 1}]}}, "plan.bad_gradient", "not a value"),
    (
        {"models": [{"model": "a", "parameters": {"normalize": False}}]},
        "plan.parameter_place",
        "normalize",
    ),
    ({"merge_method": "linear", "parameters": {"density": 0.5}}, "plan.unknown_key", "density"),
]


@pytest.mark.parametrize(("changes", "code", "named"), BROKEN)
def test_a_broken_parameter_is_refused_with_its_line(
    tmp_path: Path, changes: dict[str, Any], code: str, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(plan_of(tmp_path, body(**changes)), [0, 1], LAYERS)
    assert caught.value.code == code
    assert named in caught.value.message
    assert "plan.yaml, line " in caught.value.message


@pytest.mark.parametrize("last", [3, 5])
def test_slices_cover_the_layers(tmp_path: Path, last: int) -> None:
    given = {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, last]}]}],
    }
    with pytest.raises(ConfigError) as caught:
        settings(plan_of(tmp_path, given), [0], LAYERS)
    assert caught.value.code == "plan.layers_not_covered"
    assert "layer_range: [0, 4]" in caught.value.hint


def test_a_list_of_texts_is_a_value_and_no_gradient(tmp_path: Path) -> None:
    given = body(merge_method="iso_c", parameters={"mean_for": ["*head*", "*norm*"]})
    found = settings(plan_of(tmp_path, given), [0, 1], LAYERS).setting(LAYERS[0])
    assert tuple(found.merger.mean_for) == ("*head*", "*norm*")  # type: ignore[attr-defined]
