"""centred_clipping: the steps on whole vectors in float64, its bound, an attacker."""

from __future__ import annotations

import numpy as np
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


def clipping(vectors: Floats64, weights: Floats64, radius: float | None, steps: int) -> Floats64:
    centre = np.zeros(vectors.shape[1])
    for _ in range(steps):
        away = vectors - centre
        lengths = np.linalg.norm(away, axis=1)
        bound = radius or sorted(lengths)[(len(lengths) - 1) // 2]
        shorter = np.minimum(1, bound / np.maximum(lengths, 1e-30))
        centre = centre + np.average(away * shorter[:, None], axis=0, weights=weights)
    return centre


@quick
@given(
    problems(kinds=("random", "zero", "lattice", "absent", "opposed")),
    st.one_of(st.none(), st.floats(0.01, 3)),
    st.integers(1, 5),
    st.lists(st.floats(0.1, 3), min_size=6, max_size=6),
)
def test_the_steps_are_those_of_the_paper(
    problem: Problem, radius: float | None, steps: int, drawn: list[float]
) -> None:
    weights = np.array(drawn[: len(problem.taus)])
    each = [{"weight": weight} for weight in weights]
    how = {"radius": radius, "max_iter": steps}
    found = run("centred_clipping", problem, how, each)
    close_as_whole(found, problem, lambda taus: clipping(taus, weights, radius, steps))
    found = run("centred_clipping", problem, {**how, "scope": "tensor"}, each)

    def reference(base: Floats64, taus: Floats64) -> Floats64:
        flat = taus.reshape(len(taus), -1)
        return base + clipping(flat, weights, radius, steps).reshape(base.shape)

    close_by_tensor(found, problem, reference)


@quick
@given(problems(2, 6))
def test_the_order_of_the_inputs_is_nothing(problem: Problem) -> None:
    turned = reversed_order(problem)
    found = merged("centred_clipping", problem.base, problem.taus)
    other = merged("centred_clipping", turned.base, turned.taus)
    for name, values in found.items():
        close(values, other[name], 1e-6)


def test_a_wide_radius_gives_the_mean() -> None:
    _, problem = attacked()
    found = merged("centred_clipping", problem.base, problem.taus, {"radius": 1e6})["w"]
    close(found, merged("mean", problem.base, problem.taus)["w"], 1e-6)


def test_nobody_moves_the_result_by_more_than_radius_times_share_in_a_step() -> None:
    _, problem = attacked()
    how = {"radius": 0.5, "max_iter": 1}
    moved = []
    for factor in (1.0, 1e6):
        problem.taus[-1]["w"] *= np.float32(factor)
        moved.append(merged("centred_clipping", problem.base, problem.taus, how)["w"])
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-6)
    without = merged("centred_clipping", problem.base, problem.taus[:-1], how)["w"]
    reach = np.linalg.norm(moved[1] * 7 - without * 6)
    np.testing.assert_allclose(reach, 0.5, rtol=1e-5)


def test_an_attacker_leads_the_mean_astray_but_not_far_the_clipped_one() -> None:
    assert astray("mean") > 10
    assert astray("centred_clipping") < 0.5
