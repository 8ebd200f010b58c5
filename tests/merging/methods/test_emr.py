"""EMR-Merging's elected vector against the authors' steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from tests.merging.sources import merged
from tests.merging.sparse import Problem, problem, problems, quick


def run(of: Problem, **how: Any) -> Floats32:
    taus = [{"w": tau} for tau in of.taus]
    each = [{"weight": abs(weight)} for weight in of.weights]
    return merged("emr", {"w": of.base}, taus, None, each, **how)["w"]


@quick
@given(problems)
def test_it_is_the_largest_entry_of_the_elected_sign(of: Problem) -> None:
    stack = np.array(of.taus, np.float64)
    weights = np.abs(of.weights).reshape(-1, *(1 for _ in of.base.shape))
    total = (weights * stack).sum(axis=0)
    sign = np.where(total > 0, 1, -1)
    elected = sign * np.max(np.abs(stack) * (stack * sign > 0), axis=0)
    open_ = (np.abs(total) < 1e-5 * np.abs(weights * stack).sum(axis=0)) & (total != 0)
    expected = np.add(of.base, elected).astype(np.float32)
    np.testing.assert_array_equal(run(of)[~open_], expected[~open_])


@quick
@given(problems, st.integers(1, 9))
def test_blocks_and_threads_change_no_bit(of: Problem, block: int) -> None:
    np.testing.assert_array_equal(run(of), run(of, block=block, threads=2))


def test_minus_wins_where_both_sides_balance() -> None:
    tau = np.array([0.25, -0.5], np.float32)
    of = Problem(np.zeros(2, np.float32), [tau, -tau], [1.0, 1.0], [])
    np.testing.assert_array_equal(run(of), [-0.25, -0.5])


@quick
@given(st.integers(1, 11), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(count: int, seed: int, rng: Any) -> None:
    of = problem((6, 5), "lattice", count, seed)  # sums of these are exact
    of = Problem(of.base, of.taus, [1.0] * count, [])
    shuffled = Problem(of.base, rng.sample(of.taus, count), of.weights, [])
    np.testing.assert_allclose(run(of), run(shuffled), rtol=1e-5, atol=1e-5)
