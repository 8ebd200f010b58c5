"""Gram matrices: by blocks in float64, with the digits of the deltas."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from coldmerge.core.dtypes import Floats64
from coldmerge.merging import Pool, View
from coldmerge.merging.gram import (
    base_and_deltas,
    distances,
    gram,
    norms,
    of_weights,
    products,
)
from tests.merging.sources import job


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(9)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("size", [0, 1, 1000, 70_000])
def test_products_are_those_of_float64(count: int, size: int, rng: np.random.Generator) -> None:
    rows = rng.normal(0, 1, (count, size)).astype(np.float32)
    wide = rows.astype(np.longdouble)
    np.testing.assert_allclose(products(rows), wide @ wide.T, rtol=0, atol=1e-14 * (size + 1))


@pytest.mark.parametrize("count", [2, 6])
def test_products_of_many_stacks(count: int, rng: np.random.Generator) -> None:
    rows = rng.normal(0, 1, (7, count, 30)).astype(np.float32)
    each = np.stack([products(one) for one in rows])
    np.testing.assert_allclose(products(rows), each, rtol=1e-13, atol=1e-13)


def test_a_view_of_many_tensors_adds_up_and_no_thread_shows(rng: np.random.Generator) -> None:
    names = {"a": (40, 50), "b": (777,), "c": (3, 5)}
    base = {name: rng.normal(0, 1, shape) for name, shape in names.items()}
    taus = [{name: rng.normal(0, 1, shape) for name, shape in names.items()} for _ in range(3)]
    del taus[1]["b"]
    work = job("krum", base, taus, block=100)
    found: list[Floats64] = []
    for threads in (1, 2):
        with Pool(threads) as pool:
            found.append(gram(View(work, work.names, pool)))
    np.testing.assert_array_equal(found[0], found[1])
    whole = np.stack(
        [np.concatenate([tau.get(name, 0 * base[name]).ravel() for name in names]) for tau in taus]
    ).astype(np.float32)
    np.testing.assert_allclose(found[0], products(whole), rtol=1e-12)
    np.testing.assert_allclose(norms(found[0]), np.linalg.norm(whole, axis=1), rtol=1e-6)
    point = np.array([0.2, 0.5, -0.1])
    expected = np.linalg.norm(whole - point @ whole, axis=1)
    np.testing.assert_allclose(distances(found[0], point), expected, rtol=1e-6)


def test_angles_of_nearly_parallel_weights_keep_the_digits_of_the_deltas(
    rng: np.random.Generator,
) -> None:
    size = 200_000
    base = rng.normal(0, 0.02, size).astype(np.float32)
    taus = rng.normal(0, 1e-6, (2, size)).astype(np.float32)
    work = job("karcher", {"w": base}, [{"w": tau} for tau in taus])
    with Pool(1) as pool:
        inner = of_weights(gram(View(work, work.names, pool), base_and_deltas))

    exact = base.astype(np.longdouble) + taus.astype(np.longdouble)
    true, rounded = angle(exact @ exact.T), products((base + taus).astype(np.float32))
    assert abs(angle(inner) / true - 1) < 1e-8 < abs(angle(rounded) / true - 1)


def angle(inner: npt.NDArray[Any]) -> float:
    wide = inner.astype(np.longdouble)
    return float(np.arccos(wide[0, 1] / np.sqrt(wide[0, 0] * wide[1, 1])))
