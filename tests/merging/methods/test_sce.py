"""SCE against mergekit, and against its steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.core.errors import ColdmergeError
from tests.merging.oracles import cases, check, ours
from tests.merging.sources import merged
from tests.merging.sparse import Problem, problem, problems, quick

tops = st.sampled_from([1.0, 0.5, 0.1, 0.01, 0.0])


@pytest.mark.parametrize("case", cases("sce"), ids=lambda case: case["name"])
def test_it_is_that_of_mergekit(case: dict[str, Any]) -> None:
    if case["open"]:  # where variances tie we select more: other energies
        case = {**case, "open": dict.fromkeys(case["open"], slice(None))}
    check(case, ours(case))


def run(of: Problem, top: float, **how: Any) -> Floats32:
    taus = [{"w": tau} for tau in of.taus]
    return merged("sce", {"w": of.base}, taus, {"select_topk": top}, **how)["w"]


def reference(taus: list[Floats32], top: float) -> tuple[Floats64, npt.NDArray[np.bool_]]:
    """The delta, and where rounding decides; raises ZeroDivisionError where it decides all."""
    stack = np.array(taus, np.float64)
    variance = stack.var(axis=0)
    variance[(stack == stack[0]).all(axis=0)] = 0
    if top < 1:
        count = int(np.count_nonzero(variance) * top)
        least = np.sort(variance, axis=None)[-count] if count else np.inf
        if (np.abs(variance / least - 1) < 1e-5).sum() > (variance == least).sum():
            raise ZeroDivisionError
        stack *= variance >= least
    energy = np.square(stack).reshape(len(stack), -1).mean(axis=1)
    share = np.full(len(stack), 1 / len(stack)) if energy.sum() < 1e-6 else energy / energy.sum()
    total = stack.sum(axis=0)
    votes = np.sign(stack) == np.where(total >= 0, 1, -1)
    weights = share.reshape(-1, *(1 for _ in total.shape)) * votes
    merged_ = (stack * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-6)
    return merged_, (np.abs(total) < 1e-5 * np.abs(stack).sum(axis=0)) & (total != 0)


def close(found: Floats32, of: Problem, top: float) -> None:
    try:
        expected, open_ = reference(of.taus, top)
    except ZeroDivisionError:
        return
    gap = np.abs(found - of.base - expected)[~open_]
    assert gap.max(initial=0) < 2e-6 * max(1, float(np.abs(found).max()))


@quick
@given(problems, tops)
def test_it_is_its_steps_in_float64(of: Problem, top: float) -> None:
    close(run(of, top), of, top)


@quick
@given(problems, tops, st.integers(1, 9))
def test_blocks_and_threads_do_not_matter(of: Problem, top: float, block: int) -> None:
    again = run(of, top, block=block)
    np.testing.assert_allclose(run(of, top), again, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(again, run(of, top, block=block, threads=2))


def test_a_large_tensor_is_selected_in_one_pass_as_a_small_one_is() -> None:
    for kind in ("normal", "zeros", "lattice"):
        of = problem((700, 401), kind, 3, 2)
        close(run(of, 0.1, threads=2), of, 0.1)


def test_a_large_tensor_without_variance_selects_nothing() -> None:
    of = problem((700, 401), "same", 2, 2)
    np.testing.assert_array_equal(run(of, 0.5), of.base)


def test_updates_too_small_to_have_an_energy_count_the_same() -> None:
    taus = [np.full(4, 1e-4, np.float32), np.full(4, 3e-4, np.float32)]
    found = run(Problem(np.zeros(4, np.float32), taus, [], []), 1.0)
    np.testing.assert_allclose(found, 2e-4, rtol=1e-6)


def test_weights_are_refused() -> None:
    with pytest.raises(ColdmergeError) as caught:
        merged("sce", {"w": np.zeros(1)}, [{"w": np.ones(1)}], {}, [{"weight": 2.0}])
    assert caught.value.code == "merge.bad_parameter"


def test_agreeing_weights_below_a_millionth_count_as_a_millionth() -> None:
    for large, expected in ((707.0, 1.0), (1e6, 1e-6)):
        taus = [np.array([large, 0], np.float32), np.array([0, 1], np.float32)]
        found = run(Problem(np.zeros(2, np.float32), taus, [], []), 1.0)
        assert found[1] == pytest.approx(expected, rel=1e-4)


@quick
@given(st.integers(1, 11), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(count: int, seed: int, rng: Any) -> None:
    of = problem((6, 5), "lattice", count, seed)  # sums of these are exact
    of = Problem(of.base, of.taus, [1.0] * count, [])
    shuffled = Problem(of.base, rng.sample(of.taus, count), of.weights, [])
    np.testing.assert_allclose(run(of, 0.5), run(shuffled, 0.5), rtol=1e-5, atol=1e-5)
