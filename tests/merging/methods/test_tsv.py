"""TSV-M against an SVD in float64; results agree to 2e-6 of the largest singular value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
cases = st.tuples(shapes, st.integers(1, 5), st.integers(0, 999))


def draw(case: tuple[tuple[int, int], int, int]) -> tuple[Floats32, list[Floats32], list[float]]:
    """A base of zeros, task matrices and weights."""
    shape, count, seed = case
    rng = np.random.default_rng(seed)
    taus = [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
    return np.zeros(shape, np.float32), taus, list(rng.uniform(0.2, 2, count))


def reference(taus: list[Floats32], weights: list[float]) -> Floats64:
    most = max(1, min(taus[0].shape) // len(taus))
    lefts, values, rights = [], [], []
    for tau, weight in zip(taus, weights, strict=True):
        u, s, v = torch.linalg.svd(torch.from_numpy(tau).double() * weight, full_matrices=False)
        lefts.append(u[:, :most])
        values.append(s[:most])
        rights.append(v[:most])
    u1, _, v1 = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    u2, _, v2 = torch.linalg.svd(torch.cat(rights), full_matrices=False)
    product: Floats64 = (u1 @ v1 @ torch.diag(torch.cat(values)) @ u2 @ v2).numpy()
    return product


def close(found: Floats32, expected: Floats64) -> None:
    scale = max(1e-9, float(np.linalg.norm(expected, 2)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


def run(taus: list[Floats32], weights: list[float] | None = None, **parameters: Any) -> Floats32:
    each = [{"weight": weight} for weight in weights or [1.0] * len(taus)]
    base = {"w": np.zeros(taus[0].shape, np.float32)}
    return merged("tsv_m", base, [{"w": tau} for tau in taus], parameters, each)["w"]


@quick
@given(cases)
def test_it_is_that_of_an_svd_in_float64(case: tuple[tuple[int, int], int, int]) -> None:
    _, taus, weights = draw(case)
    close(run(taus, weights), reference(taus, weights))
    close(run(taus, weights, **{"lambda": -0.5}), -0.5 * reference(taus, weights))


@quick
@given(cases, st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(
    case: tuple[tuple[int, int], int, int], rng: Any
) -> None:
    _, taus, weights = draw(case)
    pairs = list(zip(taus, weights, strict=True))
    rng.shuffle(pairs)
    close(run([tau for tau, _ in pairs], [w for _, w in pairs]), run(taus, weights).astype(float))


def test_what_identical_inputs_share_is_not_doubled() -> None:
    _, (tau,), _ = draw(((9, 6), 1, 3))
    u, s, v = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    close(run([tau] * 3), (u[:, :2] * s[:2]) @ v[:2])


def test_one_input_alone_is_itself() -> None:
    _, (tau,), _ = draw(((7, 11), 1, 4))
    close(run([tau]), tau.astype(np.float64))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_an_input_of_zeros_takes_its_share_of_directions_but_adds_none(
    shape: tuple[int, int],
) -> None:
    _, (tau,), _ = draw((shape, 1, 5))
    zero = np.zeros(shape, np.float32)
    u, s, v = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ v[:2]
    close(run([tau, zero]), expected)
    base = {"w": zero, "v": np.zeros(3, np.float32)}
    untouched = merged("tsv_m", base, [{"w": tau}, {"v": np.ones(3)}])
    close(untouched["w"], expected)
    np.testing.assert_array_equal(run([zero, zero]), zero)


def test_low_rank_inputs_fill_no_direction_that_they_do_not_have() -> None:
    rng = np.random.default_rng(6)
    taus = [
        (rng.standard_normal((20, 1)) @ rng.standard_normal((1, 30))).astype(np.float32)
        for _ in range(2)
    ]
    merge = run(taus).astype(np.float64)
    values = np.linalg.svd(merge, compute_uv=False)
    norms = sorted((float(np.linalg.norm(tau)) for tau in taus), reverse=True)
    np.testing.assert_allclose(values[:2], norms, rtol=1e-5)
    assert values[2] < 1e-5 * values[0]
