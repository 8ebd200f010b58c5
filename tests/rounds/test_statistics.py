"""Which statistics a recipe asks for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from coldmerge.core.errors import ConfigError
from coldmerge.rounds.policy import MergePolicy, RoundPolicy, parse_template
from coldmerge.rounds.statistics import statistics_for, trim_density

SHIPPED = {"thresholds": "shipped", "density": 0.2}


@pytest.mark.parametrize(
    ("method", "parameters", "asked"),
    [
        ("mean", {}, set()),
        ("fisher", {}, {"fisher"}),
        ("regmean", {"scale": 0.9}, {"gram"}),
        ("mats", {}, {"gram"}),
        ("mats", {"statistic": "gram"}, {"gram"}),
        ("mats", {"statistic": "fisher"}, {"fisher"}),
        ("ties", {"density": 0.2}, set()),
        ("ties", SHIPPED, {"trim"}),
        ("dare_ties", SHIPPED, set()),
    ],
)
def test_what_a_recipe_asks_for(method: str, parameters: dict[str, Any], asked: set[str]) -> None:
    merge = MergePolicy(method=method, parameters=parameters)
    assert statistics_for(merge) == asked
    assert trim_density(merge) == (0.2 if asked == {"trim"} else None)


@pytest.mark.parametrize(
    ("method", "parameters", "text"),
    [
        ("ties", {"thresholds": "shipped"}, "needs a `density`"),
        ("ties", {**SHIPPED, "density": 0}, "above 0"),
        ("ties", {**SHIPPED, "density": 1.01}, "at most 1"),
        ("ties", {**SHIPPED, "density": True}, "needs a `density`"),
        ("ties", {**SHIPPED, "density": "0.2"}, "needs a `density`"),
        ("mats", {"statistic": "kfac"}, "gram or fisher"),
    ],
)
def test_a_policy_that_cannot_be_asked_is_refused_when_it_is_read(
    method: str, parameters: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        parse_template({"merge": {"method": method, "parameters": parameters}}, "round.yaml")
    assert caught.value.code == "policy.invalid"


def test_parameters_keep_their_types_and_survive_json() -> None:
    values: dict[str, Any] = {"density": 0.2, "steps": 3, "normalize": True, "thresholds": "exact"}
    policy = RoundPolicy(merge=MergePolicy(method="ties", parameters=values))
    again = RoundPolicy.model_validate(policy.to_json())
    assert again == policy
    assert {key: type(value) for key, value in again.merge.parameters.items()} == {
        "density": float,
        "steps": int,
        "normalize": bool,
        "thresholds": str,
    }


def test_a_policy_from_before_there_were_parameters_is_read() -> None:
    old = {"merge": {"method": "mean", "weights": "uniform"}}
    assert RoundPolicy.model_validate(old).merge.parameters == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1], {"a": 1}, None])
def test_parameters_are_plain_finite_values(value: object) -> None:
    with pytest.raises(ValidationError):
        MergePolicy.model_validate({"method": "ties", "parameters": {"density": value}})
