"""multislerp: mergekit's vectors, the steps as published in float64, opposed inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from tests.merging.oracles import cases, check, ours, tensors
from tests.merging.problems import Problem, close_by_tensor, problems, run
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)
plain = ("random", "same", "lattice", "absent", "tiny")


def multislerp(vectors: Floats64, weights: Floats64, eps: float = 1e-8) -> Floats64:
    """With the tangent step that ours leaves out."""
    flat = vectors.reshape(len(vectors), -1)
    lengths = np.linalg.norm(flat, axis=1)
    if len(flat) == 1 or not lengths.any():
        alone: Floats64 = vectors[0]
        return alone
    units = flat / (lengths + eps)[:, None]
    mean = weights @ units
    if np.linalg.norm(mean) < 1e-7:
        chord: Floats64 = np.tensordot(weights, vectors, 1)
        return chord
    mean /= np.linalg.norm(mean)
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    angle = np.linalg.norm(tangent) + eps
    found: Floats64 = (mean * np.cos(angle) + tangent * np.sin(angle) / angle) * (weights @ lengths)
    return found.reshape(vectors.shape[1:])


@pytest.mark.parametrize("case", cases("multislerp"), ids=lambda case: case["name"])
def test_multislerp_is_mergekits(case: dict[str, Any]) -> None:
    found = ours(case)
    check(case, found)
    for name in case["refused"]:  # nothing changes there, which mergekit takes for an error
        np.testing.assert_array_equal(found[name], tensors(case["inputs"][0])[name])


@quick
@given(
    problems(kinds=plain),
    st.sampled_from(["base", "zero"]),
    st.booleans(),
    st.lists(st.floats(0.1, 3), min_size=6, max_size=6),
)
def test_multislerp_is_the_method_step_by_step(
    problem: Problem, origin: str, normalize: bool, drawn: list[float]
) -> None:
    weights = np.array(drawn[: len(problem.taus)])
    used = weights / weights.sum() if normalize else weights
    parameters = {"origin": origin, "normalize_weights": normalize}
    found = run("multislerp", problem, parameters, [{"weight": weight} for weight in weights])

    def reference(base: Floats64, taus: Floats64) -> Floats64:
        if origin == "zero":
            return multislerp(base + taus, used)
        return base + multislerp(taus, used)

    close_by_tensor(found, problem, reference, 1e-6)


@quick
@given(st.integers(0, 999), st.integers(2, 5))
def test_the_mean_is_as_long_as_its_inputs_and_their_order_is_nothing(
    seed: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    taus = rng.normal(0, 1, (count, 30))
    taus /= np.linalg.norm(taus, axis=1, keepdims=True)
    base = {"w": np.zeros(30, np.float32)}
    found = merged("multislerp", base, [{"w": tau} for tau in taus])["w"]
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    other = merged("multislerp", base, [{"w": tau} for tau in taus[::-1]])["w"]
    np.testing.assert_allclose(found, other, rtol=0, atol=1e-6)


def test_two_opposed_inputs_are_averaged_and_three_refused() -> None:
    base = {"w": np.zeros(300, np.float32)}
    tau = np.random.default_rng(1).normal(0, 1, 300).astype(np.float32)
    pair = merged("multislerp", base, [{"w": tau}, {"w": -3 * tau}])["w"]
    np.testing.assert_allclose(pair, -tau, rtol=1e-6)
    each = [{"weight": weight} for weight in (1, 0.5, 0.5)]
    with pytest.raises(ConfigError) as refused:
        merged("multislerp", base, [{"w": tau}, {"w": -tau}, {"w": -tau}], {}, each)
    assert refused.value.code == "merge.opposed_inputs"


def test_weights_that_sum_to_zero_cannot_be_normalized() -> None:
    taus, each = [{"w": [1.0, 0]}, {"w": [0.0, 1]}], [{"weight": 1}, {"weight": -1}]
    base = {"w": np.zeros(2, np.float32)}
    with pytest.raises(ConfigError) as refused:
        merged("multislerp", base, taus, {}, each)
    assert refused.value.code == "merge.weights_sum_to_zero"
    raw = merged("multislerp", base, taus, {"normalize_weights": False}, each)["w"]
    np.testing.assert_allclose(raw, [0, 0], atol=1e-9)
