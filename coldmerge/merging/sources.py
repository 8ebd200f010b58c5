"""What goes into a merge: task vectors, and fine-tuned models read as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from coldmerge.core.algebra import Delta
from coldmerge.core.dtypes import Floats32


class Source(Protocol):
    """Anything that gives float32 blocks of named tensors: a checkpoint, a master."""

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened tensor: a fresh array (stop - start,)."""
        ...


@runtime_checkable
class Weights(Protocol):
    """A source whose own values are the weights θ: subtracting the base is left to the reader."""

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened fine-tuned tensor: a fresh array."""
        ...


class Statistics(Protocol):
    """A source that carries statistics of its contributor's data beside its deltas."""

    def has_statistic(self, name: str, kind: str) -> bool:
        """Whether the statistic of tensor `name` was shipped."""
        ...

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened statistic of tensor `name`."""
        ...


@dataclass(frozen=True)
class Input:
    """One input of a merge.

    `key` fixes its place in the order (a manifest digest, a position in a plan); `label`
    is its name in messages.
    """

    key: str
    source: Delta
    weight: float = 1.0
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.key[:12]


def ships(item: Input, name: str, kind: str) -> bool:
    """Whether an input carries the statistic `kind` of tensor `name`."""
    source = item.source
    return hasattr(source, "has_statistic") and bool(source.has_statistic(name, kind))
