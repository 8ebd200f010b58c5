"""Holding shipped statistics against what the round asked for, and against the deltas.

What a manifest says is checked before a byte is taken; that no Fisher information is
negative, as it streams in; the rest at the commit, on the stored file. A wrong trim
threshold would make one contributor count for more than it sent, and nobody could tell
from the merged result: a sample that nobody can foresee is counted again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from coldmerge.core.documents import Manifest, Statistic, TensorEntry
from coldmerge.core.dtypes import Floats32, blocks, size
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.names import split_key
from coldmerge.core.selection import kept
from coldmerge.core.statistics import DTYPE, statistic_shape
from coldmerge.core.task_vector import TaskVector

COUNTED_ELEMENTS = 2**26
"""One tensor is counted again, and others while they are that many together."""
LAST_PLACE = 1e-6
"""How far products of LoRA factors may differ from one processor to another, relatively."""
GRAM_TILES = 8
GRAM_SIDE = 128
SYMMETRY = 1e-4

Shapes = Mapping[str, tuple[int, ...]]


def check_statistics(
    manifest: Manifest, shapes: Shapes, asked: Collection[Statistic], density: float | None
) -> None:
    """Hold the statistics that a manifest lists against what its round asks for.

    `shapes` are those of the tensors that the manifest changes. Fisher and trim must be
    there for each of them, gram for one at least: not every matrix is a linear layer's.

    Raises:
        TaskVectorError: one that was not asked for, one that is missing, another density,
            or a shape or type that does not fit its tensor.
    """
    _check_kinds(manifest, asked)
    if density is not None and manifest.statistics["trim"] != density:
        raise TaskVectorError(
            "manifest.wrong_density",
            "The trim thresholds are for another density than the round's.",
            expected=density,
            got=manifest.statistics["trim"],
            hint="Prepare the contribution again with `coldmerge push`.",
            round=manifest.round,
        )
    found: dict[str, set[str]] = {kind: set() for kind in asked}
    for entry in manifest.tensors:
        name, kind = split_key(entry.name, found)
        if kind in found:
            _check_entry(manifest, entry, statistic_shape(cast(Statistic, kind), shapes.get(name)))
            found[kind].add(name)
    for kind, names in sorted(found.items()):
        missing = sorted(set(shapes) - names)
        if missing and (kind != "gram" or not names):
            raise TaskVectorError(
                "manifest.missing_statistic",
                f"The contribution lists no {kind} of tensor {missing[0]}.",
                expected="gram of one tensor at least" if kind == "gram" else f"{kind} of each",
                got=f"{len(names)} for {len(shapes)} tensors",
                hint="Prepare the contribution again with `coldmerge push`.",
                round=manifest.round,
            )


def _check_kinds(manifest: Manifest, asked: Collection[Statistic]) -> None:
    listed = set(manifest.statistics)
    if unasked := sorted(listed - set(asked)):
        raise TaskVectorError(
            "manifest.unasked_statistic",
            f"The contribution ships {unasked[0]} statistics, and the round did not ask for them.",
            expected=", ".join(sorted(asked)) or "no statistics",
            got=", ".join(sorted(listed)),
            hint="Nothing was stored. Prepare the contribution again with `coldmerge push`.",
            round=manifest.round,
        )
    if missing := sorted(set(asked) - listed):
        raise TaskVectorError(
            "manifest.no_statistics",
            f"The round merges with {missing[0]} statistics, and the contribution ships none.",
            expected=", ".join(sorted(asked)),
            got=", ".join(sorted(listed)) or "no statistics",
            hint="Update coldmerge, train again with `coldmerge train` while the round is "
            "open, then push.",
            round=manifest.round,
        )


def _check_entry(manifest: Manifest, entry: TensorEntry, shape: tuple[int, ...] | None) -> None:
    if (entry.dtype, entry.shape) != (DTYPE, shape):
        raise TaskVectorError(
            "manifest.wrong_statistic",
            f"The statistic {entry.name} does not fit the tensor it is of.",
            expected=f"{DTYPE} {list(shape)}" if shape else "a statistic of a tensor that changes",
            got=f"{entry.dtype} {list(entry.shape)}",
            hint="Prepare the contribution again with `coldmerge push`.",
            round=manifest.round,
        )


def check_stored(vector: TaskVector, seed: bytes) -> None:
    """Check what only the whole file shows; `seed` chooses which parts of it are looked at.

    Raises:
        TaskVectorError: a trim threshold is not that of the delta, or a Gram matrix cannot
            be one.
    """
    draw = np.random.default_rng(list(seed))
    if "trim" in vector.statistics:
        for name in _sample(vector, draw):
            _check_trim(vector, name, vector.statistics["trim"])
    if "gram" in vector.statistics:
        for name in sorted(vector.names):
            if vector.has_statistic(name, "gram"):
                _check_gram(vector, name, draw)


def _sample(vector: TaskVector, draw: np.random.Generator) -> Iterator[str]:
    names = sorted(vector.names)
    seen = 0
    for name in (names[place] for place in draw.permutation(len(names))):
        if seen == 0 or seen + size(vector.shape(name)) <= COUNTED_ELEMENTS:
            seen += size(vector.shape(name))
            yield name


def _check_trim(vector: TaskVector, name: str, density: float) -> None:
    """The k-th largest magnitude t: fewer than k are larger, at least k are as large."""
    threshold = vector.statistic(name, "trim", 0, 1)[0]
    slack = np.float32(LAST_PLACE if vector.is_lora(name) else 0) * threshold
    count = size(vector.shape(name))
    larger = as_large = 0
    for start, stop in blocks(count):
        values = np.abs(vector.block(name, start, stop))
        larger += int(np.count_nonzero(values > threshold + slack))
        as_large += int(np.count_nonzero(values >= threshold - slack))
    k = kept(density, count)
    if not larger < k <= as_large:
        raise TaskVectorError(
            "contribution.trim_wrong",
            f"The trim threshold of tensor {name} is not that of its delta.",
            expected=f"the {k}-th largest magnitude of {count}, for density {density:g}",
            got=f"{threshold:g}: {larger} are larger, {as_large} at least as large",
            hint="Nothing was counted. Prepare the contribution again with `coldmerge push`.",
        )


def _check_gram(vector: TaskVector, name: str, draw: np.random.Generator) -> None:
    """XᵀX is symmetric, its diagonal is not negative, and it obeys Cauchy and Schwarz."""
    side = vector.shape(name)[1]
    diagonal = np.array([_row(vector, name, at, at, at + 1)[0] for at in range(side)])
    if (diagonal < 0).any():
        raise _no_gram(name, f"a diagonal with {diagonal.min():g}")
    root = np.sqrt(diagonal.astype(np.float64))
    for _ in range(GRAM_TILES):
        top, left = draw.integers(max(1, side - GRAM_SIDE + 1), size=2).tolist()
        tile = _tile(vector, name, top, left)
        twin = _tile(vector, name, left, top).T
        bound = np.outer(root[top : top + len(tile)], root[left : left + tile.shape[1]])
        if (np.abs(tile - twin) > SYMMETRY * bound).any():
            raise _no_gram(name, f"a matrix that is not symmetric near [{top}, {left}]")
        if (np.abs(tile) > (1 + SYMMETRY) * bound).any():
            raise _no_gram(name, f"entries near [{top}, {left}] beyond those of the diagonal")


def _tile(vector: TaskVector, name: str, top: int, left: int) -> npt.NDArray[np.float64]:
    side = vector.shape(name)[1]
    rows = range(top, min(top + GRAM_SIDE, side))
    right = min(left + GRAM_SIDE, side)
    return np.array([_row(vector, name, row, left, right) for row in rows], np.float64)


def _row(vector: TaskVector, name: str, row: int, left: int, right: int) -> Floats32:
    side = vector.shape(name)[1]
    return vector.statistic(name, "gram", row * side + left, row * side + right)


def _no_gram(name: str, got: str) -> TaskVectorError:
    return TaskVectorError(
        "contribution.not_a_gram",
        f"The gram statistic of tensor {name} cannot be a Gram matrix.",
        expected="XᵀX of some inputs X: symmetric, with a diagonal that is not negative",
        got=got,
        hint="Nothing was counted. Measure again with `coldmerge train`, then push.",
    )
