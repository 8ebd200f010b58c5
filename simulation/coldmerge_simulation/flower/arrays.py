"""Merging models that are in memory, as Flower's arrays are: the engine, and an outer optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coldmerge.core.algebra import round_once
from coldmerge.core.dtypes import Floats32, Floats64, as_bytes
from coldmerge.merging import Block, Input, Job, Pool
from coldmerge.merging.outer import Outer
from coldmerge.rounds.policy import MergePolicy
from coldmerge_coordinator.merging.recipes import outer_of, recipe_of
from coldmerge_simulation.flower.compat import Array, ArrayRecord


@dataclass(frozen=True)
class Weights:
    """A model between rounds: all arrays as clients see them, fp32 masters of the float ones.

    Task vectors are against what clients see, and are added to the masters. `slots`: what an
    outer optimizer remembers after `steps` steps.
    """

    arrays: Mapping[str, np.ndarray[Any, Any]]
    masters: Mapping[str, Floats32]
    slots: Mapping[str, Mapping[str, Floats32]] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def of(cls, record: ArrayRecord) -> Weights:
        """The model of an ArrayRecord."""
        arrays = {name: array.numpy() for name, array in record.items()}
        floats = {n: a for n, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
        return cls(arrays, {name: _flat(array) for name, array in floats.items()})

    def record(self) -> ArrayRecord:
        """It as an ArrayRecord."""
        return ArrayRecord({name: Array(array) for name, array in self.arrays.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""
        return tuple(self.arrays[name].shape)

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of a flattened array, as clients see it."""
        return _flat(self.arrays[name].reshape(-1)[start:stop])


class Trained:
    """One client's weights, as an input of a merge: its task vector is them minus the base."""

    base_digest = ""

    def __init__(self, base: Weights, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._base = base
        self._flat = {name: _flat(arrays[name]) for name in base.masters}
        self.names = frozenset(
            name for name in base.masters if not np.array_equal(arrays[name], base.arrays[name])
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""
        return self._base.shape(name)

    def theta(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the client's weights."""
        return self._flat[name][start:stop].copy()

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of its task vector."""
        return self._flat[name][start:stop] - self._base.block(name, start, stop)

    def digest(self) -> str:
        """sha256 of its weights: the order of the inputs, whoever answers first."""
        found = hashlib.sha256()
        for name in sorted(self._flat):
            found.update(as_bytes(self._flat[name]))
        return found.hexdigest()


def merge_arrays(
    base: Weights, inputs: Sequence[Input], policy: MergePolicy, threads: int | None = None
) -> Weights:
    """The base moved by the merged task vectors of `inputs`, whose sources are `Trained`.

    Arrays that are not floats stay as they are.

    Raises:
        ColdmergeError: the method cannot merge these; or a result is NaN or infinite.
    """
    optimizer, number = outer_of(policy), base.steps + 1
    ordered = sorted(inputs, key=lambda item: item.key)
    recipe = recipe_of(policy, [item.weight for item in ordered])
    job = Job(base, {name: base.shape(name) for name in base.masters}, ordered, recipe)
    step = _Step(job, base, optimizer, number)
    masters: dict[str, Floats32] = {}
    slots: dict[str, dict[str, Floats32]] = {slot: {} for slot in optimizer.remembers}
    with Pool(threads) as pool:
        job.survey(pool)
        for name in base.masters:
            touched = name in job.names
            parts = job.in_order(name, pool, step.move) if touched else [step.idle(name)]
            masters[name], moved = _joined(list(parts))
            for slot, values in moved.items():
                slots[slot][name] = values
    arrays = dict(base.arrays)
    for name, values in masters.items():
        arrays[name] = values.reshape(base.shape(name)).astype(base.arrays[name].dtype)
    return Weights(arrays, masters, slots, number)


Moved = tuple[Floats32, dict[str, Floats32]]


class _Step:
    """What becomes of masters and slots: the merged task vector, through the outer optimizer."""

    def __init__(self, job: Job, base: Weights, optimizer: Outer, number: int) -> None:
        self._job, self._base, self._optimizer, self._number = job, base, optimizer, number

    def move(self, block: Block, facts: Any) -> Moved:
        """Of one block."""
        tau = self._job.delta(block, facts).astype(np.float64, copy=False)
        return self._moved(block.name, block.start, block.stop, tau)

    def idle(self, name: str) -> Moved:
        """Of a tensor that nobody changed: what is remembered goes on."""
        count = self._base.masters[name].size
        return self._moved(name, 0, count, np.zeros(count))

    def _moved(self, name: str, start: int, stop: int, tau: Floats64) -> Moved:
        theta = self._base.masters[name][start:stop]
        held = {}
        for slot in self._optimizer.remembers:
            values = self._base.slots.get(slot, {}).get(name)
            if values is None:
                held[slot] = self._optimizer.fresh(slot, theta)
            else:
                held[slot] = values[start:stop]
        with np.errstate(over="ignore", invalid="ignore"):  # `round_once` says it better
            step, slots = self._optimizer.step(tau, theta, held, self._number)
            moved = np.add(theta, step, dtype=np.float64)
        new = {slot: round_once(name, values) for slot, values in slots.items()}
        return round_once(name, moved), new


def _joined(parts: Sequence[Moved]) -> Moved:
    slots = {slot: np.concatenate([new[slot] for _, new in parts]) for slot in parts[0][1]}
    return np.concatenate([values for values, _ in parts]), slots


def _flat(array: np.ndarray[Any, Any]) -> Floats32:
    return np.ascontiguousarray(array).reshape(-1).astype(np.float32)
