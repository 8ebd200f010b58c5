"""Whether two merges of the same inputs agree, apart from what their method leaves open.

A cut by magnitude leaves elements open that are equal to the one at the cut (bf16 inputs have
thousands of those), and an election of signs those whose sum rounding decides. Such elements
are found from the inputs and left out; the rest must be equal within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.merge_plans import Inputs, Method
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.dtypes import Floats32, blocks

RELATIVE = {"F32": 1e-5, "BF16": 2.0**-7, "F16": 2.0**-10}
"""One unit in the last place of the stored type, or rounding in float32."""
SCALED = 2e-6
NORMS = 0.02
NEAR = 1e-5
ENERGY = 1e-3
FEW = 4096

CUT = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """`largest` difference where nothing is open; `open_share` of elements differ, being open.

    For a method that draws at random both are None, and `norm_ratio` is the length of our
    move from the base over the other's.
    """

    largest: float | None
    open_share: float | None
    norm_ratio: float | None
    agrees: bool


def compare(method: Method, inputs: Inputs, ours: Path, other: Path) -> Agreement:
    """Compare two folders written for one plan, tensor by tensor; one tensor is in memory."""
    a, b = Checkpoint.open(ours), Checkpoint.open(other)
    if a.tensors.keys() != b.tensors.keys():
        missing = sorted(a.tensors.keys() ^ b.tensors.keys())
        raise SystemExit(f"The merges hold different tensors, first {missing[0]}.")
    if method.random:
        return _by_norm(Checkpoint.open(inputs.base), a, b)
    sources = [Checkpoint.open(path) for path in inputs.sources]
    base = Checkpoint.open(inputs.base)
    largest, places, total, agrees = 0.0, 0, 0, True
    for name, spec in a.tensors.items():
        mine, theirs = (one.block(name, 0, spec.size) for one in (a, b))
        allowed = RELATIVE[spec.dtype] * np.abs(theirs) + SCALED * np.abs(theirs).max(initial=0)
        wrong = np.abs(mine - theirs)
        if not np.all(wrong <= allowed):
            if method.word == "sce":  # its weights are energies of what ties left in or out
                allowed += ENERGY * np.abs(theirs - base.block(name, 0, spec.size))
            left = left_open(method, name, base, sources)
            if method.word == "sce" and spec.size < FEW and left.any():
                left[:] = True  # a tied entry more can lift the energies over mergekit's 1e-6
            places += int((left & (wrong > allowed)).sum())
            wrong[left] = 0
            agrees &= bool(np.all(wrong <= allowed))
        largest = max(largest, float(wrong.max(initial=0)))
        total += spec.size
    return Agreement(largest, places / max(total, 1), None, agrees)


def _by_norm(base: Checkpoint, ours: Checkpoint, other: Checkpoint) -> Agreement:
    squares = np.zeros(2)
    for name, spec in ours.tensors.items():
        for start, stop in blocks(spec.size):
            origin = base.block(name, start, stop)
            for place, one in enumerate((ours, other)):
                move = (one.block(name, start, stop) - origin).astype(np.float64)
                squares[place] += move @ move
    ratio = math.sqrt(squares[0] / squares[1]) if squares[1] else math.inf
    return Agreement(None, None, ratio, abs(ratio - 1) <= NORMS)


def left_open(method: Method, name: str, base: Checkpoint, sources: list[Checkpoint]) -> Mask:
    """Elements of a tensor whose merged value the method leaves open, flat."""
    size = base.tensors[name].size
    found, chosen = np.zeros(size, np.bool_), np.ones(size, np.bool_)
    if method.word not in CUT:
        return found
    if method.word == "sce":
        found, chosen = _by_variance(method, name, base, sources)
    total, mass = np.zeros(size, np.float64), np.zeros(size, np.float64)
    for delta in _deltas(name, base, sources):
        magnitude = np.abs(delta)
        if method.word != "sce":
            low, high = cuts(method, magnitude)
            found |= (magnitude == low) | (magnitude == high)
            chosen = (magnitude >= low) & (magnitude <= high)
        delta *= chosen
        total += delta
        mass += np.abs(delta)
    if method.word != "breadcrumbs":
        found |= (np.abs(total) <= NEAR * mass) & (mass > 0)
    return found


def cuts(method: Method, magnitude: Floats32) -> tuple[float, float]:
    """The least and the largest magnitude that mergekit keeps of a tensor; (inf, 0) if none.

    -1 and inf where it drops none on that side.
    """
    size, density = magnitude.size, float(method.each["density"])
    if method.word == "ties":
        kept, top = max(1, int(density * size)), 0
    else:
        kept, top = int(density * size), int(float(method.each["gamma"]) * size)
    bottom = max(0, size - kept - top)
    if kept == 0:
        return math.inf, 0.0
    ordered = np.partition(magnitude, sorted({bottom, bottom + kept - 1}))
    low = float(ordered[bottom]) if bottom else -1.0
    high = float(ordered[bottom + kept - 1]) if bottom + kept < size else math.inf
    return low, high


def _deltas(name: str, base: Checkpoint, sources: list[Checkpoint]) -> Iterator[Floats32]:
    size = base.tensors[name].size
    origin = base.block(name, 0, size)
    for source in sources:
        delta = source.block(name, 0, size)
        delta -= origin
        yield delta


def _by_variance(
    method: Method, name: str, base: Checkpoint, sources: list[Checkpoint]
) -> tuple[Mask, Mask]:
    """Elements near the cut of SCE, and those it selects."""
    mean = sum(delta.astype(np.float64) for delta in _deltas(name, base, sources)) / len(sources)
    variance = sum((delta - mean) ** 2 for delta in _deltas(name, base, sources)) / len(sources)
    everywhere = np.broadcast_to(variance, base.tensors[name].size)
    kept = int(int(np.count_nonzero(everywhere)) * float(method.shared["select_topk"]))
    if not 0 < kept < everywhere.size:
        return np.zeros(everywhere.size, np.bool_), np.full(everywhere.size, kept > 0)
    cut = np.partition(everywhere, everywhere.size - kept)[everywhere.size - kept]
    return np.abs(everywhere - cut) <= NEAR * cut, everywhere >= cut
