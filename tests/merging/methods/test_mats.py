"""MaTS against scipy's conjugate gradients on the whole system, step for step, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, cg

from coldmerge.core.dtypes import Floats64
from tests.merging.methods.test_regmean import Case, Layer, cases, reference
from tests.merging.sources import ArrayDelta, merged

quick = settings(max_examples=40, deadline=None)


def conjugate_gradients(layer: Layer, steps: int, rtol: float) -> Floats64:
    """X with X·ΣG = ΣτG, flattened, from the mean of the deltas, by scipy; plus the base."""
    weighted = [g * w for g, w in zip(layer.grams, layer.weights, strict=True)]
    taus = layer.taus.astype(np.float64)
    right = sum(tau @ gram for tau, gram in zip(taus, weighted, strict=True))
    total, shape = sum(weighted), layer.base.shape
    operator = LinearOperator(
        (layer.base.size,) * 2, matvec=lambda x: (x.reshape(shape) @ total).reshape(-1), dtype=float
    )
    mean = np.average(taus, axis=0, weights=layer.weights)
    x, _ = cg(operator, np.asarray(right).reshape(-1), mean.reshape(-1), rtol=rtol, maxiter=steps)
    found: Floats64 = layer.base + x.reshape(shape)
    return found


@quick
@given(cases, st.sampled_from([0, 1, 2, 4]))
def test_gram_takes_the_steps_of_scipy(case: Case, steps: int) -> None:
    layer = Layer(case)
    found = layer.run("mats", iterations=steps, tolerance=1e-10)
    np.testing.assert_allclose(found, conjugate_gradients(layer, steps, 1e-10), rtol=0, atol=2e-5)
    again = layer.run("mats", threads=2, iterations=steps, tolerance=1e-10)
    np.testing.assert_array_equal(found, again)


@quick
@given(cases)
def test_gram_ends_at_regmean_without_reduction(case: Case) -> None:
    layer = Layer(case)
    found = layer.run("mats", tolerance=1e-9)
    np.testing.assert_allclose(found, reference(layer, 1.0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 2)])
def test_fisher_ends_at_the_fisher_average(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    base = {"w": rng.standard_normal(shape).astype(np.float32)}
    inputs = [
        ArrayDelta({"w": rng.standard_normal(shape)}, {"fisher": {"w": rng.uniform(0.1, 1, shape)}})
        for _ in range(3)
    ]
    found = merged("mats", base, inputs, {"statistic": "fisher", "tolerance": 1e-9})["w"]
    np.testing.assert_allclose(found, merged("fisher", base, inputs)["w"], rtol=0, atol=2e-6)


def test_no_steps_and_no_data_give_the_mean() -> None:
    layer = Layer((4, 6, 3, 2))
    mean = np.average(layer.thetas, axis=0, weights=layer.weights)
    np.testing.assert_allclose(layer.run("mats", iterations=0), mean, rtol=0, atol=1e-6)
    layer.grams = [np.zeros_like(gram) for gram in layer.grams]
    np.testing.assert_allclose(layer.run("mats"), mean, rtol=0, atol=1e-6)


def test_beside_the_data_it_stays_at_the_mean() -> None:
    layer = Layer((4, 12, 2, 3), tokens=3)
    found = layer.run("mats", tolerance=1e-9).astype(np.float64)
    mean = np.average(layer.thetas, axis=0, weights=layer.weights)
    rest = np.linalg.svd(np.concatenate(layer.data))[2][6:]
    np.testing.assert_allclose((found - mean) @ rest.T, 0, atol=2e-6)
    for x, theta in zip(layer.data, layer.thetas, strict=True):
        np.testing.assert_allclose(x @ found.T, x @ theta.T, rtol=0, atol=1e-3)


def test_a_loose_tolerance_stops_early() -> None:
    layer = Layer((4, 8, 3, 4))
    loose = layer.run("mats", tolerance=0.5)
    np.testing.assert_array_equal(loose, layer.run("mats", tolerance=0.5, iterations=3))
    assert np.abs(loose - reference(layer, 1.0)).max() > 1e-3
