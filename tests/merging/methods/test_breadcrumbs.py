"""Breadcrumbs against mergekit, and against its steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ColdmergeError
from tests.merging.oracles import cases, check, ours
from tests.merging.sources import merged
from tests.merging.sparse import Mask, Problem, problem, problems, quick
from tests.merging.sparse import check as check_steps

METHODS = ("breadcrumbs", "breadcrumbs_ties")


def middling(tau: Floats32, density: float, gamma: float) -> Mask:
    """mergekit's places in ascending order; entries as large as an outermost one stay too."""
    if density == 1:
        return np.ones(tau.shape, bool)
    size, target = tau.size, int(density * tau.size)
    bottom = max(0, size - target - int(gamma * size))
    places = np.sort(np.abs(tau), axis=None)[bottom : bottom + target]
    if not target:
        return np.zeros(tau.shape, bool)
    mask: Mask = (np.abs(tau) >= places[0]) & (np.abs(tau) <= places[-1])
    return mask


def run(of: Problem, method: str, gammas: list[float], parameters: Any, **how: Any) -> Floats32:
    each = [
        {"weight": weight, "density": density, "gamma": gamma}
        for weight, density, gamma in zip(of.weights, of.densities, gammas, strict=True)
    ]
    taus = [{"w": tau} for tau in of.taus]
    return merged(method, {"w": of.base}, taus, parameters, each, **how)["w"]


@pytest.mark.parametrize("case", cases(*METHODS), ids=lambda case: case["name"])
def test_it_is_that_of_mergekit(case: dict[str, Any]) -> None:
    check(case, ours(case))


@quick
@given(problems, st.sampled_from(METHODS), st.booleans(), st.integers(0, 999))
def test_it_is_its_steps_in_float64(of: Problem, method: str, rescale: bool, seed: int) -> None:
    gammas = list(np.random.default_rng(seed).choice([0.01, 0.0, 0.1, 0.4], len(of.taus)))
    found = run(of, method, gammas, {"rescale": rescale})
    kept = [middling(*one) for one in zip(of.taus, of.densities, gammas, strict=True)]
    check_steps(found, of, kept, elects=method == "breadcrumbs_ties", rescale=rescale)


@quick
@given(problems, st.sampled_from(METHODS), st.integers(1, 9))
def test_blocks_and_threads_change_no_bit(of: Problem, method: str, block: int) -> None:
    gammas = [0.1] * len(of.taus)
    again = run(of, method, gammas, {}, block=block, threads=2)
    np.testing.assert_array_equal(run(of, method, gammas, {}), again)


def test_both_ends_of_a_large_tensor_are_found_in_one_pass() -> None:
    for kind in ("normal", "lattice", "bf16"):
        of = problem((700, 401), kind, 2, 5)
        of = Problem(of.base, of.taus, [1.0, 0.5], [0.15, 0.9])
        found = run(of, "breadcrumbs", [0.006, 0.3], {}, threads=2)
        kept = [middling(of.taus[0], 0.15, 0.006), middling(of.taus[1], 0.9, 0.3)]
        check_steps(found, of, kept, elects=False)


def test_a_gamma_out_of_range_is_refused() -> None:
    with pytest.raises(ColdmergeError) as caught:
        run(problem((1,), "normal", 1, 0), "breadcrumbs", [1.0], {})
    assert caught.value.code == "merge.bad_parameter"
