"""model_stock: mergekit's vectors, the ratio by whole tensors and by rows in float64."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldmerge.core.dtypes import Floats64
from coldmerge.core.errors import ConfigError
from tests.merging.oracles import cases, check, ours
from tests.merging.problems import Problem, close, close_by_tensor, problems, reversed_order, run
from tests.merging.sources import merged

quick = settings(max_examples=40, deadline=None)
plain = ("random", "zero", "same", "lattice", "absent", "tiny")


def stock(taus: Floats64) -> Floats64:
    """t·mean(τ) of each vector along the last axis."""
    count, cosines = len(taus), []
    for a, b in combinations(taus, 2):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines.append(np.clip((a * b).sum(-1) / np.maximum(lengths, 1e-6), -1, 1))
    cosine = np.mean(cosines, axis=0)
    below = 1 + (count - 1) * cosine
    zero = np.abs(below) < 1e-6
    ratio = np.where(zero, 0, count * cosine / np.where(zero, 1, below))
    found: Floats64 = ratio[..., None] * taus.mean(axis=0)
    return found


@pytest.mark.parametrize("case", cases("model_stock"), ids=lambda case: case["name"])
def test_model_stock_is_mergekits(case: dict[str, Any]) -> None:
    check(case, ours(case))


@quick
@given(problems(2, kinds=plain), st.booleans())
def test_model_stock_is_the_formula(problem: Problem, rows: bool) -> None:
    found = run("model_stock", problem, {"filter_wise": rows})

    def reference(base: Floats64, taus: Floats64) -> Floats64:
        if rows:
            return base + stock(taus)
        return base + stock(taus.reshape(len(taus), -1)).reshape(base.shape)

    close_by_tensor(found, problem, reference, 1e-6)


@quick
@given(problems(2, 5, plain), st.booleans())
def test_the_order_of_the_models_is_nothing(problem: Problem, rows: bool) -> None:
    turned = reversed_order(problem)
    found = merged("model_stock", problem.base, problem.taus, {"filter_wise": rows})
    other = merged("model_stock", turned.base, turned.taus, {"filter_wise": rows})
    for name, values in found.items():
        close(values, other[name], 1e-6)


def test_equal_models_are_kept_and_unrelated_ones_are_not() -> None:
    base = {"w": np.zeros((2, 2), np.float32)}
    same = merged("model_stock", base, [{"w": [[1, 2], [3, 4]]}] * 3)["w"]
    np.testing.assert_allclose(same, [[1, 2], [3, 4]], rtol=1e-6)
    taus = [{"w": [[1, 0], [2, 2]]}, {"w": [[0, 1], [2, 2]]}]
    rows = merged("model_stock", base, taus, {"filter_wise": True})["w"]
    np.testing.assert_allclose(rows, [[0, 0], [2, 2]], rtol=1e-6, atol=1e-12)


def test_opposed_models_leave_the_base() -> None:
    base = {"w": np.ones(3, np.float32)}
    found = merged("model_stock", base, [{"w": [1, 2, 3]}, {"w": [-1, -2, -3]}])["w"]
    np.testing.assert_array_equal(found, [1, 1, 1])


@pytest.mark.parametrize("rows", [False, True])
def test_one_model_has_no_cosine(rows: bool) -> None:
    with pytest.raises(ConfigError) as refused:
        merged("model_stock", {"w": np.ones(2)}, [{"w": [1, 2]}], {"filter_wise": rows})
    assert refused.value.code == "merge.input_count"
