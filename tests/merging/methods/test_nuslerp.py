"""nuslerp: mergekit's vectors and the formula in float64, whole and along either axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from tests.merging.oracles import cases, check, ours
from tests.merging.problems import Problem, close_by_tensor, problems, reversed_order, run
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)
plain = ("random", "zero", "same", "lattice", "absent")
MODES: list[dict[str, Any]] = [
    {},
    {"nuslerp_flatten": False},
    {"nuslerp_flatten": False, "nuslerp_row_wise": True},
]


def slerp(a: Floats64, b: Floats64, t: float) -> Floats64:
    """Along the last axis."""
    lengths = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
    cosine = (a * b).sum(-1, keepdims=True) / np.maximum(lengths, 1e-14)
    turn = np.abs(cosine) < 1 - 2.0**-25
    angle = np.arccos(np.where(turn, cosine, 0))
    on_arc = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.where(turn, on_arc, (1 - t) * a + t * b)


def reference(base: Floats64, taus: Floats64, t: float, mode: dict[str, Any]) -> Floats64:
    a, b = taus if mode.get("origin") != "zero" else taus + base
    shape = a.shape
    if mode.get("nuslerp_flatten", True):
        turned = slerp(a.reshape(-1), b.reshape(-1), t).reshape(shape)
    elif mode.get("nuslerp_row_wise"):
        turned = np.moveaxis(slerp(np.moveaxis(a, 0, -1), np.moveaxis(b, 0, -1), t), -1, 0)
    else:
        turned = slerp(a, b, t)
    return turned if mode.get("origin") == "zero" else base + turned


@pytest.mark.parametrize("case", cases("nuslerp"), ids=lambda case: case["name"])
def test_nuslerp_is_mergekits(case: dict[str, Any]) -> None:
    check(case, ours(case))


@quick
@given(
    problems(2, 2, plain),
    st.sampled_from(MODES),
    st.sampled_from(["base", "zero"]),
    st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
)
def test_nuslerp_is_the_formula(
    problem: Problem, mode: dict[str, Any], origin: str, weights: tuple[float, float]
) -> None:
    mode = {**mode, "origin": origin}
    found = run("nuslerp", problem, mode, [{"weight": weight} for weight in weights])
    t = weights[1] / sum(weights)
    # where cosines are near 1, products of 7 elements and of whole rows take different sides
    close_by_tensor(found, problem, lambda base, taus: reference(base, taus, t, mode), 1e-6)


@quick
@given(problems(2, 2, plain), st.sampled_from(MODES), st.floats(0.1, 3))
def test_the_order_of_two_models_with_their_weights_is_nothing(
    problem: Problem, mode: dict[str, Any], weight: float
) -> None:
    each = [{"weight": weight}, {"weight": 1.0}]
    found = merged("nuslerp", problem.base, problem.taus, mode, each)
    turned = reversed_order(problem)
    other = merged("nuslerp", turned.base, turned.taus, mode, each[::-1])
    for name, values in found.items():
        np.testing.assert_allclose(values, other[name], rtol=0, atol=1e-6)


def test_vectors_lie_along_the_last_axis_or_the_first() -> None:
    base = {"w": np.zeros((2, 2), np.float32)}
    taus = [{"w": [[1, 0], [1, 0]]}, {"w": [[0, 1], [1, 0]]}]
    half = np.sqrt(0.5)
    last = merged("nuslerp", base, taus, {"nuslerp_flatten": False})["w"]
    np.testing.assert_allclose(last, [[half, half], [1, 0]], rtol=1e-6)
    first = merged("nuslerp", base, taus, {"nuslerp_flatten": False, "nuslerp_row_wise": True})
    third = np.sin(np.pi / 8) / np.sin(np.pi / 4)  # columns (1, 1) and (0, 1) are 45° apart
    np.testing.assert_allclose(first["w"], [[third, half], [2 * third, 0]], rtol=1e-6)


def test_weights_that_cancel_meet_in_the_middle() -> None:
    base = {"w": np.zeros(2, np.float32)}
    taus, each = [{"w": [1, 0]}, {"w": [0, 1]}], [{"weight": 1}, {"weight": -1}]
    found = merged("nuslerp", base, taus, {}, each)["w"]
    np.testing.assert_allclose(found, np.sqrt([0.5, 0.5]), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_nuslerp_takes_two(count: int, mode: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        merged("nuslerp", {"w": np.ones(2, np.float32)}, [{"w": [1, 2]}] * count, mode)
    assert refused.value.code == "merge.input_count"
