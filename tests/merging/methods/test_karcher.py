"""karcher: mergekit's vectors, the iteration on whole vectors in float64, what makes it a mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from tests.merging.oracles import cases, check, ours
from tests.merging.problems import Problem, close, close_by_tensor, problems, reversed_order, run
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)
plain = ("random", "zero", "same", "lattice", "absent", "tiny")


def karcher(thetas: Floats64, weights: Floats64, steps: int = 10, tol: float = 1e-5) -> Floats64:
    flat = thetas.reshape(len(thetas), -1)
    shares, lengths = weights / weights.sum(), np.linalg.norm(flat, axis=1)
    some = lengths > tol
    if len(flat) == 1 or not some.any():
        return thetas[0] if len(flat) == 1 else np.zeros_like(thetas[0])
    units, pulls = flat[some] / lengths[some, None], shares[some] / shares[some].sum()
    mean = pulls @ units
    mean = mean / np.linalg.norm(mean) if np.linalg.norm(mean) >= tol else units[0]
    for _ in range(steps):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        turn = np.where((angles < tol) | (angles > np.pi - tol), 0, 1 / np.sinc(angles / np.pi))
        step = (pulls * turn) @ (units - np.outer(cosines, mean))
        if (length := np.linalg.norm(step)) < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
        mean /= np.linalg.norm(mean)
    found: Floats64 = mean * (shares @ lengths)
    return found.reshape(thetas.shape[1:])


@pytest.mark.parametrize("case", cases("karcher"), ids=lambda case: case["name"])
def test_karcher_is_mergekits(case: dict[str, Any]) -> None:
    check(case, ours(case))


@quick
@given(problems(kinds=plain), st.lists(st.floats(0.1, 3), min_size=6, max_size=6))
def test_karcher_is_the_iteration(problem: Problem, drawn: list[float]) -> None:
    weights = np.array(drawn[: len(problem.taus)])
    each = [{"weight": weight} for weight in weights]
    # a step just above and just below `tol` differ by 1e-5 at most, mostly by nothing
    found = run("karcher", problem, {"tol": 1e-7, "max_iter": 30}, each)
    close_by_tensor(
        found, problem, lambda base, taus: karcher(base + taus, weights, 30, 1e-7), 1e-6
    )


@quick
@given(problems(2, 5, plain))
def test_the_order_of_the_models_is_nothing(problem: Problem) -> None:
    how = {"tol": 1e-7, "max_iter": 30}
    turned = reversed_order(problem)
    found = merged("karcher", problem.base, problem.taus, how)
    other = merged("karcher", turned.base, turned.taus, how)
    for name, values in found.items():
        if values.size > 1:  # one element has two directions, and opposite ones no mean
            close(values, other[name], 1e-6)


def test_the_mean_balances_the_ways_to_it_along_the_sphere() -> None:
    thetas = np.random.default_rng(2).normal(0, 1, (4, 50)) + 1
    found = merged(
        "karcher",
        {"w": np.zeros(50, np.float32)},
        [{"w": theta} for theta in thetas],
        {"max_iter": 50, "tol": 1e-9},
    )["w"].astype(np.float64)
    lengths = np.linalg.norm(thetas, axis=1)
    assert np.linalg.norm(found) == pytest.approx(lengths.mean())
    mean, units = found / np.linalg.norm(found), thetas / lengths[:, None]
    cosines = units @ mean
    ways = (units - np.outer(cosines, mean)) * (np.arccos(cosines) / np.sin(np.arccos(cosines)))[
        :, None
    ]
    assert np.linalg.norm(ways.mean(axis=0)) < 1e-6 < np.linalg.norm(ways, axis=1).min()


def test_opposed_models_stay_finite_and_tensors_without_length_become_zero() -> None:
    theta = np.random.default_rng(3).normal(0, 1, 40)
    base = {"w": np.zeros(40, np.float32)}
    pair = merged("karcher", base, [{"w": theta}, {"w": -theta}])["w"]
    np.testing.assert_allclose(pair, theta, rtol=1e-6)
    ground = np.random.default_rng(4).normal(0, 1, 40)
    taus = [{"w": theta - ground}, {"w": -0.37 * theta - ground}]  # opposed but for rounding
    pair = merged("karcher", {"w": ground}, taus)["w"]
    np.testing.assert_allclose(pair, 0.685 * theta, rtol=1e-5)
    none = merged("karcher", base, [{"w": 1e-8 * theta}, {"w": 0 * theta}])["w"]
    np.testing.assert_array_equal(none, np.zeros(40))


def test_a_model_without_length_has_no_part_in_a_step() -> None:
    thetas = np.random.default_rng(5).normal(0, 1, (3, 20)) * [[1], [0], [2]]
    base, weights = {"w": np.zeros(20, np.float32)}, np.array([1.0, 2.0, 3.0])
    each = [{"weight": weight} for weight in weights]
    taus = [{"w": theta} for theta in thetas]
    found = merged("karcher", base, taus, {"max_iter": 1}, each)["w"]
    close(found, karcher(thetas, weights, 1))


def test_the_base_does_not_matter_to_models_given_as_weights() -> None:
    rng = np.random.default_rng(4)
    thetas = rng.integers(-64, 64, (3, 30)) / 64
    found = []
    for ground in (np.zeros(30), rng.integers(-64, 64, 30) / 64):
        taus = [{"w": theta - ground} for theta in thetas]
        found.append(merged("karcher", {"w": ground}, taus)["w"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
