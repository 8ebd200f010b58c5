"""What people read about merge methods: every parameter that can be chosen is told."""

from __future__ import annotations

import pytest

from coldmerge.merging.plan.describe import describe, method_class, methods
from coldmerge.merging.recipe import fields


@pytest.mark.parametrize("name", [method.name for method in methods()])
def test_every_parameter_of_the_merge_is_told(name: str) -> None:
    method = method_class(name)
    told = {parameter.word for parameter in describe(method).parameters if not parameter.per_input}
    assert told == set(fields(method))


def test_a_parameter_with_a_lower_bound_alone_is_told_with_its_range() -> None:
    (steps,) = (p for p in describe(method_class("krum")).parameters if p.word == "keep")
    assert (steps.range, steps.default, steps.kind) == ("[1, ∞)", 1, "whole number")


def test_a_weight_that_can_only_be_one_is_not_told() -> None:
    assert [p.word for p in describe(method_class("slerp")).parameters] == ["t"]
