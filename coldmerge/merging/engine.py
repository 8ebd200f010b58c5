"""The merge engine: a recipe over blocks of task vectors, on all processors, in little memory.

Memory is O(threads × block × inputs), whatever the size of the model; a merger that needs
whole tensors gets one at a time, or several small ones (`ROOM`). The order of the inputs is
that of their keys and no value depends on which thread made it, so the same inputs give the
same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from coldmerge.core.algebra import round_once
from coldmerge.core.dtypes import Floats32, Floats64, blocks, size
from coldmerge.core.errors import ConfigError
from coldmerge.merging.block import Block, View
from coldmerge.merging.merger import Cut, Merger, Scope, Space, Values
from coldmerge.merging.pool import Pool
from coldmerge.merging.recipe import Recipe, Setting
from coldmerge.merging.shipped import check_density, check_shipped
from coldmerge.merging.sources import Input, Source

R = TypeVar("R")

UNIT = 4
"""Blocks that a thread takes at a time."""

AHEAD = 2
"""Blocks per thread that are made while those before them are used."""

ROOM = 2**23
"""Elements of whole tensors that may be at work at a time, or one tensor if it is larger."""


class Job:
    """One merge: a base, its inputs, and a recipe. It computes; writing is for others.

    `shapes` are those of the base's float tensors. `block` is the most elements of a block,
    in place of the merger's own number; no result depends on it.

    Raises:
        ConfigError: no input, or one key twice.
    """

    def __init__(
        self,
        base: Source,
        shapes: Mapping[str, tuple[int, ...]],
        inputs: Sequence[Input],
        recipe: Recipe,
        block: int | None = None,
    ) -> None:
        self.base, self._shapes, self._recipe = base, shapes, recipe
        self.inputs = in_order(inputs)
        self._block = block
        self._global_facts: dict[Merger, Any] = {}
        self._room = _Room(max(ROOM, self.largest_whole))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_room"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._room = _Room(max(ROOM, self.largest_whole))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that an input changes, sorted: all others stay as they are."""
        touched = frozenset[str]().union(*(item.source.names for item in self.inputs))
        return tuple(sorted(touched))

    def setting(self, name: str) -> Setting:
        """How tensor `name` is merged."""
        return self._recipe.setting(name)

    def size(self, name: str) -> int:
        """Number of elements of tensor `name`."""
        return size(self._shapes[name])

    def cuts(self, name: str) -> list[tuple[int, int]]:
        """The ranges [start, stop) that tensor `name` is merged in."""
        shape, cut = self._shapes[name], self._cut(name)
        most = self._block or self.setting(name).merger.block
        if cut is Cut.WHOLE:
            most = size(shape)
        elif cut is Cut.ROWS:
            row = size(shape[1:]) if len(shape) > 1 else size(shape)
            most = max(1, most // max(1, row)) * row
        return list(blocks(size(shape), max(1, most)))

    def block(self, name: str, start: int, stop: int) -> Block:
        """Elements [start, stop) of every input."""
        setting = self.setting(name)
        place = (name, self._shapes[name], start, stop)
        return Block(self.base, self.inputs, setting.each, setting.merger.space, place)

    def survey(self, pool: Pool) -> None:
        """Look at the whole model where a merger must. Call it before `facts`.

        Raises:
            ConfigError: parameters of a global scope vary between tensors.
        """
        for merger, names in self._by_merger().items():
            if merger.scope is Scope.GLOBAL:
                self._check_one_setting(merger, names)
                self._global_facts[merger] = merger.measure(View(self, names, pool))

    def check_statistics(self) -> None:
        """Check that inputs ship what mergers need for every tensor.

        A round does without this check: there a tensor that lacks a statistic gets the mean,
        so that no contributor can stop the others.

        Raises:
            ConfigError: an input lacks a statistic.
        """
        for merger, names in self._by_merger().items():
            for kind in sorted(merger.needs):
                check_shipped(self.inputs, names, kind)
            if "trim" in merger.needs:
                for name in names:
                    check_density(self.inputs, self.setting(name).each)

    def _by_merger(self) -> dict[Merger, list[str]]:
        groups: dict[Merger, list[str]] = {}
        for name in self.names:
            groups.setdefault(self.setting(name).merger, []).append(name)
        return groups

    def _check_one_setting(self, merger: Merger, names: Sequence[str]) -> None:
        if len({self.setting(name).each for name in names}) > 1:
            raise ConfigError(
                "merge.scope_and_gradient",
                f"{merger.name} with a global scope has one set of parameters for all tensors.",
                expected="plain numbers",
                got="a gradient or filter over tensors",
                hint="Use `scope: tensor`, or give each parameter one value.",
            )

    def facts(self, name: str, pool: Pool) -> Any:
        """What the merger must know about tensor `name` before its first block."""
        merger = self.setting(name).merger
        if merger in self._global_facts:
            return self._global_facts[merger]
        return merger.measure(View(self, [name], pool))

    def delta(self, block: Block, facts: Any) -> Floats32 | Floats64:
        """The merged delta of a block against the base, shape (block.size,)."""
        with np.errstate(over="ignore", invalid="ignore"):  # `round_once` says it better
            values = self._merged(block, facts)
            if self.setting(block.name).merger.space is Space.WEIGHTS:
                values = np.subtract(values, block.base, dtype=np.float64)
        return values

    def _merged(self, block: Block, facts: Any) -> Values:
        merger = self.setting(block.name).merger
        values = merger.merge(block, facts)
        if values.shape != (block.size,):  # one value would silently become all of them
            raise ConfigError(
                "merge.wrong_shape",
                f"The merge method {merger.name} gave another shape than its block has.",
                expected=(block.size,),
                got=values.shape,
                hint="Tell the method's author: `merge` gives one value for each element.",
                tensor=block.name,
            )
        return values

    def theta(self, block: Block, facts: Any, onto: Source | None = None) -> Floats32:
        """The merged weights of a block, float32, rounded once from float64.

        The merged delta is added to `onto` (an fp32 master), by default to the base.

        Raises:
            TaskVectorError: a value is NaN or infinite.
        """
        merger = self.setting(block.name).merger
        if onto is None and merger.space is Space.WEIGHTS:
            with np.errstate(over="ignore", invalid="ignore"):
                return round_once(block.name, self._merged(block, facts))
        ground = block.base if onto is None else onto.block(block.name, block.start, block.stop)
        return round_once(block.name, np.add(self.delta(block, facts), ground, dtype=np.float64))

    def tensor(
        self,
        name: str,
        pool: Pool,
        put: Callable[[int, Floats32], None],
        onto: Source | None = None,
    ) -> None:
        """Merge one tensor: `put(start, values)` is called for each block, from any thread."""
        with self._room.take(self._whole(name)):
            facts = self.facts(name, pool)
            cuts = self.cuts(name)

            def unit(ranges: Sequence[tuple[int, int]]) -> None:
                for start, stop in ranges:
                    put(start, self.theta(self.block(name, start, stop), facts, onto))

            pool.spread(unit, [cuts[at : at + UNIT] for at in range(0, len(cuts), UNIT)])

    def in_order(self, name: str, pool: Pool, make: Callable[[Block, Any], R]) -> Iterator[R]:
        """Yield `make(block, facts)` for the blocks of one tensor, from the first to the last.

        Other threads make the next blocks meanwhile; close the iterator to be rid of them.
        """
        with self._room.take(self._whole(name)):
            facts = self.facts(name, pool)
            cuts = self.cuts(name)
            step = AHEAD * pool.threads
            groups = (cuts[at : at + step] for at in range(0, len(cuts), step))
            made = pool.spread_ahead(lambda cut: make(self.block(name, *cut), facts), groups)
            with closing(made):
                for group in made:
                    yield from group

    @property
    def largest_whole(self) -> int:
        """Elements of the largest tensor that a merger needs whole; 0 when none does."""
        return max((self._whole(name) for name in self.names), default=0)

    def _whole(self, name: str) -> int:
        return self.size(name) if self._cut(name) is Cut.WHOLE else 0

    def _cut(self, name: str) -> Cut:
        return self.setting(name).merger.cut_for(name, self._shapes[name])


class _Room:
    """Bounds how many elements of whole tensors are at work at a time."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, elements: int) -> Iterator[None]:
        if elements == 0:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._taken + elements <= self._elements)
            self._taken += elements
        try:
            yield
        finally:
            with self._changed:
                self._taken -= elements
                self._changed.notify_all()


def in_order(inputs: Sequence[Input]) -> list[Input]:
    """The inputs sorted by key.

    Raises:
        ConfigError: no input, or one key twice.
    """
    ordered = sorted(inputs, key=lambda item: item.key)
    keys = [item.key for item in ordered]
    if not ordered or len(set(keys)) != len(keys):
        raise ConfigError(
            "merge.inputs" if not ordered else "merge.duplicate_input",
            "A merge was given the same input twice." if ordered else "A merge has no input.",
            expected="at least one input, each once",
            got=next((key for key in keys if keys.count(key) > 1), "none"),
            hint="Give each manifest digest once; use weights to count one more.",
        )
    return ordered
