"""How alike the changes of several models are: cosines and agreement of signs.

One pass over all models; the sums are those of a Gram matrix, in float64, by blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coldmerge.core.algebra import Delta
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.comparison import layer_of, layer_order, not_finite, values_on
from coldmerge.core.dtypes import BLOCK, FLOATS, NUMPY, Floats32, Floats64, blocks
from coldmerge.core.progress import Advance
from coldmerge.core.threads import one_blas_thread

ELEMENTS = 2**21
"""Elements of all models together that are in memory at a time."""

Matrix = npt.NDArray[np.float64]


@dataclass
class Sums:
    """Sums over some elements of N changes, each float64 [N, N].

    `dots`: inner products. `agree`, `both`: how many elements have the same sign, and how
    many are zero in neither.
    """

    dots: Matrix
    agree: Matrix
    both: Matrix

    @classmethod
    def zero(cls, count: int) -> Sums:
        """Of no elements."""
        return cls(*(np.zeros((count, count)) for _ in range(3)))

    def add(self, other: Sums) -> None:
        """Add the sums over other elements."""
        self.dots += other.dots
        self.agree += other.agree
        self.both += other.both

    @property
    def norms(self) -> Floats64:
        """L2 norm of each change, float64 [N]."""
        norms: Floats64 = np.sqrt(np.diag(self.dots))
        return norms

    @property
    def cosines(self) -> Matrix:
        """Cosine between the changes, float64 [N, N]; NaN where one of them is zero."""
        norms = self.norms
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Matrix = np.clip(self.dots / np.outer(norms, norms), -1.0, 1.0)
        np.fill_diagonal(found, np.where(norms > 0, 1.0, np.nan))
        return found

    @property
    def sign_agreement(self) -> Matrix:
        """Share of equal signs where neither change is zero, float64 [N, N]; NaN: nowhere."""
        with np.errstate(invalid="ignore"):
            found: Matrix = self.agree / self.both
        return found


@dataclass(frozen=True)
class Similarity:
    """The changes that were compared, by name, and their sums by layer, in model order."""

    labels: tuple[str, ...]
    layers: dict[str, Sums]

    @property
    def total(self) -> Sums:
        """The sums over the whole model."""
        total = Sums.zero(len(self.labels))
        for sums in self.layers.values():
            total.add(sums)
        return total


def similarity(
    base: Checkpoint,
    deltas: Sequence[Delta],
    labels: Sequence[str],
    progress: Advance | None = None,
) -> Similarity:
    """Compare changes against `base`; a tensor that one does not touch counts as unchanged.

    `labels` name the changes, also in messages. `progress` is told bytes of the base.

    Raises:
        TaskVectorError: a value is NaN or Inf; it names the tensor and the model.
    """
    layers: dict[str, Sums] = {}
    step = min(BLOCK, max(2**12, ELEMENTS // max(1, len(deltas))))
    with one_blas_thread():
        for name in touched(base, deltas):
            sums = layers.setdefault(layer_of(name), Sums.zero(len(deltas)))
            for start, stop in blocks(base.tensors[name].size, step):
                sums.add(_block(base, deltas, labels, name, (start, stop)))
                if progress:
                    progress((stop - start) * NUMPY[base.dtype(name)].itemsize)
    ordered = {layer: layers[layer] for layer in sorted(layers, key=layer_order)}
    return Similarity(tuple(labels), ordered)


def touched(base: Checkpoint, deltas: Sequence[Delta]) -> list[str]:
    """The float tensors of `base` that a change may touch, sorted."""
    names = frozenset[str]().union(*(delta.names for delta in deltas))
    return [name for name in base.tensors if name in names and base.dtype(name) in FLOATS]


def _block(
    base: Checkpoint,
    deltas: Sequence[Delta],
    labels: Sequence[str],
    name: str,
    place: tuple[int, int],
) -> Sums:
    ground = base.block(name, *place)
    rows = np.zeros((len(deltas), len(ground)), np.float32)
    for row, delta in zip(rows, deltas, strict=True):
        if name in delta.names:
            row[:] = values_on(ground, delta, name, place[0])
    wide = rows.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # `_blame` says it better
        dots = wide @ wide.T
    if not np.isfinite(dots).all():
        _blame(ground, rows, base, labels, name)
    signs = np.sign(rows, out=rows)
    surplus = _products(signs)
    both = _products(np.abs(signs, out=signs))
    return Sums(dots, (surplus + both) / 2, both)


def _products(signs: Floats32) -> Matrix:
    """Inner products of rows of -1, 0 and 1: exact, since a row has less than 2^24."""
    return (signs @ signs.T).astype(np.float64)


def _blame(
    ground: Floats32, rows: Floats32, base: Checkpoint, labels: Sequence[str], name: str
) -> None:
    if not np.isfinite(ground).all():
        raise not_finite(name, str(base.folder))
    for row, label in zip(rows, labels, strict=True):
        if not math.isfinite(float(np.abs(row).max(initial=0))):
            raise not_finite(name, label)
