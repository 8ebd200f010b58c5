"""How far a model moved from its base: norms and counts per tensor, summed in float64.

One pass; a block of each of the two is in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from coldmerge.core.algebra import Delta
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.deltas import Tuned
from coldmerge.core.dtypes import BLOCK, FLOATS, NUMPY, Floats32, blocks
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.names import match_names
from coldmerge.core.progress import Advance
from coldmerge.core.task_vector import sum_of_squares

EMBEDDINGS, OTHER = "embeddings", "other"
_EMBEDDING = re.compile(r"embed|\b(wte|wpe|shared)\b")


@dataclass(frozen=True)
class Change:
    """How far some elements moved. Sums are float64; adding two gives that of both.

    `squares`: Σδ²; `base_squares`: Σ of the squares of the base; `largest`: max |δ|.
    """

    elements: int = 0
    changed: int = 0
    squares: float = 0.0
    base_squares: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Change) -> Change:
        return Change(
            self.elements + other.elements,
            self.changed + other.changed,
            self.squares + other.squares,
            self.base_squares + other.base_squares,
            max(self.largest, other.largest),
        )

    @property
    def norm(self) -> float:
        """L2 norm of the change."""
        return math.sqrt(self.squares)

    @property
    def relative(self) -> float | None:
        """Norm of the change over the norm of the base; None where the base is zero."""
        return math.sqrt(self.squares / self.base_squares) if self.base_squares else None

    @property
    def fraction(self) -> float:
        """Share of the elements that changed."""
        return self.changed / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Mismatch:
    """One tensor that two folders describe differently, such as `F32 [2, 3]`."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class Sides:
    """Two folders matched by name: the tensors that can be compared, and all others.

    `buffers` maps tensors that are not floats (their elements are compared as they are);
    `types` differ in type only, and are compared.
    """

    delta: Tuned
    buffers: dict[str, str]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    shapes: tuple[Mismatch, ...]
    types: tuple[Mismatch, ...]


def match_sides(a: Checkpoint, b: Checkpoint) -> Sides:
    """Match the tensors of two folders, wrappers and model prefixes aside.

    Raises:
        TaskVectorError: no tensor has the same name.
    """
    names = match_names(a.tensors, b.tensors)
    pairs = {target: name for name, target in names.items() if target is not None}
    if not pairs:
        raise TaskVectorError(
            "weights.no_match",
            "The two models share no tensor name.",
            expected=f"names such as {min(a.tensors, default='(none)')}",
            got=min(b.tensors, default="no tensors"),
            hint="Compare models of one architecture.",
            a=a.folder,
            b=b.folder,
        )
    floats: dict[str, str] = {}
    buffers: dict[str, str] = {}
    shapes, types = [], []
    for name, other in sorted(pairs.items()):
        one, two = a.tensors[name], b.tensors[other]
        both = (one.dtype in FLOATS) + (two.dtype in FLOATS)
        mismatch = Mismatch(
            name, f"{one.dtype} {list(one.shape)}", f"{two.dtype} {list(two.shape)}"
        )
        if one.shape != two.shape or both == 1 or (both == 0 and one.dtype != two.dtype):
            shapes.append(mismatch)
            continue
        if one.dtype != two.dtype:
            types.append(mismatch)
        (floats if both else buffers)[name] = other
    return Sides(
        Tuned(a, b, floats),
        buffers,
        tuple(name for name in a.tensors if name not in pairs),
        tuple(sorted(name for name, target in names.items() if target is None)),
        tuple(shapes),
        tuple(types),
    )


def changes(
    base: Checkpoint,
    delta: Delta,
    names: Iterable[str],
    label: str,
    progress: Advance | None = None,
) -> dict[str, Change]:
    """The change of each of the float tensors `names` of `base`, sorted by name.

    `label` names the changed model in messages. `progress` is told bytes of the base.

    Raises:
        TaskVectorError: a value is NaN or Inf; it names the tensor and the model.
    """
    found = {}
    for name in sorted(names):
        total = Change()
        for start, stop in blocks(base.tensors[name].size):
            total += _change(base, delta, name, start, stop, label)
            if progress:
                progress((stop - start) * NUMPY[base.dtype(name)].itemsize)
        found[name] = total
    return found


def _change(base: Checkpoint, delta: Delta, name: str, start: int, stop: int, label: str) -> Change:
    ground = base.block(name, start, stop)
    base_squares = sum_of_squares(ground)
    if not math.isfinite(base_squares):
        raise not_finite(name, str(base.folder))
    if name not in delta.names:
        return Change(elements=len(ground), base_squares=base_squares)
    values = values_on(ground, delta, name, start)
    squares = sum_of_squares(values)
    if not math.isfinite(squares):
        raise not_finite(name, label)
    largest = float(np.abs(values).max(initial=0))
    return Change(len(values), int(np.count_nonzero(values)), squares, base_squares, largest)


def values_on(ground: Floats32, delta: Delta, name: str, start: int) -> Floats32:
    """Elements of `delta` from `start` on, as many as `ground`, the base's own, holds."""
    if isinstance(delta, Tuned):
        theta = delta.theta(name, start, start + len(ground))
        with np.errstate(over="ignore", invalid="ignore"):
            return np.subtract(theta, ground, out=theta)
    return delta.block(name, start, start + len(ground))


def buffer_changes(a: Checkpoint, b: Checkpoint, pairs: Mapping[str, str]) -> dict[str, Change]:
    """How many elements of tensors that are not floats differ in their bytes."""
    found = {}
    for name, other in sorted(pairs.items()):
        spec = a.tensors[name]
        width = NUMPY[spec.dtype].itemsize
        count = 0
        for start, stop in blocks(spec.nbytes, BLOCK * width):
            one, two = (
                np.frombuffer(model.raw(key, start, stop), np.uint8).reshape(-1, width)
                for model, key in ((a, name), (b, other))
            )
            count += int(np.count_nonzero((one != two).any(axis=1)))
        found[name] = Change(elements=spec.size, changed=count)
    return found


def by_layer(tensors: Mapping[str, Change]) -> dict[str, Change]:
    """The changes added up by layer, in the order of `layer_order`."""
    found: dict[str, Change] = {}
    for name, change in tensors.items():
        layer = layer_of(name)
        found[layer] = found.get(layer, Change()) + change
    return {layer: found[layer] for layer in sorted(found, key=layer_order)}


def layer_of(name: str) -> str:
    """The layer a tensor is part of: its name up to the number (`encoder.layer.3`).

    Tensors outside numbered layers are `embeddings` or `other`.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[1:], 1):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return EMBEDDINGS if _EMBEDDING.search(name) else OTHER


def layer_order(layer: str) -> tuple[int, str, int]:
    """Sorting key: embeddings, then layers by stack and number, then the rest."""
    stack, _, number = layer.rpartition(".")
    if number.isdecimal():
        return 1, stack, int(number)
    return (0 if layer == EMBEDDINGS else 2), layer, 0


def not_finite(name: str, model: str) -> TaskVectorError:
    """The error for a tensor of `model` that holds a NaN or an infinity."""
    return TaskVectorError(
        "weights.not_finite",
        f"Tensor {name} of {model} holds NaN or Inf.",
        expected="finite values",
        hint="The training diverged or the file is damaged; leave this model out.",
        tensor=name,
        model=model,
    )
