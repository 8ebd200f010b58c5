"""RegMean against least squares over the inputs' own data, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.core.errors import TaskVectorError
from tests.merging.sources import ArrayDelta, merged

quick = settings(max_examples=40, deadline=None)
cases = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 999))
Case = tuple[int, int, int, int]


class Layer:
    """A base weight (out, in), and the inputs' weights, data and Gram matrices."""

    def __init__(self, case: Case, tokens: int = 40) -> None:
        out, width, count, seed = case
        rng = np.random.default_rng(seed)
        self.base = rng.standard_normal((out, width)).astype(np.float32)
        self.taus = rng.standard_normal((count, out, width)).astype(np.float32)
        self.data = [rng.integers(-8, 9, (tokens, width)).astype(np.float64) for _ in range(count)]
        self.grams: list[Floats64] = [x.T @ x for x in self.data]  # integers: exact in float32
        self.weights = list(rng.uniform(0.2, 2, count))

    @property
    def thetas(self) -> list[Floats64]:
        return [self.base.astype(np.float64) + tau for tau in self.taus]

    def inputs(self) -> list[ArrayDelta]:
        return [
            ArrayDelta({"w": tau}, {"gram": {"w": gram}})
            for tau, gram in zip(self.taus, self.grams, strict=True)
        ]

    def run(self, method: str = "regmean", threads: int = 1, **parameters: Any) -> Floats32:
        each = [{"weight": weight} for weight in self.weights]
        base = {"w": self.base}
        return merged(method, base, self.inputs(), parameters, each, threads)["w"]


def reference(layer: Layer, reduce: float) -> Floats64:
    """(ΣG)⁻¹ΣGW over weights θ, transposed to (out, in), without any ridge."""
    total, answers = 0.0, 0.0
    for gram, theta, weight in zip(layer.grams, layer.thetas, layer.weights, strict=True):
        shrunk = weight * (reduce * gram + (1 - reduce) * np.diag(np.diag(gram)))
        total, answers = total + shrunk, answers + shrunk @ theta.T
    return np.linalg.solve(total, answers).T.astype(np.float64)


@quick
@given(cases, st.sampled_from([0.0, 0.1, 0.9, 1.0]))
def test_it_is_the_formula_in_float64(case: Case, reduce: float) -> None:
    layer = Layer(case)
    found = layer.run(reduce=reduce, ridge=1e-12)
    np.testing.assert_allclose(found, reference(layer, reduce), rtol=0, atol=5e-6)
    np.testing.assert_allclose(layer.run(reduce=reduce), found, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(found, layer.run(threads=2, reduce=reduce, ridge=1e-12))


@quick
@given(cases)
def test_it_answers_as_the_inputs_did_on_their_own_data(case: Case) -> None:
    layer = Layer(case)
    rows = [w**0.5 * x for w, x in zip(layer.weights, layer.data, strict=True)]
    wanted = [x @ theta.T for x, theta in zip(rows, layer.thetas, strict=True)]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted))[0].T
    np.testing.assert_allclose(layer.run(reduce=1.0, ridge=1e-12), expected, rtol=0, atol=5e-6)


def test_one_input_and_identical_inputs_stay_as_they_are() -> None:
    layer = Layer((3, 5, 3, 1))
    layer.taus[:] = layer.taus[0]
    np.testing.assert_allclose(layer.run(), layer.thetas[0], rtol=0, atol=2e-6)


def test_where_no_data_went_it_is_the_mean() -> None:
    layer = Layer((4, 6, 3, 2))
    for gram, x in zip(layer.grams, layer.data, strict=True):
        x[:, 2] = 0
        gram[:] = x.T @ x
    mean = np.average(layer.thetas, axis=0, weights=layer.weights)
    found = layer.run()
    np.testing.assert_allclose(found[:, 2], mean[:, 2], rtol=0, atol=1e-6)
    assert np.abs(found - mean).max() > 0.1


@pytest.mark.parametrize("reduce", [0.9, 1.0])
def test_fewer_tokens_than_features_leave_a_finite_solution(reduce: float) -> None:
    """ΣG is singular: along data it is least squares, beside them the mean."""
    layer = Layer((4, 12, 2, 3), tokens=3)
    found = layer.run(reduce=reduce).astype(np.float64)
    assert np.isfinite(found).all()
    if reduce == 1.0:
        data, theta = layer.data, layer.thetas
        for x, w in zip(data, theta, strict=True):
            np.testing.assert_allclose(x @ found.T, x @ w.T, rtol=0, atol=2e-2)
        rest = np.linalg.svd(np.concatenate(data))[2][6:]
        mean = np.average(theta, axis=0, weights=layer.weights)
        assert np.abs((found - mean) @ rest.T).max() < np.abs(found - mean).max()


def test_tensors_of_other_shapes_and_without_a_gram_get_the_mean() -> None:
    rng = np.random.default_rng(4)
    extents = {"norm": (6,), "conv": (3, 2, 2), "table": (5, 4), "layer": (1, 1)}
    base = {n: rng.standard_normal(e).astype(np.float32) for n, e in extents.items()}
    taus = [
        {n: rng.standard_normal(e).astype(np.float32) for n, e in extents.items()} for _ in range(3)
    ]
    mean = merged("mean", base, taus)
    for method in ("regmean", "mats"):
        found = merged(method, base, [ArrayDelta(tau, {"gram": {"layer": [1.0]}}) for tau in taus])
        for name in ("norm", "conv", "table"):
            np.testing.assert_array_equal(found[name], mean[name])


def test_the_order_of_the_inputs_does_not_matter() -> None:
    layer = Layer((4, 6, 3, 5))
    one = layer.run()
    layer.taus, layer.grams = layer.taus[::-1], layer.grams[::-1]
    layer.weights.reverse()
    np.testing.assert_allclose(layer.run(), one, rtol=0, atol=2e-6)


def test_what_adds_up_to_a_singular_matrix_is_said_to() -> None:
    indefinite = ArrayDelta({"w": np.ones((2, 2))}, {"gram": {"w": [[1.0, 1.0], [1.0, 1.0]]}})
    with pytest.raises(TaskVectorError) as caught:
        merged("regmean", {"w": np.zeros((2, 2))}, [indefinite], {"reduce": 1, "ridge": 1e-300})
    assert caught.value.code == "merge.singular_gram"
