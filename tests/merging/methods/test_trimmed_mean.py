"""trimmed_mean: by a sort in float64, and attackers up to what is trimmed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from coldmerge.merging.methods.trimmed_mean import TrimmedMean
from tests.merging.problems import (
    Problem,
    astray,
    close,
    close_by_tensor,
    problems,
    reversed_order,
    run,
)
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)


def trimmed_mean(taus: Floats64, left_out: int) -> Floats64:
    kept: Floats64 = np.sort(taus, axis=0)[left_out : len(taus) - left_out]
    mean: Floats64 = kept.mean(axis=0)
    return mean


@quick
@given(problems(most=9), st.integers(0, 49))
def test_the_mean_of_the_middle(problem: Problem, percent: int) -> None:
    count = len(problem.taus)
    left_out = min(math.ceil(percent * count / 100), (count - 1) // 2)
    found = run("trimmed_mean", problem, {"trim": percent / 100})
    close_by_tensor(found, problem, lambda base, taus: base + trimmed_mean(taus, left_out))


@quick
@given(problems(most=9))
def test_the_order_of_the_inputs_is_nothing_to_the_last_bit(problem: Problem) -> None:
    turned = reversed_order(problem)
    found = merged("trimmed_mean", problem.base, problem.taus, {"trim": 0.3})
    other = merged("trimmed_mean", turned.base, turned.taus, {"trim": 0.3})
    for name, values in found.items():
        assert values.tobytes() == other[name].tobytes()


def test_nothing_trimmed_is_the_mean_and_all_but_the_middle_the_median() -> None:
    rng = np.random.default_rng(8)
    base, taus = {"w": np.zeros(50)}, [{"w": rng.normal(0, 1, 50)} for _ in range(7)]
    close(merged("trimmed_mean", base, taus, {"trim": 0})["w"], merged("mean", base, taus)["w"])
    most = merged("trimmed_mean", base, taus, {"trim": 0.49})["w"]
    np.testing.assert_array_equal(most, merged("median", base, taus)["w"])


@pytest.mark.parametrize(
    ("trim", "count", "left_out"),
    [
        (0.2, 1, 0),
        (0.2, 2, 0),
        (0.2, 3, 1),
        (0.2, 5, 1),
        (0.2, 6, 2),
        (0.1, 30, 3),
        (0.07, 100, 7),
        (0, 9, 0),
    ],
)
def test_shares_are_rounded_up_while_any_input_remains(
    trim: float, count: int, left_out: int
) -> None:
    assert TrimmedMean(trim=trim).trimmed(count) == left_out


def test_an_attacker_leads_the_mean_astray_but_not_the_trimmed_one() -> None:
    assert astray("mean") > 10
    assert astray("trimmed_mean") < 0.4


@pytest.mark.parametrize("trim", [-0.1, 0.5])
def test_a_share_out_of_range_is_refused(trim: float) -> None:
    with pytest.raises(ConfigError) as refused:
        merged("trimmed_mean", {"w": np.zeros(2)}, [{"w": [1, 2]}], {"trim": trim})
    assert refused.value.code == "merge.bad_parameter"
