"""What a merger sees: one block of every input, and views to walk before the first block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from coldmerge.core.dtypes import Floats32, Floats64, size
from coldmerge.core.errors import TaskVectorError
from coldmerge.merging.merger import PerInput, Space
from coldmerge.merging.pool import Pool
from coldmerge.merging.sources import Input, Source, Statistics, ships

if TYPE_CHECKING:
    from coldmerge.merging.engine import Job

R = TypeVar("R")


class Block:
    """Elements [start, stop) of the flattened tensor `name`, of every input of a merge.

    `rows` are τ or θ as the merger's `space` says. Every array is the caller's own: it may
    be changed in place, `base` excepted.
    """

    def __init__(
        self,
        base: Source,
        inputs: Sequence[Input],
        each: Sequence[PerInput],
        space: Space,
        place: tuple[str, tuple[int, ...], int, int],
    ) -> None:
        self._source, self._inputs, self._space = base, inputs, space
        self.each: Sequence[Any] = each
        """The parameters of each input: of the merger's own `Each` class."""
        self.name, self.tensor_shape, self.start, self.stop = place

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a block that was cut between rows; a vector is one row."""
        columns = size(self.tensor_shape[1:]) if len(self.tensor_shape) > 1 else self.size
        return (self.size // columns if columns else 0, columns)

    @property
    def keys(self) -> tuple[str, ...]:
        """The inputs' keys: what random numbers are seeded with."""
        return tuple(item.key for item in self._inputs)

    def label(self, i: int) -> str:
        """Input `i` as messages call it."""
        return str(self._inputs[i])

    @cached_property
    def weights(self) -> Floats64:
        """The inputs' weights, shape (N,)."""
        return np.array([each.weight for each in self.each], np.float64)

    @cached_property
    def base(self) -> Floats32:
        """The base's values, shape (size,), read once."""
        return self._source.block(self.name, self.start, self.stop)

    @property
    def touching(self) -> tuple[int, ...]:
        """Which inputs change this tensor at all; the others' τ is zero throughout."""
        return tuple(i for i, item in enumerate(self._inputs) if self.name in item.source.names)

    def row(self, i: int) -> Floats32:
        """The values of input `i`, shape (size,).

        Raises:
            TaskVectorError: one is NaN or infinite.
        """
        source = self._inputs[i].source
        if self.name not in source.names:
            zero = self._space is Space.DELTAS
            return np.zeros(self.size, np.float32) if zero else self.base.copy()
        theta = getattr(source, "theta", None)  # `isinstance(source, Weights)` takes 20 µs
        if theta is not None:
            values: Floats32 = theta(self.name, self.start, self.stop)
            if self._space is Space.DELTAS:
                with np.errstate(over="ignore", invalid="ignore"):
                    np.subtract(values, self.base, out=values)
        else:
            values = source.block(self.name, self.start, self.stop)
            if self._space is Space.WEIGHTS:
                values += self.base
        if not np.isfinite(values).all():
            raise self._not_finite(i)
        return values

    def rows(self) -> Iterator[tuple[int, Floats32]]:
        """(number, values) of the inputs that change this tensor, one at a time in memory."""
        for i in self.touching if self._space is Space.DELTAS else range(len(self._inputs)):
            yield i, self.row(i)

    def stack(self) -> Floats32:
        """All rows, shape (N, size): in memory at once."""
        stacked = np.empty((len(self._inputs), self.size), np.float32)
        for i in range(len(self._inputs)):
            stacked[i] = self.row(i)
        return stacked

    def ships(self, i: int, kind: str) -> bool:
        """Whether input `i` shipped the statistic `kind` about this tensor."""
        return ships(self._inputs[i], self.name, kind)

    def statistic(self, i: int, kind: str) -> Floats32:
        """What input `i` shipped about this tensor, if `ships` says that it did.

        `fisher` gives this block's elements, shape (size,); `gram` the whole (in, in)
        matrix; `trim` one value, shape (1,).

        Raises:
            TaskVectorError: a value is NaN or infinite.
        """
        source = cast(Statistics, self._inputs[i].source)
        side = self.tensor_shape[-1] if kind == "gram" else 1
        place = (self.start, self.stop) if kind == "fisher" else (0, side * side)
        found = source.statistic(self.name, kind, *place)
        if not np.isfinite(found).all():
            raise TaskVectorError(
                "merge.statistic_not_finite",
                f"The {kind} of tensor {self.name} of {self.label(i)} holds NaN or infinity.",
                expected="finite values",
                hint="Leave that input out, or let its contributor measure again.",
                tensor=self.name,
            )
        return found.reshape(side, side) if kind == "gram" else found

    def _not_finite(self, i: int) -> TaskVectorError:
        return TaskVectorError(
            "merge.input_not_finite",
            f"Tensor {self.name} of input {self._inputs[i]} holds NaN or infinity.",
            expected="finite values",
            hint="Leave that input out, or train it again with a smaller learning rate.",
            tensor=self.name,
            input=self._inputs[i],
        )


class View:
    """One tensor of a merge, or all of them end to end, walked as often as `measure` likes."""

    def __init__(self, job: Job, names: Sequence[str], pool: Pool) -> None:
        self._job, self._pool = job, pool
        self.names = tuple(names)
        starts = [0]
        for name in names:
            starts.append(starts[-1] + job.size(name))
        self._spans = list(zip(names, pairwise(starts), strict=True))
        self.size = starts[-1]
        """Elements of one input, over all tensors of the view."""
        self.each: Sequence[Any] = job.setting(names[0]).each if names else ()

    @property
    def inputs(self) -> range:
        """Numbers of the inputs."""
        return range(len(self.each))

    def blocks(self) -> Iterator[Block]:
        """Every block of the view, in order."""
        for name in self.names:
            for start, stop in self._job.cuts(name):
                yield self._job.block(name, start, stop)

    def map_blocks(self, function: Callable[[Block], R]) -> list[R]:
        """`[function(block) for block in view.blocks()]`, on all threads of the merge."""
        places = [(name, *cut) for name in self.names for cut in self._job.cuts(name)]
        return self._pool.spread(lambda place: function(self._job.block(*place)), places)

    def map_inputs(self, function: Callable[[int], R]) -> list[R]:
        """`[function(i) for i in view.inputs]`, on all threads of the merge."""
        return self._pool.spread(function, self.inputs)

    def shipped(self, i: int, kind: str) -> Floats32 | None:
        """A statistic that input `i` shipped about a view of one tensor."""
        block = self._job.block(self.names[0], 0, 0)
        return block.statistic(i, kind) if block.ships(i, kind) else None

    def between(self, start: int, stop: int) -> list[Block]:
        """The blocks, one of each tensor, that hold elements [start, stop) of the view."""
        return [
            self._job.block(name, max(start, first) - first, min(stop, last) - first)
            for name, (first, last) in self._spans
            if max(start, first) < min(stop, last)
        ]
