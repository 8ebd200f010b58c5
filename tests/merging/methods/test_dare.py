"""DARE against mergekit where nothing is dropped, and by its statistics where chance decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from coldmerge.merging.random import below, bits
from tests.merging.oracles import cases, check, ours
from tests.merging.sparse import Problem, problem, problems, quick
from tests.merging.sparse import check as check_steps

METHODS = ("dare_linear", "dare_ties")


@pytest.mark.parametrize("case", cases(*METHODS), ids=lambda case: case["name"])
def test_it_is_that_of_mergekit_where_nothing_is_dropped(case: dict[str, Any]) -> None:
    check(case, ours(case))


def drawn(of: Problem, seed: int) -> list[Any]:
    """The masks that these random numbers mean, by their definition."""
    return [
        np.full(tau.shape, True)
        if density == 1
        else (bits(seed, "w", f"{i:03}", 0, tau.size) / 2.0**32 < density).reshape(tau.shape)
        for i, (tau, density) in enumerate(zip(of.taus, of.densities, strict=True))
    ]


@quick
@given(problems, st.sampled_from(METHODS), st.booleans(), st.booleans(), st.integers(0, 2**40))
def test_it_is_its_steps_in_float64(
    of: Problem, method: str, rescale: bool, normalize: bool, seed: int
) -> None:
    if method == "dare_linear" and abs(sum(of.weights)) < 1e-3:
        normalize = False
    parameters = {"rescale": rescale, "seed": seed}
    found = of.run(method, {**parameters, "normalize": normalize})
    elects = method == "dare_ties"
    kept = drawn(of, seed)
    if normalize and not elects:
        of = Problem(of.base, of.taus, [w / sum(of.weights) for w in of.weights], of.densities)
    check_steps(found, of, kept, elects=elects, normalize=normalize and elects, rescale=rescale)


@quick
@given(problems, st.sampled_from(METHODS), st.integers(1, 9), st.booleans())
def test_what_is_dropped_depends_on_no_block_and_no_thread(
    of: Problem, method: str, block: int, rescale: bool
) -> None:
    parameters = {"rescale": rescale, "seed": 3}
    once = of.run(method, parameters)
    again = of.run(method, parameters, block=block)
    np.testing.assert_allclose(once, again, rtol=1e-6, atol=1e-6 * rescale)
    two = of.run(method, parameters, block=block, threads=2)
    np.testing.assert_array_equal(again, two)


def test_by_density_the_expectation_stays_as_the_paper_has_it() -> None:
    tau = np.ones((400, 500), np.float32)
    of = Problem(np.zeros_like(tau), [tau], [1.0], [0.1])
    found = of.run("dare_linear", {"rescale_by": "density"})
    assert set(np.unique(found)) == {np.float32(0), np.float32(10)}
    assert abs(found.mean() - 1) < 5 * 3 / np.sqrt(tau.size)


def test_by_norm_the_norm_stays_exactly() -> None:
    of = problem((300, 200), "normal", 1, 4)
    of = Problem(np.zeros_like(of.base), of.taus, [1.0], [0.3])
    found = of.run("dare_linear", threads=2)
    assert np.abs(found).sum() == pytest.approx(np.abs(of.taus[0]).sum(), rel=1e-6)
    assert 0.29 < np.mean(found != 0) < 0.31


def test_iterated_rounds_decay() -> None:
    """Dropping what earlier rounds left: why the documentation warns of it."""
    of = problem((50, 40), "normal", 1, 5)
    left: Floats32 = of.taus[0]
    for number in range(6):
        one = Problem(np.zeros_like(left), [left], [1.0], [0.5])
        left = one.run("dare_linear", {"seed": number})
    assert np.mean(left != 0) < 0.05


def test_seeds_inputs_and_tensors_draw_apart() -> None:
    draws = [
        bits(*who, 0, 4096) for who in [(0, "w", "a"), (1, "w", "a"), (0, "v", "a"), (0, "w", "b")]
    ]
    for i, one in enumerate(draws):
        assert abs(np.mean(one < below(0.5)) - 0.5) < 5 * 0.5 / np.sqrt(4096)
        for other in draws[:i]:
            assert np.mean(one == other) < 0.01


@quick
@given(st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 100))
def test_random_numbers_are_drawn_by_place(start: int, skip: int, count: int) -> None:
    whole = bits(7, "w", "key", start, start + skip + count)
    part = bits(7, "w", "key", start + skip, start + skip + count)
    np.testing.assert_array_equal(whole[skip:], part)


def test_random_numbers_are_the_same_on_every_machine() -> None:
    assert bits(0, "w", "a", 6, 9).tolist() == [2481572078, 1240703464, 1341260808]
    assert below([0.0, 0.5, 1.0]).tolist() == [0, 2**31, 2**32 - 1]
