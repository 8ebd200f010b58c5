"""What a round's task vectors look like beside each other: cosines, and hints for a person.

Hints never decide anything. Honest contributors with alike data are alike, those with
other tasks are nearly orthogonal, and whoever wants to go unnoticed adds some noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coldmerge.core.dtypes import Floats64
from coldmerge.screening.policy import ScreeningPolicy

SAME = 1 - 1e-6
"""Cosine from which two vectors are the same up to their length and to rounding."""

DIGITS = 6


@dataclass(frozen=True)
class Screened:
    """One input of a merge. `norm` is that of the task vector as it was sent."""

    manifest: str
    contributor: str
    norm: float
    factor: float


@dataclass(frozen=True)
class Inner:
    """Inner products of a merge's inputs, and of the merged vector in the last row and column.

    `keys` are the inputs' content keys, in order; `matrix` is float64 (N + 1, N + 1), over one in
    `step` elements.
    """

    keys: tuple[str, ...]
    matrix: Floats64
    step: int


def cosines(matrix: Floats64) -> Floats64:
    """Cosines from inner products, of the same shape; 0 where a vector is zero."""
    lengths = np.sqrt(np.diagonal(matrix))
    found = np.zeros_like(matrix)
    np.divide(matrix, np.outer(lengths, lengths), out=found, where=np.outer(lengths, lengths) > 0)
    clipped: Floats64 = np.clip(found, -1.0, 1.0)
    return clipped


def report(
    inputs: Sequence[Screened], inner: Inner | None, policy: ScreeningPolicy
) -> dict[str, Any]:
    """JSON-ready: every input with its norm and factor, and if known cosines, pairs and hints.

    `inputs` are in the order of `inner`'s rows.
    """
    if inner is None:
        return {"inputs": [asdict(item) for item in inputs], "sampled": None, "hints": []}
    found = cosines(inner.matrix)
    rows = [
        {
            **asdict(item),
            "cosine_to_merged": _rounded(found[at, -1]),
            "mean_cosine_to_others": _rounded(_to_others(found, at)),
        }
        for at, item in enumerate(inputs)
    ]
    return {
        "inputs": rows,
        "cosines": [[_rounded(value) for value in row[:-1]] for row in found[:-1]],
        "merged_norm": float(math.sqrt(inner.matrix[-1, -1] * inner.step)),
        "sampled": inner.step,
        "hints": [*_alike(inputs, found, policy), *_against(inputs, found, policy)],
    }


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)


def _to_others(found: Floats64, at: int) -> float:
    others = [found[at, other] for other in range(len(found) - 1) if other != at]
    return math.fsum(others) / len(others) if others else 0.0


def _alike(
    inputs: Sequence[Screened], found: Floats64, policy: ScreeningPolicy
) -> list[dict[str, Any]]:
    """A hint for every group of inputs that are linked by cosines above `warn_above`."""
    hints = []
    for group in _groups(found[:-1, :-1] > policy.warn_above):
        least = min(found[i, j] for i in group for j in group if i != j)
        norms = [inputs[i].norm for i in group]
        kind, text = "near_copies", "nearly the same task vector"
        if least >= SAME:
            one = max(norms) <= min(norms) * (1 + 1e-6)
            kind = "copies" if one else "scaled_copies"
            text = "the same task vector" if one else "one task vector in several lengths"
        names = [inputs[i].contributor for i in group]
        hints.append(
            {
                "kind": kind,
                "contributors": names,
                "cosine": _rounded(least),
                "text": f"{', '.join(names)} sent {text} (cosine {least:.4f}): one sender, "
                "or one data set, under several names?",
            }
        )
    return hints


def _groups(linked: np.ndarray[Any, np.dtype[np.bool_]]) -> list[list[int]]:
    """The connected components of more than one, each in order."""
    left, groups = set(range(len(linked))), []
    while left:
        group, todo = set[int](), [min(left)]
        while todo:
            at = todo.pop()
            if at not in group:
                group.add(at)
                todo += [other for other in sorted(left - group) if linked[at, other]]
        left -= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def _against(
    inputs: Sequence[Screened], found: Floats64, policy: ScreeningPolicy
) -> list[dict[str, Any]]:
    hints = []
    for at, item in enumerate(inputs):
        mean = _to_others(found, at)
        if len(inputs) > 1 and mean < policy.warn_below:
            hints.append(
                {
                    "kind": "against_the_others",
                    "contributors": [item.contributor],
                    "cosine": _rounded(mean),
                    "text": f"{item.contributor} points away from the others (mean cosine "
                    f"{mean:.4f}): a flipped sign, or a task that contradicts theirs?",
                }
            )
    return hints
