"""Iso-C and Iso-CTS against SVDs in float64; results agree to 2e-6 of the spectral norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats32, Floats64
from coldmerge.core.errors import ConfigError
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)
shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
cases = st.tuples(shapes, st.integers(1, 5), st.integers(0, 999))
Case = tuple[tuple[int, int], int, int]
METHODS = ("iso_c", "iso_cts")


def draw(case: Case) -> tuple[list[Floats32], list[float]]:
    """Task matrices and weights."""
    shape, count, seed = case
    rng = np.random.default_rng(seed)
    taus = [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
    return taus, list(rng.uniform(0.2, 2, count))


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def iso_c(taus: list[Floats32], weights: list[float]) -> Floats64:
    total = sum(torch.from_numpy(t).double() * w for t, w in zip(taus, weights, strict=True))
    u, s, v = svd(torch.as_tensor(total))
    merge: Floats64 = (s.mean() * u @ v).numpy()
    return merge


def iso_cts(taus: list[Floats32], weights: list[float], fraction: float) -> Floats64:
    wide = [torch.from_numpy(t).double() * w for t, w in zip(taus, weights, strict=True)]
    full, count = min(wide[0].shape), len(wide)
    single = min(round((full - int(full * fraction)) / count), full // count)
    common = full - single * count
    u, s, v = svd(torch.stack(wide).sum(0))
    lefts, values, rights = [u[:, :common]], [s[:common]], [v[:common]]
    for tau in wide:
        u1, s1, v1 = svd(tau - lefts[0] @ lefts[0].T @ tau)
        lefts.append(u1[:, :single])
        values.append(s1[:single])
        rights.append(v1[:single])
    a, _, b = svd(torch.cat(lefts, 1))
    c, _, d = svd(torch.cat(rights))
    merge: Floats64 = (torch.cat(values).mean() * a @ b @ c @ d).numpy()
    return merge


def run(
    method: str, taus: list[Floats32], weights: list[float] | None = None, **parameters: Any
) -> Floats32:
    each = [{"weight": weight} for weight in weights or [1.0] * len(taus)]
    base = {"w": np.zeros(taus[0].shape, np.float32)}
    return merged(method, base, [{"w": tau} for tau in taus], parameters, each)["w"]


def close(found: Floats32, expected: Floats64) -> None:
    scale = max(1e-9, float(np.linalg.norm(expected, 2)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


@quick
@given(cases)
def test_iso_c_is_that_of_an_svd_in_float64(case: Case) -> None:
    taus, weights = draw(case)
    close(run("iso_c", taus, weights), iso_c(taus, weights))
    close(run("iso_c", taus, weights, **{"lambda": 0.3}), 0.3 * iso_c(taus, weights))


@quick
@given(cases, st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
def test_iso_cts_is_that_of_svds_in_float64(case: Case, fraction: float) -> None:
    taus, weights = draw(case)
    found = run("iso_cts", taus, weights, common_space_fraction=fraction)
    close(found, iso_cts(taus, weights, fraction))


@pytest.mark.parametrize("shape", [(4, 5), (6, 3), (64, 160), (160, 64), (96, 96)])
@pytest.mark.parametrize("decades", [4, 5, 5.8])
def test_steep_spectra(shape: tuple[int, int], decades: float) -> None:
    """A Gram matrix squares the condition number: alone it would not give them."""
    rng = np.random.default_rng(1)
    u, _, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    steep = ((u * np.logspace(0, -decades, min(shape))) @ v).astype(np.float32)
    taus = [steep, 0.5 * steep, 2 * steep]
    close(run("iso_c", taus), iso_c(taus, [1, 1, 1]))


@quick
@given(cases, st.sampled_from(METHODS), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(case: Case, method: str, rng: Any) -> None:
    taus, weights = draw(case)
    pairs = list(zip(taus, weights, strict=True))
    rng.shuffle(pairs)
    other = run(method, [tau for tau, _ in pairs], [w for _, w in pairs])
    close(other, run(method, taus, weights).astype(np.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
def test_a_sum_of_low_rank_stays_so_and_keeps_its_nuclear_norm(
    method: str, shape: tuple[int, int]
) -> None:
    """float32 rounding fills the spectrum with dust, which must not be inflated."""
    rng = np.random.default_rng(2)
    factors = [(rng.standard_normal((shape[0], 2)), rng.standard_normal((2, shape[1])))] * 2
    factors.append((rng.standard_normal((shape[0], 1)), rng.standard_normal((1, shape[1]))))
    taus = [(b @ a).astype(np.float32) for b, a in factors]
    u, s, v = np.linalg.svd(np.sum(taus, axis=0, dtype=np.float64), full_matrices=False)
    close(run(method, taus), s[:3].mean() * u[:, :3] @ v[:3])


@pytest.mark.parametrize("method", METHODS)
def test_zero_opposed_and_single_element_matrices(method: str) -> None:
    zero = np.zeros((4, 6), np.float32)
    np.testing.assert_array_equal(run(method, [zero, zero]), zero)
    (tau,), _ = draw(((4, 6), 1, 7))
    assert np.isfinite(run(method, [tau, -tau])).all()
    one = np.full((1, 1), -2, np.float32)
    np.testing.assert_allclose(run(method, [one, 2 * one]), [[-6]], rtol=1e-6)
    row = np.array([[3, 4]], np.float32)
    np.testing.assert_allclose(run(method, [row]), row, rtol=1e-6)


def test_opposed_inputs_leave_nothing_in_common() -> None:
    (tau,), _ = draw(((4, 6), 1, 8))
    np.testing.assert_array_equal(run("iso_c", [tau, -tau]), np.zeros((4, 6)))


@pytest.mark.parametrize("method", [*METHODS, "tsv_m"])
def test_what_is_not_a_map_gets_the_mean(method: str) -> None:
    rng = np.random.default_rng(9)
    extents = {
        "bias": (6,),
        "conv.weight": (3, 2, 2, 2),
        "embeddings.word.weight": (8, 5),
        "lm_head.weight": (8, 5),
        "scalar": (),
        "empty": (0, 3),
    }
    base = {n: rng.standard_normal(e).astype(np.float32) for n, e in extents.items()}
    taus = [
        {n: rng.standard_normal(e).astype(np.float32) for n, e in extents.items()} for _ in range(3)
    ]
    each = [{"weight": weight} for weight in (1, 2, 0.5)]
    found = merged(method, base, taus, {"lambda": 0.5}, each)
    for name in extents:
        total = sum(
            t[name].astype(np.float64) * e["weight"] for t, e in zip(taus, each, strict=True)
        )
        expected = base[name] + 0.5 * total / 3.5
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
    maps = merged(method, base, taus, {"mean_for": []}, each)
    assert not np.allclose(maps["lm_head.weight"], merged("mean", base, taus)["lm_head.weight"])
    np.testing.assert_array_equal(
        maps["conv.weight"], merged(method, base, taus, {}, each)["conv.weight"]
    )


@pytest.mark.parametrize("method", [*METHODS, "tsv_m"])
def test_the_same_bits_with_one_and_two_threads(method: str) -> None:
    rng = np.random.default_rng(10)
    names = [f"layer.{i}.weight" for i in range(6)]
    base = {n: rng.standard_normal((70, 90)).astype(np.float32) for n in names}
    taus = [{n: rng.standard_normal((70, 90)).astype(np.float32) for n in names} for _ in range(3)]
    once, twice = (merged(method, base, taus, threads=threads) for threads in (1, 2))
    small = merged(method, base, taus, block=7)
    for name in names:
        np.testing.assert_array_equal(once[name], twice[name])
        np.testing.assert_array_equal(once[name], small[name])


@pytest.mark.parametrize(
    ("parameters", "each"),
    [({"common_space_fraction": 1.5}, {}), ({}, {"weight": 0}), ({"lamda": 1}, {})],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], each: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        merged("iso_cts", {"w": np.zeros((2, 2))}, [{"w": np.ones((2, 2))}], parameters, [each])
    assert caught.value.code == "merge.bad_parameter"
