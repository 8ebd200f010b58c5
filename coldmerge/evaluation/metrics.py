"""Accuracy, macro-F1 and McNemar's counts, from integer labels alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coldmerge.core.documents import Mean, Scores
from coldmerge.core.errors import DataError

Labels = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PairedScores:
    """Two releases on the same `n` items.

    `gained`: items only the candidate got right; `lost`: items only the base got right. `means`
    and `slopes` are those that a round asked for: see `coldmerge.core.documents.Evaluation`.
    """

    n: int
    base: Scores
    candidate: Scores
    gained: int
    lost: int
    means: Mapping[Mean, float] = field(default_factory=dict)
    slopes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def accuracy(labels: Labels, predicted: Labels) -> float:
    """Share of items whose prediction equals the label. Both are int [n].

    Raises:
        DataError: no items, or the two differ in length.
    """
    labels, predicted = _checked(labels, predicted)
    return float(np.mean(labels == predicted))


def macro_f1(labels: Labels, predicted: Labels) -> float:
    """Mean F1 over the classes that occur among the labels. Both are int [n].

    A class that is only ever predicted has no F1 of its own: it counts through the
    recall of the classes it was mistaken for, so two releases are averaged over the
    same classes.

    Raises:
        DataError: no items, or the two differ in length.
    """
    labels, predicted = _checked(labels, predicted)
    classes, codes = np.unique(labels, return_inverse=True)
    place = np.minimum(np.searchsorted(classes, predicted), len(classes) - 1)
    known = classes[place] == predicted
    actual = np.bincount(codes, minlength=len(classes))
    guessed = np.bincount(place[known], minlength=len(classes))
    right = np.bincount(codes[labels == predicted], minlength=len(classes))
    return float(np.mean(2 * right / (actual + guessed)))


def scores(labels: Labels, predicted: Labels) -> Scores:
    """Both scores of one set of predictions."""
    return Scores(accuracy=accuracy(labels, predicted), macro_f1=macro_f1(labels, predicted))


def paired(labels: Labels, base: Labels, candidate: Labels) -> PairedScores:
    """Compare the predictions of base and candidate, each int [n], item by item.

    Raises:
        DataError: no items, or the three differ in length.
    """
    base_scores, candidate_scores = scores(labels, base), scores(labels, candidate)
    base_right, candidate_right = np.equal(labels, base), np.equal(labels, candidate)
    return PairedScores(
        n=len(labels),
        base=base_scores,
        candidate=candidate_scores,
        gained=int(np.sum(candidate_right & ~base_right)),
        lost=int(np.sum(base_right & ~candidate_right)),
    )


def _checked(labels: Labels, predicted: Labels) -> tuple[Labels, Labels]:
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise DataError(
            "evaluation.unpaired",
            "Labels and predictions do not belong to the same items.",
            expected=f"shape {labels.shape}",
            got=f"shape {predicted.shape}",
            hint="Let the trainer return one prediction per label.",
        )
    if labels.size == 0:
        raise DataError(
            "evaluation.no_items",
            "There is nothing to score.",
            hint="Check that the validation file has examples with text.",
        )
    return labels, predicted
