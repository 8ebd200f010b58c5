"""Singular triples against numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest

from coldmerge.merging.linalg import polar, triples


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 4), (3, 1)])
@pytest.mark.parametrize("most", [None, 1, 2])
def test_triples_are_those_of_an_svd(shape: tuple[int, int], most: int | None) -> None:
    matrix = np.random.default_rng(1).standard_normal(shape)
    found = triples(matrix, most)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    count = min(most or 9, *shape)
    assert found.left.shape == (shape[0], count)
    assert found.right.shape == (count, shape[1])
    np.testing.assert_allclose(found.values, s[:count], rtol=1e-9)
    np.testing.assert_allclose(
        (found.left * found.values) @ found.right, (u[:, :count] * s[:count]) @ v[:count], atol=1e-9
    )
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(count), atol=1e-9)


def test_triples_own_no_more_memory_than_they_show() -> None:
    found = triples(np.random.default_rng(2).standard_normal((40, 60)), 2)
    assert found.left.base is None
    steep = np.diag(np.logspace(0, -5.5, 40))
    for part in (triples(steep, 39).left, triples(steep, 39).right):
        assert part.base is None


def test_values_that_are_rounding_or_not_above_do_not_exist() -> None:
    matrix = np.diag([2.0, 1e-3, 1e-7, 0.0])
    np.testing.assert_allclose(triples(matrix).values, [2, 1e-3])
    np.testing.assert_allclose(triples(matrix, above=0.5).values, [2])
    zero = triples(np.zeros((3, 2)))
    assert (zero.left.shape, zero.values.shape, zero.right.shape) == ((3, 0), (0,), (0, 2))
    np.testing.assert_array_equal(polar(np.zeros((3, 2))), np.zeros((3, 2)))
    np.testing.assert_allclose(polar(-3 * matrix), np.diag([-1.0, -1, 0, 0]), atol=1e-9)
