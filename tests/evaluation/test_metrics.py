from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from coldmerge.core.errors import DataError
from coldmerge.evaluation import accuracy, macro_f1, paired

items = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40
)


@given(items)
def test_scores_agree_with_scikit_learn(rows: list[tuple[int, int, int]]) -> None:
    labels, predicted, _ = np.array(rows).T
    assert accuracy(labels, predicted) == pytest.approx(accuracy_score(labels, predicted))
    expected = f1_score(
        labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
    )
    assert macro_f1(labels, predicted) == pytest.approx(expected)


@given(items)
def test_gained_minus_lost_is_the_change_in_correct_items(rows: list[tuple[int, int, int]]) -> None:
    labels, base, candidate = np.array(rows).T
    result = paired(labels, base, candidate)
    assert result.n == len(rows)
    assert result.candidate.accuracy - result.base.accuracy == pytest.approx(
        (result.gained - result.lost) / result.n
    )
    swapped = paired(labels, candidate, base)
    assert (swapped.gained, swapped.lost) == (result.lost, result.gained)


def test_perfect_and_hopeless() -> None:
    labels = np.array([0, 1, 2])
    assert (accuracy(labels, labels), macro_f1(labels, labels)) == (1.0, 1.0)
    assert (accuracy(labels, labels + 9), macro_f1(labels, labels + 9)) == (0.0, 0.0)


def test_items_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        accuracy(np.array([0, 1]), np.array([0]))
    assert caught.value.code == "evaluation.unpaired"
    with pytest.raises(DataError) as caught:
        macro_f1(np.array([], dtype=int), np.array([], dtype=int))
    assert caught.value.code == "evaluation.no_items"
