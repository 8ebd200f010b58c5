"""Clipped task vectors: the bytes of an honest one, and thresholds that stay true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32
from coldmerge.screening.scaled import scaled
from coldmerge.screening.shares import bounded_shares, trace

Arrays = Mapping[str, npt.NDArray[np.float32]]


class Memory:
    """A task vector in memory. Keys `x.fisher`, `x.gram` and `x.trim` are statistics."""

    base_digest = "0" * 64

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self.names = frozenset(key for key in arrays if "." not in key)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def block(self, name: str, start: int, stop: int) -> Floats32:
        return self._arrays[name].reshape(-1)[start:stop].copy()

    def has_statistic(self, name: str, kind: str) -> bool:
        return f"{name}.{kind}" in self._arrays

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        return self._arrays[f"{name}.{kind}"].reshape(-1)[start:stop].copy()


def here(function: Callable[[str], list[float]], names: Sequence[str]) -> list[list[float]]:
    return [function(name) for name in names]


def test_a_factor_of_one_is_the_very_vector() -> None:
    vector = Memory({"x": np.ones(3, np.float32)})
    assert scaled(vector, 1.0) is vector
    assert scaled(vector, 1.0, {}) is vector


def test_a_product_is_rounded_once_from_float64() -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    found = scaled(Memory({"x": values}), 1 / 3, {}).block("x", 10, 990)
    assert found.dtype == np.float32
    expected = (values[10:990].astype(np.float64) * (1 / 3)).astype(np.float32)
    assert found.tobytes() == expected.tobytes()


def test_huge_values_come_down_to_ordinary_ones() -> None:
    vector = Memory({"x": np.full(4, 1e30, np.float32)})
    found = scaled(vector, 2.0 / float(np.linalg.norm(vector.block("x", 0, 4).astype("f8"))))
    assert np.linalg.norm(found.block("x", 0, 4)) == pytest.approx(2.0)


@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1), st.integers(1, 50))
def test_a_trim_threshold_stays_the_kth_largest(seed: int, factor: float, k: int) -> None:
    values = np.random.default_rng(seed).standard_normal(50).astype(np.float32)
    threshold = np.sort(np.abs(values))[-k:][:1]
    vector = scaled(Memory({"x": values, "x.trim": threshold}), factor)
    magnitudes = np.abs(vector.block("x", 0, 50))
    found = vector.statistic("x", "trim", 0, 1)[0]
    assert np.count_nonzero(magnitudes > found) < k <= np.count_nonzero(magnitudes >= found)


def test_the_clip_leaves_fisher_and_gram_alone_and_shares_do_not() -> None:
    fisher, gram = np.arange(6, dtype=np.float32), np.eye(3, dtype=np.float32)
    arrays = {"x": np.ones((2, 3), np.float32), "x.fisher": fisher, "x.gram": gram}
    clipped = scaled(Memory(arrays), 0.5)
    assert clipped.has_statistic("x", "gram")
    assert clipped.shape("x") == (2, 3)
    np.testing.assert_array_equal(clipped.statistic("x", "fisher", 0, 6), fisher)
    np.testing.assert_array_equal(clipped.statistic("x", "gram", 0, 9), gram.reshape(-1))
    bounded = scaled(Memory(arrays), 1.0, {("x", "fisher"): 0.5})
    np.testing.assert_array_equal(bounded.statistic("x", "fisher", 0, 6), fisher / 2)
    np.testing.assert_array_equal(bounded.block("x", 0, 6), 1)


def with_fisher(*traces: float) -> list[Memory]:
    made = [np.full((2, 2), trace / 4, np.float32) for trace in traces]
    return [Memory({"x": np.ones((2, 2), np.float32), "x.fisher": fisher}) for fisher in made]


def test_nobody_claims_more_than_so_many_medians() -> None:
    found = bounded_shares(with_fisher(1.0, 2.0, 4.0, 4e6), "fisher", 10.0, here)
    assert found == [{}, {}, {}, {("x", "fisher"): 20 / 4e6}]
    assert bounded_shares(with_fisher(1.0, 5.0, 10.0), "fisher", 10.0, here) == [{}, {}, {}]


def test_a_gram_matrix_is_measured_by_its_diagonal() -> None:
    gram = np.array([[1, 5, 5], [5, 2, 5], [5, 5, 4]], np.float32)
    vector = Memory({"x": np.ones((2, 3), np.float32), "x.gram": gram})
    assert trace(vector, "x", "gram") == 7.0
    large = Memory({"x": np.ones((2, 3), np.float32), "x.gram": gram * 100})
    none = Memory({"y": np.ones(3, np.float32)})
    found = bounded_shares([vector, none, vector, large], "gram", 10.0, here)
    assert found == [{}, {}, {}, {("x", "gram"): pytest.approx(0.1)}]
