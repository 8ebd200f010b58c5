"""What a partitioner is: it deals the examples of one task to the contributors that hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Examples a contributor needs: two labels to train on, and one to validate with."""


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


def deal_again(parts: Parts, labels: NDArray[np.int64], minimum: int = LEAST) -> Parts:
    """Parts of at least `minimum` rows and two labels each, with as few moves as that takes.

    Rows come from the largest part, of the label it holds most of; a part of one label
    swaps one row. Where that cannot be had, the parts stay as they are.
    """
    found = [list(part) for part in parts]
    if sum(map(len, found)) < minimum * len(found):
        return found
    while len(min(found, key=len)) < minimum:
        rich, poor = max(found, key=len), min(found, key=len)
        poor.append(rich.pop(_place_of(rich, labels, _most_held(rich, labels))))
    for part in found:
        if len({int(labels[position]) for position in part}) == 1:
            _swap_one(part, found, labels)
    return found


def _most_held(part: list[int], labels: NDArray[np.int64]) -> int:
    counts = Counter(int(labels[position]) for position in part)
    return min(counts, key=lambda label: (-counts[label], label))


def _place_of(part: list[int], labels: NDArray[np.int64], label: int) -> int:
    return max(place for place, position in enumerate(part) if labels[position] == label)


def _swap_one(part: list[int], parts: Parts, labels: NDArray[np.int64]) -> None:
    """Give `part`, all of one label, a row of another for one of its own."""
    own = int(labels[part[0]])
    for donor in sorted(parts, key=len, reverse=True):
        counts = Counter(int(labels[position]) for position in donor if labels[position] != own)
        # Afterwards the donor must still show two labels, of which `own` is one.
        if donor is not part and sum(counts.values()) >= 2:
            given = min(counts, key=lambda label: (-counts[label], label))
            place = _place_of(donor, labels, given)
            donor[place], part[-1] = part[-1], donor[place]
            return
