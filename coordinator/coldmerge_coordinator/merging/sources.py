"""What the merge of a round reads: tensors among the blobs, and task vectors that beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coldmerge.core.dtypes import Floats32
from coldmerge.core.task_vector import TaskVector
from coldmerge_coordinator.store.blobs import BlobStore

Beat = Callable[[], None]
"""Called while work goes on; it raises when the work shall end."""


class Blobs:
    """Float tensors read a block at a time: name → (sha256 of the blob, its type)."""

    def __init__(self, blobs: BlobStore, tensors: Mapping[str, tuple[str, str]]) -> None:
        self._blobs, self._tensors = blobs, tensors

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened tensor: a fresh array, or a read-only one."""
        return self._blobs.block(*self._tensors[name], start, stop)


class Beating:
    """A task vector that calls `beat` at each read: no pass over the inputs goes unwatched."""

    def __init__(self, vector: TaskVector, beat: Beat) -> None:
        self._vector, self._beat = vector, beat
        self.base_digest, self.names = vector.base_digest, vector.names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the delta of `name`."""
        return self._vector.shape(name)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened delta of `name`."""
        self._beat()
        return self._vector.block(name, start, stop)

    def has_statistic(self, name: str, kind: str) -> bool:
        """Whether the statistic of tensor `name` was shipped."""
        return self._vector.has_statistic(name, kind)

    def statistic(self, name: str, kind: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened statistic of tensor `name`."""
        self._beat()
        return self._vector.statistic(name, kind, start, stop)
