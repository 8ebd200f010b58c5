"""TIES against mergekit, and against its steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from coldmerge.core.errors import ColdmergeError
from tests.merging.oracles import cases, check, ours
from tests.merging.sources import ArrayDelta, job, merged
from tests.merging.sparse import Mask, Problem, problem, problems, quick
from tests.merging.sparse import check as check_steps


def trimmed(tau: Floats32, density: float) -> Mask:
    keep = max(1, int(density * tau.size))
    mask: Mask = np.abs(tau) >= np.sort(np.abs(tau), axis=None)[tau.size - keep]
    return mask


def kept(of: Problem) -> list[Mask]:
    return [trimmed(tau, d) for tau, d in zip(of.taus, of.densities, strict=True)]


@pytest.mark.parametrize("case", cases("ties"), ids=lambda case: case["name"])
def test_it_is_that_of_mergekit(case: dict[str, Any]) -> None:
    if case["parameters"].get("rescale"):  # where magnitudes tie we keep more: another norm
        case = {**case, "open": dict.fromkeys(case["open"], slice(None))}
    check(case, ours(case))


@quick
@given(problems, st.booleans(), st.booleans(), st.sampled_from([1.0, 0.4, -1.5]))
def test_it_is_its_steps_in_float64(
    of: Problem, normalize: bool, rescale: bool, scale: float
) -> None:
    found = of.run("ties", {"normalize": normalize, "rescale": rescale, "lambda": scale})
    check_steps(found, of, kept(of), elects=True, normalize=normalize, rescale=rescale, scale=scale)


@quick
@given(problems, st.integers(1, 9), st.booleans())
def test_blocks_and_threads_change_no_bit(of: Problem, block: int, normalize: bool) -> None:
    once = of.run("ties", {"normalize": normalize})
    again = of.run("ties", {"normalize": normalize}, block=block, threads=2)
    np.testing.assert_array_equal(once, again)


@quick
@given(st.integers(1, 11), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(count: int, seed: int, rng: Any) -> None:
    of = problem((7, 6), "lattice", count, seed)  # sums of these are exact
    of = Problem(of.base, of.taus, [1.0, 0.5] * 6, of.densities)
    pairs = list(zip(of.taus, of.weights, of.densities, strict=False))
    rng.shuffle(pairs)
    taus, weights, densities = map(list, zip(*pairs, strict=True))
    shuffled = Problem(of.base, taus, weights, densities)
    first = Problem(of.base, of.taus, of.weights[:count], of.densities)
    np.testing.assert_array_equal(first.run("ties"), shuffled.run("ties"))


def test_a_large_tensor_is_trimmed_in_one_pass_as_a_small_one_is() -> None:
    for kind in ("normal", "lattice", "bf16", "zeros"):
        of = problem((700, 401), kind, 3, 5)
        of = Problem(of.base, of.taus, [1.0, 0.5, 2.0], [0.2, 1.0, 0.9])
        found = of.run("ties", threads=2)
        check_steps(found, of, kept(of), elects=True, normalize=True)
        np.testing.assert_array_equal(found, of.run("ties", block=999))


def test_the_whole_task_vector_is_trimmed_as_one() -> None:
    rng = np.random.default_rng(3)
    shapes = {"a": (40, 30), "b": (600, 500), "c": (7,)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    taus = [
        {
            n: rng.standard_normal(s).astype(np.float32) * (1 + 3 * (n == "a"))
            for n, s in shapes.items()
        }
        for _ in range(2)
    ]
    del taus[1]["c"]
    densities = [0.1, 0.3]
    found = merged(
        "ties",
        base,
        taus,
        {"trim_scope": "global", "normalize": False},
        [{"density": density} for density in densities],
        threads=2,
    )
    flat = [np.concatenate([tau.get(n, base[n]).reshape(-1) for n in shapes]) for tau in taus]
    of = Problem(np.zeros_like(flat[0]), flat, [1.0, 1.0], densities)
    check_steps(np.concatenate([found[n].reshape(-1) for n in shapes]), of, kept(of), elects=True)


def test_shipped_thresholds_are_taken_as_they_are() -> None:
    tau = np.array([0.5, -0.25, 0.125, 1.0], np.float32)
    shipped = ArrayDelta({"w": tau}, {"trim": {"w": [0.5]}})
    found = merged("ties", {"w": np.zeros(4)}, [shipped], {"thresholds": "shipped"})
    np.testing.assert_array_equal(found["w"], [0.5, 0, 0, 1])


def test_an_input_that_ships_no_threshold_is_named() -> None:
    tau = {"w": np.ones(3), "v": np.ones(2)}
    partly = ArrayDelta(tau, {"trim": {"w": [1.0]}})
    other = ArrayDelta({"w": np.ones(3)}, {"trim": {"w": [1.0]}})
    base = {"w": np.zeros(3), "v": np.zeros(2)}
    with pytest.raises(ColdmergeError) as caught:
        job(
            "ties", base, [other, partly], {"thresholds": "shipped"}, keys=["a", "b"]
        ).check_statistics()
    assert caught.value.code == "merge.statistic_missing"
    assert "b changes v and ships no trim" in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "each"),
    [
        ({"thresholds": "shipped", "trim_scope": "global"}, {}),
        ({}, {"density": 0.0}),
        ({}, {"density": 1.5}),
        ({"trim": "tensor"}, {}),
    ],
)
def test_parameters_out_of_range_are_refused(
    parameters: dict[str, Any], each: dict[str, Any]
) -> None:
    with pytest.raises(ColdmergeError) as caught:
        merged("ties", {"w": np.zeros(1)}, [{"w": np.ones(1)}], parameters, [each])
    assert caught.value.code == "merge.bad_parameter"


def test_thresholds_found_at_another_density_are_refused() -> None:
    delta = ArrayDelta({"w": np.ones(3)}, {"trim": {"w": [1.0]}})
    delta.statistics = {"trim": 0.5}
    each = [{"density": 0.2}]
    work = job("ties", {"w": np.zeros(3)}, [delta], {"thresholds": "shipped"}, each)
    with pytest.raises(ColdmergeError) as caught:
        work.check_statistics()
    assert caught.value.code == "merge.other_density"
    assert (caught.value.expected, caught.value.got) == ("0.2", "0.5")
    job(
        "ties", {"w": np.zeros(3)}, [delta], {"thresholds": "shipped"}, [{"density": 0.5}]
    ).check_statistics()


@pytest.mark.parametrize("threshold", [np.nan, np.inf])
def test_a_shipped_threshold_that_is_no_number_is_refused(threshold: float) -> None:
    shipped = ArrayDelta({"w": np.ones(3)}, {"trim": {"w": [threshold]}})
    with pytest.raises(ColdmergeError) as caught:
        merged("ties", {"w": np.zeros(3)}, [shipped], {"thresholds": "shipped"})
    assert caught.value.code == "merge.statistic_not_finite"


def test_where_both_signs_have_the_same_mass_plus_wins() -> None:
    taus = [{"w": [3.0, -2.0]}, {"w": [-3.0, 2.0]}]
    found = merged("ties", {"w": np.zeros(2)}, taus)
    np.testing.assert_array_equal(found["w"], [3, 2])
