"""The exact k-th largest magnitude of values that are read a block at a time.

A sample brackets the threshold, one pass counts what lies above the bracket and collects
what lies inside, and the few that were collected are partitioned. Where the sample misled
(clustered values, or thousands of equal ones) two passes of counting over the bits of the
floats give the same number, more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, sqrt
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from coldmerge.core.dtypes import Floats32, blocks

Read = Callable[[int, int], Floats32]
"""Elements [start, stop) as float32, shape (stop - start,)."""

STEP = 2**16
WHOLE = 2**18
RUN = 512
MOST_SAMPLED = 2**20
MOST_COLLECTED = 2**22
DEVIATIONS = 4.0
"""Half the bracket's width in standard errors: it misses about once in ten thousand tensors."""


def kept(density: float, size: int) -> int:
    """How many of `size` elements a density in (0, 1] keeps: at least one."""
    return max(1, int(density * size))


@overload
def kth_magnitude(read: Read, size: int, k: int, block: int = ...) -> np.float32: ...


@overload
def kth_magnitude(
    read: Read, size: int, k: Sequence[int], block: int = ...
) -> tuple[np.float32, ...]: ...


def kth_magnitude(
    read: Read, size: int, k: int | Sequence[int], block: int = STEP
) -> np.float32 | tuple[np.float32, ...]:
    """The k-th largest |x| of `size` finite elements; for several k, as many in one pass.

    1 <= k <= size. Exact: equal to `np.partition(np.abs(x), size - k)[size - k]`. Holds at
    most `block` elements, a sample and what the bracket collects: some megabytes whatever
    the size. `read` is asked for parts of the sample first, then for everything in order.
    """
    ranks = tuple(k) if isinstance(k, Sequence) else (int(k),)
    if size <= WHOLE:
        found = _partition(np.concatenate([read(*at) for at in blocks(size, block)]), ranks)
    else:
        found = _bracketed(read, size, ranks, block) or _counted(read, size, ranks, block)
    return found if isinstance(k, Sequence) else found[0]


def _partition(values: Floats32, ranks: Sequence[int]) -> tuple[np.float32, ...]:
    values = np.abs(values)
    places = [len(values) - rank for rank in ranks]
    values.partition(places)
    return tuple(values[place] for place in places)


class Seen(NamedTuple):
    """Of some elements: how many lie above a bracket's lower bound, and those within it."""

    over: int
    within: int
    values: Floats32
    counts: npt.NDArray[np.int64] | None = None
    """How often each of `values` occurs; None: once each."""


class Bracket:
    """A guess, from a sample, of bounds around the magnitude that a `share` of a stream reach.

    `look` at every element of the stream once, in parts, from any thread: what it saw, in
    any order, gives `find` the exact threshold. Holds at most MOST_COLLECTED elements.
    """

    def __init__(self, sample: Floats32, share: float) -> None:
        """`sample` holds magnitudes, shape (runs, RUN), from `sample_places`."""
        self._low, self._high = _bracket(sample, share)
        middle = np.nextafter(self._low, np.float32(np.inf))
        one = middle >= 0 and np.nextafter(middle, np.float32(np.inf)) == self._high
        self._only = middle if one else None
        self._collected = 0

    def look(self, magnitudes: Floats32) -> Seen:
        """What lies above the bracket and within it."""
        over = magnitudes > self._low
        total = int(np.count_nonzero(over))
        within = magnitudes < self._high
        within &= over
        if self._only is not None or self._collected > MOST_COLLECTED:
            return Seen(total, int(np.count_nonzero(within)), np.empty(0, np.float32))
        inside = magnitudes.compress(within)
        found = Seen(total, len(inside), inside)
        if len(inside) > len(magnitudes) // 64 and _few(inside[:64]):
            values, counts = np.unique(inside, return_counts=True)
            found = Seen(total, len(inside), values, counts)
        self._collected += len(found.values)
        return found

    def find(self, seen: Sequence[Seen], rank: int) -> np.float32 | None:
        """The rank-th largest magnitude; None where it was not collected."""
        total, held = sum(one.over for one in seen), sum(one.within for one in seen)
        place = rank - (total - held)
        if rank > total and self._low == 0:
            return np.float32(0)
        if not 1 <= place <= held:
            return None
        if self._only is not None:
            return np.float32(self._only)
        values = np.concatenate([one.values for one in seen])
        if any(one.counts is not None for one in seen):
            counts = [np.ones(len(o.values), int) if o.counts is None else o.counts for o in seen]
            falling = np.argsort(-values)
            reached = np.cumsum(np.concatenate(counts)[falling])
            if reached[-1] == held:
                return np.float32(values[falling[np.searchsorted(reached, place)]])
        return _partition(values, [place])[0] if len(values) == held else None


