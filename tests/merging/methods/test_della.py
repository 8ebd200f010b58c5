"""DELLA against mergekit where nothing is dropped, and against its steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ColdmergeError
from coldmerge.merging.random import bits
from tests.merging.oracles import cases, check, ours
from tests.merging.sources import merged
from tests.merging.sparse import Mask, Problem, problem, problems, quick
from tests.merging.sparse import check as check_steps

METHODS = ("della", "della_linear")


@pytest.mark.parametrize("case", cases(*METHODS), ids=lambda case: case["name"])
def test_it_is_that_of_mergekit_where_nothing_is_dropped(case: dict[str, Any]) -> None:
    check(case, ours(case))


def pruned(tau: Floats32, key: str, density: float, epsilon: float, seed: int) -> Mask:
    """mergekit's probabilities, and the draw by place."""
    if density == 1:
        return np.ones(tau.shape, bool)
    rows = tau.reshape(1, -1) if tau.ndim < 2 else tau
    ranks = np.abs(rows).argsort(axis=1, kind="stable").argsort(axis=1)
    share = ranks / (rows.shape[1] - 1) if rows.shape[1] > 1 else np.full(rows.shape, 0.5)
    chance = density - epsilon + share.reshape(tau.shape) * 2 * epsilon
    draw = bits(seed, "w", key, 0, tau.size).reshape(tau.shape) / 2.0**32
    mask: Mask = draw < chance
    return mask


def run(of: Problem, method: str, epsilon: float, parameters: Any, **how: Any) -> Floats32:
    each = [
        {"weight": weight, "density": density, "epsilon": epsilon}
        for weight, density in zip(of.weights, of.densities, strict=True)
    ]
    taus = [{"w": tau} for tau in of.taus]
    return merged(method, {"w": of.base}, taus, parameters, each, **how)["w"]


@quick
@given(problems, st.sampled_from(METHODS), st.booleans(), st.integers(0, 2**40))
def test_it_is_its_steps_in_float64(of: Problem, method: str, rescale: bool, seed: int) -> None:
    found = run(of, method, 0.005, {"rescale": rescale, "seed": seed})
    keys = [f"{i:03}" for i in range(len(of.taus))]
    kept = [
        pruned(tau, key, density, 0.005, seed)
        for tau, key, density in zip(of.taus, keys, of.densities, strict=True)
    ]
    elects = method == "della"
    check_steps(found, of, kept, elects=elects, normalize=elects, rescale=rescale)


@quick
@given(problems, st.sampled_from(METHODS), st.integers(1, 9))
def test_what_is_dropped_depends_on_no_block_and_no_thread(
    of: Problem, method: str, block: int
) -> None:
    once = run(of, method, 0.005, {})
    again = run(of, method, 0.005, {}, block=block)
    np.testing.assert_allclose(once, again, rtol=1e-6, atol=1e-6)
    two = run(of, method, 0.005, {}, block=block, threads=2)
    np.testing.assert_array_equal(again, two)


def test_large_entries_of_a_row_stay_more_often() -> None:
    of = problem((2000, 50), "normal", 1, 1)
    of = Problem(np.zeros_like(of.base), of.taus, [1.0], [0.4])
    found = run(of, "della_linear", 0.3, {"rescale": False})
    order = np.abs(of.taus[0]).argsort(axis=1)
    stayed = np.take_along_axis(found != 0, order, axis=1).mean(axis=0)
    np.testing.assert_allclose(stayed, np.linspace(0.1, 0.7, 50), atol=5 * 0.5 / np.sqrt(2000))


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, 0.5)])
def test_probabilities_beyond_0_and_1_are_refused(density: float, epsilon: float) -> None:
    of = problem((3,), "normal", 1, 1)
    with pytest.raises(ColdmergeError) as caught:
        run(Problem(of.base, of.taus, [1.0], [density]), "della", epsilon, {})
    assert caught.value.code == "merge.bad_parameter"
    assert "epsilon" in str(caught.value)
