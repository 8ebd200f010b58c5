"""Arithmetic with task vectors, file to file, one block at a time, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.dtypes import FLOATS, Floats32, Floats64, blocks, from_float32, size
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.files import CHUNK_BYTES
from coldmerge.core.progress import Advance
from coldmerge.core.task_vector import TaskVector
from coldmerge.core.vector_writer import VectorWriter


class Delta(Protocol):
    """Deltas against one release, read by block: a `TaskVector`, or anything like it."""

    @property
    def base_digest(self) -> str:
        """Content digest of the release."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """The release tensors whose delta is not zero throughout."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the delta of `name`."""
        ...

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened delta, float32, shape (stop - start,)."""
        ...


def apply(
    base: Checkpoint,
    vectors: Sequence[tuple[Delta, float]],
    out: Path | str,
    progress: Advance | None = None,
) -> Checkpoint:
    """Write the folder θ = base + Σ wᵢτᵢ, summed in float64, in the base's own types.

    `progress` is called with the number of bytes written since the last call.

    Raises:
        TaskVectorError: a vector does not fit the base, or a sum is not finite.
        ConflictError: `out` exists and is not empty.
    """
    for vector, _ in vectors:
        check_fits(base, vector)
    touched = frozenset[str]().union(*(vector.names for vector, _ in vectors))

    def rows(name: str) -> Iterator[Floats32]:
        for start, stop in blocks(base.tensors[name].size):
            total = base.block(name, start, stop).astype(np.float64)
            total += weighted_sum(name, start, stop, vectors)
            yield round_once(name, total)

    return rewrite(base, out, touched, rows, progress)


def add(vectors: Sequence[tuple[Delta, float]], out: Path | str) -> TaskVector:
    """Write Σ wᵢτᵢ as a full fp32 task vector, without statistics: they are not those of a sum.

    Raises:
        TaskVectorError: none given, or they start from different releases.
    """
    digest = common_base([vector for vector, _ in vectors])
    shapes: dict[str, tuple[int, ...]] = {}
    for vector, _ in vectors:
        for name in vector.names:
            if shapes.setdefault(name, vector.shape(name)) != vector.shape(name):
                raise TaskVectorError(
                    "task_vector.shapes_differ",
                    f"Two task vectors give tensor {name} different shapes.",
                    expected=list(shapes[name]),
                    got=list(vector.shape(name)),
                    hint="Only task vectors against the same release can be added.",
                )
    with VectorWriter(
        Path(out), shapes.items(), kind="full", encoding="fp32", base_digest=digest, scaling={}
    ) as writer:
        for name, shape in sorted(shapes.items()):
            for start, stop in blocks(size(shape)):
                writer.append(round_once(name, weighted_sum(name, start, stop, vectors)))
            writer.keep(name, shape)
    return writer.open()


def scale(vector: TaskVector, factor: float, out: Path | str) -> TaskVector:
    """Write factor·τ in the vector's own kind and encoding.

    Factors of a `lora` vector are copied as they are; their scaling changes. Statistics are
    left out: they are of the weights that were trained.

    Raises:
        TaskVectorError: a product is not finite.
    """
    with VectorWriter(
        Path(out),
        ((key, vector.specs[key].shape) for key in vector.deltas),
        kind=vector.kind,
        encoding=vector.encoding,
        base_digest=vector.base_digest,
        scaling={name: value * factor for name, value in vector.scaling.items()},
    ) as writer:
        for key in vector.deltas:
            spec = vector.specs[key]
            for start, stop in blocks(spec.size):
                values = vector.stored(key, start, stop)
                if key in vector.names:
                    values = round_once(key, values.astype(np.float64) * factor)
                writer.append(values)
            writer.keep(key, spec.shape)
    return writer.open()


def negate(vector: TaskVector, out: Path | str) -> TaskVector:
    """Write −τ: applied with a positive weight it forgets what τ learned."""
    return scale(vector, -1.0, out)


def weighted_sum(
    name: str, start: int, stop: int, vectors: Sequence[tuple[Delta, float]]
) -> Floats64:
    """Σ wᵢτᵢ over elements [start, stop) of `name`, float64, in the order given."""
    total = np.zeros(stop - start, np.float64)
    for vector, weight in vectors:
        if name in vector.names:
            total += np.multiply(vector.block(name, start, stop), weight, dtype=np.float64)
    return total


def round_once(name: str, values: Floats64 | Floats32) -> Floats32:
    """float64 → float32, to nearest; float32 is only checked.

    Raises:
        TaskVectorError: a result is NaN or Inf.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32, copy=False)
    if not np.isfinite(rounded).all():
        raise TaskVectorError(
            "task_vector.not_finite",
            f"A result in tensor {name} is NaN or Inf.",
            expected="finite values",
            hint="Look for a damaged input, or use smaller weights.",
        )
    return rounded


def common_base(vectors: Sequence[Delta]) -> str:
    """The release digest that all the vectors start from.

    Raises:
        TaskVectorError: there is no vector, or they start from different releases.
    """
    digests = sorted({vector.base_digest for vector in vectors})
    if len(digests) != 1:
        raise TaskVectorError(
            "task_vector.mixed_bases",
            "Task vectors can be combined only when all start from one release.",
            expected="one base digest",
            got=", ".join(digests) or "no task vectors",
            hint="Extract them again against the same release.",
        )
    return digests[0]


def check_fits(base: Checkpoint, vector: Delta) -> None:
    """Check that every delta belongs to a float tensor of `base` of the same shape.

    Raises:
        TaskVectorError: one does not.
    """
    for name in sorted(vector.names):
        spec = base.tensors.get(name)
        if spec is None or spec.dtype not in FLOATS or spec.shape != vector.shape(name):
            raise TaskVectorError(
                "task_vector.does_not_fit",
                f"The delta of tensor {name} does not fit the release.",
                expected="no such tensor" if spec is None else f"{spec.dtype} {list(spec.shape)}",
                got=f"a delta of shape {list(vector.shape(name))}",
                hint="Use the release that the task vector was extracted against.",
                base_digest=vector.base_digest,
            )


def rewrite(
    base: Checkpoint,
    out: Path | str,
    touched: frozenset[str],
    rows: Callable[[str], Iterator[Floats32]],
    progress: Advance | None = None,
) -> Checkpoint:
    """Write `base` again with the `touched` tensors replaced by `rows(name)`, block by block."""
    with CheckpointWriter(out) as writer:
        writer.declare(list(base.tensors.values()))
        for path in base.files():
            writer.copy_file(base.folder / path, path)
        for name, spec in base.tensors.items():
            if name in touched:
                for values in rows(name):
                    writer.write(name, from_float32(values, spec.dtype))
            else:
                for start, stop in blocks(spec.nbytes, CHUNK_BYTES):
                    writer.write(name, base.raw(name, start, stop))
            if progress:
                progress(spec.nbytes)
    return Checkpoint.open(writer.folder)