def _few(values: Floats32) -> bool:
    """Whether these look like the few values that narrow floats take: better counted."""
    return 4 * len(set(values.tolist())) < len(values)


def _bracketed(
    read: Read, size: int, ranks: Sequence[int], block: int
) -> tuple[np.float32, ...] | None:
    """By a bracket from a sample; None where it does not hold the threshold."""
    sample = np.abs([read(*place) for place in sample_places(size)])
    brackets = [Bracket(sample, rank / size) for rank in ranks]
    seen: list[list[Seen]] = [[] for _ in ranks]
    room = np.empty(block, np.float32)
    for start, stop in blocks(size, block):
        values = np.abs(read(start, stop), out=room[: stop - start])
        for bracket, parts in zip(brackets, seen, strict=True):
            parts.append(bracket.look(values))
    found = []
    for bracket, parts, rank in zip(brackets, seen, ranks, strict=True):
        value = bracket.find(parts, rank)
        if value is None:
            return None
        found.append(value)
    return tuple(found)


def sample_places(size: int) -> list[tuple[int, int]]:
    """Ranges of RUN elements spread over `size` > WHOLE elements, always the same ones."""
    runs = min(ceil(2 * size ** (2 / 3)), MOST_SAMPLED, size) // RUN
    stride = size / runs
    # The golden ratio spreads the runs evenly without ever being in step with the rows.
    starts = (
        int(number * stride + (number * 0.6180339887 % 1) * (stride - RUN))
        for number in range(runs)
    )
    return [(start, start + RUN) for start in starts]


def _bracket(sample: Floats32, share: float) -> tuple[np.float32, np.float32]:
    """Bounds, both exclusive, of the magnitude that a `share` of all elements reach."""
    falling = np.sort(sample, axis=None)[::-1]
    count = len(falling)
    guess = falling[min(int(share * count), count - 1)]
    # Elements of a run resemble each other: the error is that of a mean over runs.
    spread = float((sample >= guess).mean(axis=1).std()) / sqrt(len(sample))
    margin = count * max(DEVIATIONS * spread, 4 / count)
    first, last = floor(share * count - margin), ceil(share * count + margin)
    low, high = falling[min(last, count - 1)], np.float32(np.inf)
    if first >= 0:
        high = np.nextafter(falling[first], high)
    if low > 0:
        low = np.nextafter(low, np.float32(0)) if last < count else np.float32(-1)
    return low, high


def _counted(read: Read, size: int, ranks: Sequence[int], block: int) -> tuple[np.float32, ...]:
    """By counting the upper, then the lower 16 bits: magnitudes sort as their bits do."""
    upper = np.zeros(2**16, np.int64)
    for start, stop in blocks(size, block):
        upper += np.bincount(_bits(read(start, stop)) >> 16, minlength=2**16)
    places = [_locate(upper, rank) for rank in ranks]
    lower = {prefix: np.zeros(2**16, np.int64) for prefix, _ in places}
    for start, stop in blocks(size, block):
        bits = _bits(read(start, stop))
        for prefix, counts in lower.items():
            same = bits[bits >> 16 == prefix]
            counts += np.bincount(same & 0xFFFF, minlength=2**16)
    found = [prefix << 16 | _locate(lower[prefix], rank)[0] for prefix, rank in places]
    return tuple(np.array(found, np.uint32).view(np.float32))


def _bits(values: Floats32) -> npt.NDArray[np.uint32]:
    return np.abs(values).view(np.uint32)


def _locate(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th from above, and its rank within that bin."""
    falling = np.cumsum(counts[::-1])
    place = int(np.searchsorted(falling, rank))
    before = int(falling[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
