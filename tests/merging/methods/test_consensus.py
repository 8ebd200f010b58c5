"""Consensus merging against the authors' steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from tests.merging.sources import merged
from tests.merging.sparse import Problem, problem, problems, quick


def run(of: Problem, parameters: Any, **how: Any) -> Floats32:
    taus = [{"w": tau} for tau in of.taus]
    each = [{"weight": weight} for weight in of.weights]
    return merged("consensus", {"w": of.base}, taus, parameters, each, **how)["w"]


@quick
@given(problems, st.sampled_from([0.2, 0.4, 1.0]), st.integers(1, 4))
def test_it_is_the_sum_where_enough_masks_agree(of: Problem, mask_lambda: float, k: int) -> None:
    stack = np.array(of.taus, np.float64)
    stack *= np.array(of.weights).reshape(-1, *(1 for _ in of.base.shape))
    total = stack.sum(axis=0)
    apart = np.abs(total - stack) * mask_lambda
    count = (np.abs(stack) > apart).sum(axis=0)
    expected = of.base + 0.3 * total * (count >= min(k, len(stack)))
    open_ = (np.abs(np.abs(stack) - apart) <= 1e-5 * np.abs(stack).sum(axis=0)).any(axis=0)
    open_ &= (stack != 0).any(axis=0)
    found = run(of, {"mask_lambda": mask_lambda, "least_masks": k})
    np.testing.assert_allclose(found[~open_], expected[~open_], rtol=2e-6, atol=2e-6)


@quick
@given(problems, st.integers(1, 9))
def test_blocks_and_threads_change_no_bit(of: Problem, block: int) -> None:
    np.testing.assert_array_equal(run(of, {}), run(of, {}, block=block, threads=2))


def test_what_one_input_alone_wants_stays_as_in_the_base() -> None:
    taus = [np.array(tau, np.float32) for tau in ([1, 1, 0], [1, 0, 0], [1, 0, 0])]
    of = Problem(np.zeros(3, np.float32), taus, [1.0] * 3, [])
    np.testing.assert_array_equal(run(of, {"lambda": 1.0}), [3, 0, 0])
    np.testing.assert_array_equal(run(of, {"lambda": 1.0, "least_masks": 1}), [3, 1, 0])


@quick
@given(st.integers(1, 11), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(count: int, seed: int, rng: Any) -> None:
    of = problem((6, 5), "lattice", count, seed)  # sums of these are exact
    of = Problem(of.base, of.taus, [1.0] * count, [])
    shuffled = Problem(of.base, rng.sample(of.taus, count), of.weights, [])
    np.testing.assert_allclose(run(of, {}), run(shuffled, {}), rtol=1e-5, atol=1e-5)
