"""geometric_median: Weiszfeld steps on whole vectors in float64, optimality, an attacker."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from tests.merging.problems import (
    Problem,
    astray,
    attacked,
    close,
    close_as_whole,
    close_by_tensor,
    problems,
    reversed_order,
    run,
)
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)


def weiszfeld(vectors: Floats64, weights: Floats64, steps: int) -> Floats64:
    point = np.average(vectors, axis=0, weights=weights)
    for _ in range(steps):
        apart = np.maximum(np.linalg.norm(vectors - point, axis=1), 1e-6)
        point = np.average(vectors, axis=0, weights=weights / apart)
    return point


@quick
@given(problems(), st.integers(1, 30), st.lists(st.floats(0.1, 3), min_size=6, max_size=6))
def test_the_steps_are_those_of_weiszfeld(problem: Problem, steps: int, drawn: list[float]) -> None:
    weights = np.array(drawn[: len(problem.taus)])
    each = [{"weight": weight} for weight in weights]
    how = {"max_iter": steps, "tol": 1e-14}
    found = run("geometric_median", problem, how, each)
    close_as_whole(found, problem, lambda taus: weiszfeld(taus, weights, steps))
    found = run("geometric_median", problem, {**how, "scope": "tensor"}, each)

    def reference(base: Floats64, taus: Floats64) -> Floats64:
        flat = taus.reshape(len(taus), -1)
        return base + weiszfeld(flat, weights, steps).reshape(base.shape)

    close_by_tensor(found, problem, reference)


@quick
@given(problems(2, 6, ("random", "zero", "absent")))
def test_the_order_of_the_inputs_is_nothing(problem: Problem) -> None:
    turned = reversed_order(problem)
    found = merged("geometric_median", problem.base, problem.taus)
    other = merged("geometric_median", turned.base, turned.taus)
    for name, values in found.items():
        close(values, other[name], 1e-6)


def test_no_step_away_shortens_the_way_to_all() -> None:
    vectors = np.random.default_rng(7).normal(0, 1, (5, 3))
    base = {"w": np.zeros(3, np.float32)}
    found = merged("geometric_median", base, [{"w": vector} for vector in vectors])["w"]

    def way(point: Floats64) -> float:
        return float(np.linalg.norm(vectors - point, axis=1).sum())

    best = way(found.astype(np.float64))
    for step in np.vstack([np.eye(3), -np.eye(3)]) * 1e-3:
        assert best < way(found + step)


def test_a_majority_at_one_point_is_the_median() -> None:
    base = {"w": np.zeros(2, np.float32)}
    taus = [{"w": [1.0, 2.0]}] * 3 + [{"w": [50.0, -9.0]}, {"w": [-70.0, 3.0]}]
    np.testing.assert_allclose(merged("geometric_median", base, taus)["w"], [1, 2], atol=1e-5)


@pytest.mark.parametrize("factor", [1, 1e4])
def test_an_attacker_leads_the_mean_astray_but_not_the_median(factor: float) -> None:
    mean, problem = attacked()
    problem.taus[-1]["w"] *= np.float32(factor)
    found = merged("geometric_median", problem.base, problem.taus)["w"]
    assert np.linalg.norm(found - mean) < 0.25
    assert astray("mean") > 10
