"""A change of full rank as LoRA factors: truncated SVD, matrix by matrix, with its error.

The best rank-r approximation in the Frobenius norm (Eckart and Young 1936), by the
eigenvectors of the smaller Gram matrix in float64. One matrix is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from coldmerge.core.adapter_writer import is_embedding
from coldmerge.core.algebra import Delta, round_once
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.comparison import not_finite
from coldmerge.core.dtypes import FLOATS, Floats32, Floats64, blocks, size
from coldmerge.core.errors import ConfigError, TaskVectorError
from coldmerge.core.names import private_pattern
from coldmerge.core.progress import Advance
from coldmerge.core.task_vector import TaskVector, sum_of_squares
from coldmerge.core.threads import one_blas_thread
from coldmerge.core.vector_writer import VectorWriter

_STEP = 2**20


@dataclass(frozen=True)
class Factored:
    """One matrix as factors: its rank, the norm of its change, the norm of what is lost."""

    name: str
    rank: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """‖Δ − s·BA‖ / ‖Δ‖ in the Frobenius norm, of the factors as stored."""
        return self.error / self.norm


@dataclass(frozen=True)
class LeftOut:
    """A changed tensor that is not in the adapter, and why."""

    name: str
    reason: str
    norm: float


@dataclass(frozen=True)
class LowRank:
    """A `lora` task vector and the account of what it loses.

    `left_out` holds changed tensors only, `unchanged` the names of matrices without change.
    """

    vector: TaskVector
    factored: tuple[Factored, ...]
    left_out: tuple[LeftOut, ...]
    unchanged: tuple[str, ...]

    @property
    def norm(self) -> float:
        """L2 norm of the whole change, what is left out included."""
        norms = [one.norm for one in self.factored] + [one.norm for one in self.left_out]
        return math.hypot(*norms)

    @property
    def relative_error(self) -> float:
        """‖Δ − s·BA‖ / ‖Δ‖ over the matrices in the adapter."""
        lost = math.hypot(*(one.error for one in self.factored))
        return lost / math.hypot(*(one.norm for one in self.factored))

    @property
    def relative_error_with_left_out(self) -> float:
        """The same over the whole change, where what is left out is lost entirely."""
        lost = [one.error for one in self.factored] + [one.norm for one in self.left_out]
        return math.hypot(*lost) / self.norm

    def share(self, left: LeftOut) -> float:
        """The share of the squared norm of the whole change that a left-out tensor has."""
        return (left.norm / self.norm) ** 2


@dataclass(frozen=True)
class Choice:
    """How to factorize: `rank` and `alpha`, and which matrices.

    `targets` are shell patterns of tensor names, module names or their last parts; without
    any, every matrix of a linear layer. `private` tensors never leave. A matrix with a
    dimension below `rank` gets that dimension as its rank.

    Raises:
        ConfigError: the rank or alpha is not positive.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    private: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ConfigError(
                "low_rank.bad_rank",
                "The rank and alpha of an adapter are positive.",
                expected="a rank of at least 1 and an alpha above 0",
                got=f"rank {self.rank}, alpha {self.alpha:g}",
                hint="Ranks of 8 to 64 are usual; alpha may be left out and is then the rank.",
            )

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank that a matrix of `shape` gets."""
        return min(self.rank, *shape)

    def scaling(self, shape: tuple[int, ...]) -> float:
        """The scaling of B @ A: alpha over the rank of a matrix of `shape`, as PEFT has it."""
        return self.alpha / self.rank_of(shape)

    def reason_to_leave_out(self, name: str, shape: tuple[int, ...], mixture: bool) -> str:
        """Why a tensor cannot be a LoRA target; empty where it can be one."""
        pattern = private_pattern(name, self.private)
        if pattern is not None:
            return f"private: {pattern}"
        if len(shape) != 2 or 0 in shape:
            return "not a matrix"
        module, _, leaf = name.rpartition(".")
        last = module.rpartition(".")[2]
        if leaf != "weight":
            return "not the weight of a layer"
        if is_embedding(name):
            return "an embedding"
        if mixture and (".experts." in name or last in ("gate", "router")):
            return "part of a mixture of experts, which adapters do not reach"
        forms = (name, module, last)
        if self.targets and not any(fnmatchcase(f, p) for p in self.targets for f in forms):
            return "not among the targets"
        return ""


def factorize(
    base: Checkpoint,
    delta: Delta,
    out: Path,
    choice: Choice,
    *,
    label: str,
    encoding: str = "fp32",
    progress: Advance | None = None,
) -> LowRank:
    """Write the best factors of `delta` as a `lora` task vector.

    `label` names the changed model in messages; `progress` is told elements.

    Raises:
        TaskVectorError: no matrix to factorize changed, or a value is NaN or Inf.
    """
    names = sorted(
        (name for name in delta.names if base.dtype(name) in FLOATS),
        key=lambda name: f"{name}.lora_A",
    )
    mixture = any(".experts." in name for name in base.tensors)
    reasons = {n: choice.reason_to_leave_out(n, base.shape(n), mixture) for n in names}
    shapes = {name: base.shape(name) for name in names if not reasons[name]}
    factored, left_out, unchanged = [], [], []
    with (
        one_blas_thread(),
        VectorWriter(
            out,
            [pair for name, shape in shapes.items() for pair in _stored(name, shape, choice)],
            kind="lora",
            encoding=encoding,
            base_digest=delta.base_digest,
            scaling={name: choice.scaling(shape) for name, shape in shapes.items()},
        ) as writer,
    ):
        for name in names:
            if name in shapes:
                one = _factor_one(delta, name, shapes[name], choice, writer, label)
                (factored.append(one) if one.norm else unchanged.append(name))
            else:
                norm = _norm(delta, name, base.shape(name), label)
                left_out += [LeftOut(name, reasons[name], norm)] if norm else []
            if progress:
                progress(size(base.shape(name)))
        _check_any(factored, left_out, choice)
    return LowRank(writer.open(), tuple(factored), tuple(left_out), tuple(unchanged))


def _stored(name: str, shape: tuple[int, ...], choice: Choice) -> list[tuple[str, tuple[int, ...]]]:
    rank = choice.rank_of(shape)
    return [(f"{name}.lora_A", (rank, shape[1])), (f"{name}.lora_B", (shape[0], rank))]


def _factor_one(
    delta: Delta,
    name: str,
    shape: tuple[int, ...],
    choice: Choice,
    writer: VectorWriter,
    label: str,
) -> Factored:
    matrix = np.empty(shape, np.float32)
    squares = 0.0
    for start, stop in blocks(matrix.size):
        values = delta.block(name, start, stop)
        squares += _square(values, name, label)
        matrix.reshape(-1)[start:stop] = values
    if squares == 0:
        return Factored(name, 0, 0.0, 0.0)
    scaling = choice.scaling(shape)
    stored = [
        writer.as_stored(round_once(name, factor / math.sqrt(scaling)))
        for factor in factors(matrix, choice.rank_of(shape))
    ]
    for values, (key, extents) in zip(stored, _stored(name, shape, choice), strict=True):
        writer.append(values.reshape(-1))
        writer.keep(key, extents)
    lost = _residual(matrix, stored[0], stored[1], scaling)
    return Factored(name, choice.rank_of(shape), math.sqrt(squares), math.sqrt(lost))


def factors(matrix: Floats32, rank: int) -> tuple[Floats64, Floats64]:
    """A (rank, columns) and B (rows, rank) with B @ A the best such product, float64.

    Singular values above zero are shared: row i of A is as long as column i of B.
    """
    rows, columns = matrix.shape
    tall = rows >= columns
    long = matrix if tall else matrix.T
    gram = np.zeros((long.shape[1],) * 2)
    for start, stop in blocks(len(long), max(1, _STEP // long.shape[1])):
        part = long[start:stop].astype(np.float64)
        gram += part.T @ part
    _, vectors = np.linalg.eigh(gram)
    basis = vectors[:, : -rank - 1 : -1]
    peaks = np.abs(basis).argmax(axis=0)
    basis = basis * np.where(basis[peaks, np.arange(rank)] < 0, -1.0, 1.0)
    image = np.concatenate(
        [
            long[start:stop].astype(np.float64) @ basis
            for start, stop in blocks(len(long), max(1, _STEP // long.shape[1]))
        ]
    )
    values = np.sqrt(np.einsum("ij,ij->j", image, image))
    roots = np.sqrt(np.where(values > 0, values, 1.0))
    image, basis = image / roots, basis * roots
    return (basis.T, image) if tall else (image.T, basis)


def _residual(matrix: Floats32, a: Floats32, b: Floats32, scaling: float) -> float:
    """‖matrix − scaling · b @ a‖², in float64."""
    wide = a.astype(np.float64) * scaling
    total = 0.0
    for start, stop in blocks(len(matrix), max(1, _STEP // matrix.shape[1])):
        rest = matrix[start:stop] - b[start:stop].astype(np.float64) @ wide
        total += float(np.einsum("ij,ij->", rest, rest))
    return total


def _norm(delta: Delta, name: str, shape: tuple[int, ...], label: str) -> float:
    return math.sqrt(
        math.fsum(_square(delta.block(name, *at), name, label) for at in blocks(size(shape)))
    )


def _square(values: Floats32, name: str, label: str) -> float:
    square = sum_of_squares(values)
    if not math.isfinite(square):
        raise not_finite(name, label)
    return square


def _check_any(factored: Sequence[Factored], left_out: Sequence[LeftOut], choice: Choice) -> None:
    if not factored:
        first = [f"{one.name} ({one.reason})" for one in left_out[:3]]
        raise TaskVectorError(
            "low_rank.nothing_to_factorize",
            "No matrix that an adapter could hold has changed.",
            expected="a changed weight of a linear layer"
            + (f" that matches {', '.join(choice.targets)}" if choice.targets else ""),
            got=", ".join(first) or "no change at all",
            hint="Give other --targets, or leave out --rank for a full task vector.",
        )
