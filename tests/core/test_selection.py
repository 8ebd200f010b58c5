"""The exact k-th magnitude, against numpy's partition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from coldmerge.core import selection
from coldmerge.core.dtypes import Floats32, from_float32, to_float32
from coldmerge.core.selection import kept, kth_magnitude

MANY = selection.WHOLE * 3 + 17


def over(values: Floats32) -> selection.Read:
    return lambda start, stop: values[start:stop]


def by_numpy(values: Floats32, k: int) -> np.float32:
    return np.float32(np.partition(np.abs(values), len(values) - k)[len(values) - k])


def normal(size: int, seed: int = 0) -> Floats32:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def sparse(size: int) -> Floats32:
    values = normal(size)
    values[np.random.default_rng(1).random(size) < 0.9] = 0
    return values


def by_rows(size: int) -> Floats32:
    """Rows whose scale differs by up to a factor of a million: a sample of runs misleads."""
    scales = np.exp(np.random.default_rng(2).normal(0, 4, size // 768 + 1)).astype(np.float32)
    return normal(size) * np.repeat(scales, 768)[:size]


def one_large_row(size: int) -> Floats32:
    values = normal(size) * np.float32(1e-3)
    values[5000:5300] *= 1e6
    return values


def bfloats(size: int) -> Floats32:
    return to_float32(from_float32(normal(size), "BF16"))


def equal(size: int) -> Floats32:
    return np.full(size, -0.25, np.float32)


def two_values(size: int) -> Floats32:
    return np.where(np.arange(size) % 3 == 0, np.float32(2), np.float32(-1))


def zeros(size: int) -> Floats32:
    return np.zeros(size, np.float32)


def rising(size: int) -> Floats32:
    return np.arange(size, dtype=np.float32)


def denormal(size: int) -> Floats32:
    return normal(size) * np.float32(1e-40)


SHAPES = [normal, sparse, by_rows, one_large_row, bfloats, equal]
SHAPES += [two_values, zeros, rising, denormal]


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("density", [1e-9, 0.006, 0.1, 0.2, 0.5, 0.85, 0.9999, 1.0])
def test_a_large_tensor_gives_what_numpy_gives(
    make: Callable[[int], Floats32], density: float
) -> None:
    values = make(MANY)
    k = kept(density, MANY)
    found = kth_magnitude(over(values), MANY, k)
    assert found == by_numpy(values, k)
    assert found.dtype == np.float32


@pytest.mark.parametrize("make", SHAPES)
def test_counting_alone_gives_the_same(make: Callable[[int], Floats32]) -> None:
    values = make(MANY)
    ranks = (1, MANY // 5, MANY)
    found = selection._counted(over(values), MANY, ranks, 2**16)
    assert found == tuple(by_numpy(values, k) for k in ranks)


@given(
    values=arrays.arrays(
        np.float32,
        st.integers(1, 300),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    density=st.floats(0, 1),
    block=st.integers(1, 400),
)
def test_any_small_values_and_any_blocks(values: Floats32, density: float, block: int) -> None:
    k = kept(density, len(values))
    assert kth_magnitude(over(values), len(values), k, block) == by_numpy(values, k)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(selection.WHOLE + 1, selection.WHOLE * 2),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(0, 12),
    block=st.sampled_from([1000, 2**16, 2**18]),
)
def test_any_large_values_on_any_lattice(
    size: int, share: float, seed: int, levels: int, block: int
) -> None:
    values = normal(size, seed)
    if levels:
        values = np.round(values * levels) / np.float32(levels)
    k = kept(share, size)
    assert kth_magnitude(over(values), size, k, block) == by_numpy(values, k)


def test_several_ranks_in_one_pass() -> None:
    values = normal(MANY)
    ranks = [kept(0.9, MANY), kept(0.01, MANY), 1]
    passed = []

    def read(start: int, stop: int) -> Floats32:
        passed.append(stop - start)
        return values[start:stop]

    found = kth_magnitude(read, MANY, ranks)
    assert found == tuple(by_numpy(values, k) for k in ranks)
    assert sum(passed) < 1.05 * MANY


def test_ordinary_values_need_no_second_pass() -> None:
    for make in (normal, sparse, bfloats, rising):
        values = make(MANY)
        found = selection._bracketed(over(values), MANY, [kept(0.1, MANY)], 2**16)
        assert found is not None


def test_too_many_close_values_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MOST_COLLECTED", 1000)
    values = normal(MANY)
    assert selection._bracketed(over(values), MANY, [MANY // 2], 2**16) is None
    assert kth_magnitude(over(values), MANY, MANY // 2) == by_numpy(values, MANY // 2)


@pytest.mark.parametrize("density", [0.2, 1 / 3, 0.5])
def test_equal_values_are_counted_rather_than_collected(
    monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    monkeypatch.setattr(selection, "MOST_COLLECTED", 100)
    close = equal(MANY)
    close[::2] = np.nextafter(close[::2], np.float32(1))
    for values in (equal(MANY), two_values(MANY), close):
        for rank in range(kept(density, MANY) - 1, kept(density, MANY) + 2):
            found = selection._bracketed(over(values), MANY, [rank], 2**16)
            assert found == (by_numpy(values, rank),)


def test_a_density_keeps_at_least_one() -> None:
    assert [kept(0.2, size) for size in (1, 4, 5, 10, 14)] == [1, 1, 1, 2, 2]
    assert kept(1.0, 7) == 7
