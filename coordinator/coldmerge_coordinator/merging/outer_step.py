"""The outer optimizer's step over the tensors of a merge: slots among the blobs, old and new."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from coldmerge.core.algebra import round_once
from coldmerge.core.documents import TensorEntry
from coldmerge.core.dtypes import BLOCK, Floats32, Floats64, as_bytes, blocks, size
from coldmerge.merging import Block, Job, Pool
from coldmerge.merging.outer import Outer
from coldmerge_coordinator.merging.likeness import Likeness
from coldmerge_coordinator.store.blobs import BlobStore, BlobWriter
from coldmerge_coordinator.store.states import OuterState

Moved = tuple[Floats32, dict[str, Floats32]]
"""A block of the new weights, and of every new slot."""


@dataclass(frozen=True)
class Place:
    """Where a merge happens: what it computes, on which threads, and who looks on."""

    job: Job
    pool: Pool
    likeness: Likeness


class OuterStep:
    """One step of an optimizer, from the state of the base release.

    A state of another optimizer is of no use: the step then starts afresh, and `note` says so.
    """

    def __init__(self, blobs: BlobStore, optimizer: Outer, state: OuterState | None) -> None:
        self.blobs, self.optimizer = blobs, optimizer
        self.before = OuterState(optimizer.state_name)
        self.note: str | None = None
        if state is not None and state.method == optimizer.state_name:
            self.before = state
        elif state is not None:
            self.note = (
                f"the outer optimizer was {state.method} and is {optimizer.state_name} now: "
                f"what it remembered of {state.steps} rounds is not used"
            )
        self._slots: dict[str, dict[str, str]] = {slot: {} for slot in optimizer.remembers}

    @property
    def number(self) -> int:
        """Counts the steps from 1."""
        return self.before.steps + 1

    def tensor(self, entry: TensorEntry, master: str) -> TensorStep:
        """The step over one tensor, whose fp32 master is the blob `master`."""
        return TensorStep(self, entry, master)

    def put(self, slot: str, name: str, sha256: str) -> None:
        """Note where a new slot is."""
        self._slots[slot][name] = sha256

    def after(self) -> OuterState | None:
        """The state after the step; None if the optimizer remembers nothing."""
        if not self._slots:
            return None
        return OuterState(self.optimizer.state_name, self.number, self._slots)


class TensorStep:
    """One tensor's step. A context manager: slots that were not committed are removed."""

    def __init__(self, step: OuterStep, entry: TensorEntry, master: str) -> None:
        self._step, self._entry, self._master = step, entry, master
        self._open = ExitStack()
        self._writers: dict[str, BlobWriter] = {
            slot: self._open.enter_context(step.blobs.writer()) for slot in step.optimizer.remembers
        }

    def blocks(self, place: Place) -> Iterator[Floats32]:
        """Blocks of the new weights from the first to the last; the slots are written beside.

        Raises:
            TaskVectorError: a result is NaN or infinite.
        """
        touched = self._entry.name in place.job.names
        moved = self._merged(place) if touched else self._untouched()
        for theta, slots in moved:
            for slot, values in slots.items():
                self._writers[slot].write(as_bytes(values))
            yield theta

    def _merged(self, place: Place) -> Iterator[Moved]:
        def move(block: Block, facts: Any) -> tuple[Floats64 | None, Moved]:
            delta = place.job.delta(block, facts)
            inner = place.likeness.of(block, delta)
            return inner, self._move(block.start, block.stop, delta)

        for inner, moved in place.job.in_order(self._entry.name, place.pool, move):
            place.likeness.add(inner)
            yield moved

    def _untouched(self) -> Iterator[Moved]:
        """No contribution touches it, and what the optimizer remembers goes on."""
        for start, stop in blocks(size(self._entry.shape), BLOCK):
            yield self._move(start, stop, np.zeros(stop - start))

    def _move(self, start: int, stop: int, merged: Floats32 | Floats64) -> Moved:
        step, name = self._step, self._entry.name
        theta = step.blobs.block(self._master, "F32", start, stop)
        held = {slot: self._held(slot, theta, start, stop) for slot in step.optimizer.remembers}
        tau = merged.astype(np.float64, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):  # `round_once` says it better
            delta, slots = step.optimizer.step(tau, theta, held, step.number)
            moved = np.add(delta, theta, dtype=np.float64)
        rounded = {slot: round_once(name, values) for slot, values in slots.items()}
        return round_once(name, moved), rounded

    def _held(self, slot: str, theta: Floats32, start: int, stop: int) -> Floats32:
        sha256 = self._step.before.slots.get(slot, {}).get(self._entry.name)
        if sha256 is None:
            return self._step.optimizer.fresh(slot, theta)
        return self._step.blobs.block(sha256, "F32", start, stop)

    def commit(self) -> None:
        """Make the slots durable."""
        for slot, writer in self._writers.items():
            self._step.put(slot, self._entry.name, writer.commit()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
