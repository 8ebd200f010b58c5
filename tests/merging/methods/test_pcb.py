"""PCB-Merging against the authors' steps in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64
from tests.merging.sources import merged
from tests.merging.sparse import Problem, problem, problems, quick

shares = st.sampled_from([0.1, 0.5, 0.95, 1.0])


def run(of: Problem, density: float, scope: str = "global", **how: Any) -> Floats32:
    taus = [{"w": tau} for tau in of.taus]
    each = [{"weight": abs(weight)} for weight in of.weights]
    parameters = {"density": density, "lambda": 1.0, "scope": scope}
    return merged("pcb", {"w": of.base}, taus, parameters, each, **how)["w"]


def clamped(values: Floats64, low: float, high: float) -> Floats64:
    size = values.shape[1]
    ordered = np.sort(values, axis=1)
    bounds = min(size - 1, int(size * low)), max(0, int(size * (1 - high) - 1))
    least, most = (ordered[:, place, None] for place in bounds)
    return np.clip(values, least, most)


def scaled(values: Floats64) -> Floats64:
    least, most = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    found: Floats64 = (values - least) / np.where(most > least, most - least, 1)
    return found


def close(found: Floats32, of: Problem, density: float) -> None:
    """Compare where weights are more than rounding: a mean of one tiny weight is its entry."""
    stack = np.array([tau.reshape(-1) for tau in of.taus], np.float64)
    magnitudes = clamped(np.abs(stack), 0.0001, 0.0001)
    score = np.exp(len(stack) * scaled(magnitudes) ** 2) * np.tanh(stack * stack.sum(axis=0))
    kept = clamped(score, 1 - density, 0)
    least = kept.min(axis=1, keepdims=True)
    share = scaled(kept) * np.abs(of.weights)[:, None]
    mean = (np.sign(stack) * magnitudes * share).sum(axis=0)
    mean /= np.maximum(share.sum(axis=0), 1e-12)
    gap = np.abs((found - of.base).reshape(-1) - mean)
    weighed = share.sum(axis=0) > 1e-3
    assert gap[weighed].max(initial=0) < 1e-3 * np.abs(stack).max() + 1e-6
    dropped = (score < least - 1e-5 * np.abs(score).max(axis=1, keepdims=True)).all(axis=0)
    assert gap[dropped].max(initial=0) < 1e-6


@quick
@given(problems, shares)
def test_it_is_its_steps_in_float64(of: Problem, density: float) -> None:
    close(run(of, density), of, density)


@quick
@given(problems, st.integers(1, 9))
def test_blocks_and_threads_change_no_bit(of: Problem, block: int) -> None:
    np.testing.assert_array_equal(run(of, 0.5), run(of, 0.5, block=block, threads=2))


def test_a_large_tensor_is_ranked_in_one_pass_as_a_small_one_is() -> None:
    of = problem((700, 401), "normal", 3, 5)
    for density in (0.1, 0.9):
        close(run(of, density, threads=2), of, density)


def test_tensors_may_compete_alone() -> None:
    one, other = problem((30, 4), "normal", 2, 1), problem((50,), "normal", 2, 2)
    base = {"a": one.base, "b": other.base}
    taus = [{"a": a, "b": b * np.float32(9)} for a, b in zip(one.taus, other.taus, strict=True)]
    alone = merged("pcb", {"a": one.base}, [{"a": tau["a"]} for tau in taus], {"scope": "tensor"})
    within = merged("pcb", base, taus, {"scope": "tensor"})
    together = merged("pcb", base, taus)
    np.testing.assert_array_equal(within["a"], alone["a"])
    assert (together["a"] != alone["a"]).any()


def test_an_input_that_loses_everywhere_is_left_out_but_for_its_best() -> None:
    """Its scores are all negative, and so is the threshold."""
    rng = np.random.default_rng(1)
    tau = rng.uniform(0.5, 1, 40).astype(np.float32)
    of = Problem(np.zeros(40, np.float32), [tau, tau, -tau], [1.0] * 3, [])
    close(run(of, 0.5), of, 0.5)


@quick
@given(st.integers(1, 11), st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(count: int, seed: int, rng: Any) -> None:
    of = problem((6, 5), "lattice", count, seed)  # sums of these are exact
    of = Problem(of.base, of.taus, [1.0] * count, [])
    shuffled = Problem(of.base, rng.sample(of.taus, count), of.weights, [])
    np.testing.assert_allclose(run(of, 0.5), run(shuffled, 0.5), rtol=1e-5, atol=1e-5)
