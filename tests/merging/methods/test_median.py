"""median: numpy's, for every number of inputs, and an attacker."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

from coldmerge.core.errors import ConfigError
from coldmerge.merging.methods.median import comparators, middle_mean
from tests.merging.problems import (
    Problem,
    astray,
    close_by_tensor,
    problems,
    reversed_order,
    run,
)
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)


@quick
@given(problems(most=9))
def test_the_median_is_numpys(problem: Problem) -> None:
    found = run("median", problem)
    close_by_tensor(found, problem, lambda base, taus: base + np.median(taus, axis=0))


@quick
@given(problems(most=9))
def test_the_order_of_the_inputs_is_nothing_to_the_last_bit(problem: Problem) -> None:
    turned = reversed_order(problem)
    found = merged("median", problem.base, problem.taus)
    other = merged("median", turned.base, turned.taus)
    for name, values in found.items():
        assert values.tobytes() == other[name].tobytes()


@pytest.mark.parametrize("count", range(1, 12))
def test_the_network_finds_the_middle_of_all_rows_of_zeros_and_ones(count: int) -> None:
    """What orders zeros and ones orders anything (Knuth, volume 3, theorem 5.3.4Z)."""
    columns = np.array(list(product([0, 1], repeat=count)), np.float32).T.copy()
    for trimmed in range((count + 1) // 2):
        found = middle_mean(columns.copy(), trimmed)
        ordered = np.sort(columns.astype(np.float64), axis=0)
        expected = ordered[trimmed : count - trimmed].mean(axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-15)


@pytest.mark.parametrize("count", [13, 16, 17, 33, 64, 100])
def test_many_inputs(count: int) -> None:
    rows = np.random.default_rng(count).normal(0, 1, (count, 500)).astype(np.float32)
    found = middle_mean(rows.copy(), (count - 1) // 2)
    np.testing.assert_array_equal(found, np.median(rows.astype(np.float64), axis=0))


def test_zero_has_no_sign() -> None:
    for column in ([-0.0], [-0.0, -0.0, 1.0], [0.0, -0.0], [-0.0, 0.0]):
        rows = np.array(column, np.float32)[:, None]
        assert not np.signbit(middle_mean(rows, (len(rows) - 1) // 2)).any()


def test_comparisons_that_cannot_reach_the_middle_are_left_out() -> None:
    assert comparators(1, 0) == ()
    assert len(comparators(8, 0)) == 19
    assert len(comparators(8, 3)) < 19


def test_an_attacker_leads_the_mean_astray_but_not_the_median() -> None:
    assert astray("mean") > 10
    assert astray("median") < 0.3


def test_the_median_has_no_weights() -> None:
    with pytest.raises(ConfigError) as refused:
        merged("median", {"w": np.zeros(2)}, [{"w": [1, 2]}], each=[{"weight": 2}])
    assert refused.value.code == "merge.bad_parameter"
