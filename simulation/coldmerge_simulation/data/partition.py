"""What a partitioner is: it deals the examples of one task to the contributors that hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import model_serializer

from coldmerge_client.training.config import Settings

GROUP = "coldmerge.partitioners"
"""The entry point group where other packages register a `Partitioner`."""

Row = Mapping[str, Any]
Parts = list[list[int]]
"""For each contributor the positions of its rows; no position twice."""

LEAST = 3
"""Examples a contributor needs: of two labels to train on, and a second one of either, which
validates."""


@dataclass(frozen=True)
class Pool:
    """The examples of one task.

    Attributes:
        task: the task's name.
        rows: the examples, as the lines of the source's files.
        labels: int64 [rows], the position of each row's label among the sorted labels.

    """

    task: str
    rows: Sequence[Row]
    labels: NDArray[np.int64]


class Partitioner(Settings, ABC):
    """A way of dealing. Fields are its parameters: the keys beside `by` in `data.partition`."""

    name: ClassVar[str]

    @abstractmethod
    def deal(self, pool: Pool, count: int, draw: np.random.Generator) -> Parts:
        """Deal the rows of `pool` to `count` contributors; rows may be left over.

        Every contributor needs `LEAST` rows and two labels: `deal_again` gives them. The
        same `draw` always gives the same parts.
        """

    @model_serializer(mode="wrap")
    def _with_its_name(self, values: Any) -> dict[str, Any]:
        return {"by": self.name, **values(self)}


def serves(counts: Mapping[int, int]) -> bool:
    """Whether examples, so many of each label, can be trained on and validated with."""
    held = [count for count in counts.values() if count > 0]
    return len(held) >= 2 and max(held) >= 2


def deal_again(parts: Parts, labels: NDArray[np.int64], minimum: int = LEAST) -> Parts:
    """Parts of at least `minimum` rows that each `serves`, with as few moves as that takes.

    Rows come from the largest part, of the label it holds most of; a part that does not
    serve swaps one row. Where that cannot be had, the parts stay as they are.
    """
    found = [list(part) for part in parts]
    if sum(map(len, found)) < minimum * len(found):
        return found
    while len(min(found, key=len)) < minimum:
        rich, poor = max(found, key=len), min(found, key=len)
        most = _counts(rich, labels).most_common()
        poor.append(rich.pop(_place_of(rich, labels, min((-n, label) for label, n in most)[1])))
    for part in found:
        if not serves(_counts(part, labels)):
            _swap_one(part, found, labels)
    return found


def _counts(part: list[int], labels: NDArray[np.int64]) -> Counter[int]:
    return Counter(int(labels[position]) for position in part)


def _place_of(part: list[int], labels: NDArray[np.int64], label: int) -> int:
    return max(place for place, position in enumerate(part) if labels[position] == label)


def _swap_one(part: list[int], parts: Parts, labels: NDArray[np.int64]) -> None:
    """Swap a row of `part` for one of another part, if both of them serve afterwards."""
    mine = _counts(part, labels)
    for donor in sorted(parts, key=len, reverse=True):
        theirs = _counts(donor, labels)
        for given, taken in product(sorted(mine), sorted(theirs)):
            trade = Counter({taken: 1})
            trade[given] -= 1
            after = [mine.copy(), theirs.copy()]
            after[0].update(trade)
            after[1].subtract(trade)
            if donor is not part and all(map(serves, after)):
                here, there = _place_of(part, labels, given), _place_of(donor, labels, taken)
                part[here], donor[there] = donor[there], part[here]
                return
