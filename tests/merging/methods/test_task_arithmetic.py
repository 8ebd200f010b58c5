"""Task arithmetic against mergekit, and against a sum in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.errors import ColdmergeError
from tests.merging.oracles import cases, check, ours
from tests.merging.sources import merged
from tests.merging.sparse import Problem, problem, problems, quick
from tests.merging.sparse import check as check_steps

ZERO_SUM = "task_arithmetic-zero-sum-f32"
"""mergekit leaves this sum as it is without a word; we refuse it."""


def run(of: Problem, **parameters: Any) -> Any:
    each = [{"weight": weight} for weight in of.weights]
    taus = [{"w": tau} for tau in of.taus]
    return merged("task_arithmetic", {"w": of.base}, taus, parameters, each)["w"]


@pytest.mark.parametrize("case", cases("task_arithmetic"), ids=lambda case: case["name"])
def test_it_is_that_of_mergekit(case: dict[str, Any]) -> None:
    if case["name"] != ZERO_SUM:
        check(case, ours(case))
        return
    with pytest.raises(ColdmergeError) as caught:
        ours(case)
    assert caught.value.code == "merge.weights_sum_to_zero"


@quick
@given(problems, st.sampled_from([1.0, 0.3, -1.0]))
def test_it_is_a_sum_in_float64(of: Problem, scale: float) -> None:
    found = run(of, **{"lambda": scale})
    check_steps(found, of, [np.ones(tau.shape, bool) for tau in of.taus], elects=False, scale=scale)


def test_normalized_it_is_a_weighted_mean() -> None:
    of = problem((6, 5), "normal", 3, 1)
    weights = [0.5, 2.0, -0.4]
    found = run(Problem(of.base, of.taus, weights, []), normalize=True)
    expected = of.base + np.average(np.array(of.taus, np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_a_negative_weight_takes_away_what_was_added() -> None:
    of = problem((5, 5), "lattice", 1, 2)
    there = Problem(of.base, of.taus * 2, [1.0, -1.0], [])
    np.testing.assert_array_equal(run(there), of.base)
