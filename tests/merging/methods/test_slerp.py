"""slerp: mergekit's vectors, the formula in float64, ends, and awkward pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from tests.merging.oracles import cases, check, ours
from tests.merging.problems import Problem, close_by_tensor, problems, run
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)


def slerp(a: Floats64, b: Floats64, t: float) -> Floats64:
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    cosine = np.vdot(a, b) / (lengths[0] or 1) / (lengths[1] or 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    merged: Floats64 = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return merged


@pytest.mark.parametrize("case", cases("slerp"), ids=lambda case: case["name"])
def test_slerp_is_mergekits(case: dict[str, Any]) -> None:
    check(case, ours(case))


@quick
@given(problems(most=1), st.floats(-0.5, 1.5))
def test_slerp_is_the_formula(problem: Problem, t: float) -> None:
    found = run("slerp", problem, {"t": t})
    close_by_tensor(found, problem, lambda base, taus: slerp(base, base + taus[0], t))


@quick
@given(problems(most=1))
def test_the_ends_are_the_base_and_the_model_exactly(problem: Problem) -> None:
    for t in (0, 1):
        found = merged("slerp", problem.base, problem.taus, {"t": t})
        for name, tau in problem.taus[0].items():
            expected = (problem.base[name].astype(np.float64) + t * tau).astype(np.float32)
            np.testing.assert_array_equal(found[name], expected)


def test_a_quarter_turn_and_a_half_turn() -> None:
    base = {"w": np.array([1, 0], np.float32)}
    right = merged("slerp", base, [{"w": [-1, 1]}])["w"]
    np.testing.assert_allclose(right, np.sqrt([0.5, 0.5]), rtol=1e-7)
    opposite = merged("slerp", base, [{"w": [-2, 0]}], {"t": 0.25})["w"]
    np.testing.assert_allclose(opposite, [0.5, 0], rtol=1e-7)


def test_slerp_takes_one_model_without_weight() -> None:
    base = {"w": np.ones(2, np.float32)}
    with pytest.raises(ConfigError) as two:
        merged("slerp", base, [{"w": [1, 2]}, {"w": [2, 1]}])
    assert two.value.code == "merge.input_count"
    with pytest.raises(ConfigError) as weighted:
        merged("slerp", base, [{"w": [1, 2]}], each=[{"weight": 0.5}])
    assert weighted.value.code == "merge.bad_parameter"
