"""Extraction: what a fine-tuned folder changed against a release, as a task vector file.

One block of one tensor is in memory at a time. What may leave is an allow-list: tensors
of the release that are not private. Everything else stays at home, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from coldmerge.core.adapters import Adapter, Target, is_adapter
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import Statistic, TensorEntry
from coldmerge.core.dtypes import Floats32, blocks, size
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.matching import Matching, match_adapter, match_folder
from coldmerge.core.names import split_key
from coldmerge.core.progress import Advance
from coldmerge.core.selection import kept, kth_magnitude
from coldmerge.core.statistics import NOTHING, Wanted, statistic_shape
from coldmerge.core.task_vector import Expansion, TaskVector, sum_of_squares
from coldmerge.core.vector_writer import VectorWriter

Read = Callable[[str, int, int], Floats32]


@dataclass(frozen=True)
class Extraction:
    """A task vector and the account of what is not in it.

    `kept_home`: (tensor, reason) for all that stays; `unchanged`: release tensors whose
    delta is zero; `missing`: release tensors that the fine-tune does not hold; `norm`: L2
    norm of what is shipped.
    """

    task_vector: TaskVector
    kept_home: tuple[tuple[str, str], ...]
    unchanged: tuple[str, ...]
    missing: tuple[str, ...]
    norm: float

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What would leave, tensor by tensor, with hashes."""
        return self.task_vector.entries()


@dataclass(frozen=True)
class _Job:
    """One release tensor to write: its name, the fine-tune's name, or a LoRA target."""

    name: str
    shape: tuple[int, ...]
    source: str = ""
    target: Target | None = None


class _Piece(NamedTuple):
    """One tensor of the file that may be written. `part` is as in `names.split_key`."""

    key: str
    shape: tuple[int, ...]
    job: _Job
    part: str


def extract(
    base: Checkpoint,
    tuned: Path | str,
    out: Path | str,
    *,
    base_digest: str,
    private: Sequence[str] = (),
    encoding: str = "fp32",
    statistics: Wanted = NOTHING,
    progress: Advance | None = None,
) -> Extraction:
    """Write the task vector of `tuned` (a model folder or a PEFT adapter folder) to `out`.

    `private` are patterns of tensors that never leave; `encoding` is `fp32` or `bf16`.
    `statistics` are shipped of the tensors that are shipped, and of no other.
    `progress` is called with the number of elements done since the last call.

    Raises:
        CheckpointError: a folder cannot be read.
        TaskVectorError: shapes differ, a value is NaN or Inf, the adapter is of another
            kind, nothing changed, or a statistic is missing.
    """
    tuned, out = Path(tuned), Path(out)
    adapter = Adapter(tuned) if is_adapter(tuned) else None
    read: Read
    targets: dict[str, Target] = {}
    if adapter is None:
        model = Checkpoint.open(tuned)
        read, matching = model.block, match_folder(base, model, private)
    else:
        read = adapter.values
        matching, targets = match_adapter(base, adapter, private)
    jobs = [
        _Job(name, base.shape(name), source, targets.get(name))
        for name, source in matching.pairs.items()
    ]
    _check_names(jobs, statistics)
    pieces = sorted(piece for job in jobs for piece in _pieces(job, adapter, statistics))
    with VectorWriter(
        out,
        [(piece.key, piece.shape) for piece in pieces],
        kind="full" if adapter is None else "lora",
        encoding=encoding,
        base_digest=base_digest,
        scaling={job.name: job.target.scaling for job in jobs if job.target},
        statistics=statistics.counts,
    ) as writer:
        work = _Work(base, read, adapter, writer, statistics, progress)
        for piece in pieces:
            work.write(piece)
        _check_changed(writer, tuned, matching)
        work.check_statistics()
    return _result(writer.open(), matching, work.squares)


def _pieces(job: _Job, adapter: Adapter | None, wanted: Wanted) -> Iterator[_Piece]:
    """What may be written of one release tensor."""
    if job.target is None or adapter is None:
        yield _Piece(job.name, job.shape, job, "")
    else:
        for part, extents in zip("AB", adapter.shapes(job.target, job.shape), strict=True):
            yield _Piece(f"{job.name}.lora_{part}", extents, job, part)
    for kind in wanted.counts:
        shape = statistic_shape(kind, job.shape)
        if wanted.has(job.name, kind, job.shape) and shape is not None:
            yield _Piece(f"{job.name}.{kind}", shape, job, kind)


def _result(vector: TaskVector, matching: Matching, squares: dict[str, float]) -> Extraction:
    for name in vector.names:
        if vector.is_lora(name):
            squares[name] = vector.square(name)
    return Extraction(
        task_vector=vector,
        kept_home=matching.kept_home,
        unchanged=tuple(sorted(set(matching.pairs) - vector.names)),
        missing=matching.missing,
        norm=math.sqrt(math.fsum(squares[name] for name in sorted(vector.names))),
    )


class _Work:
    """An extraction under way, in the order of the file.

    A full delta comes before its statistics; of a LoRA target the factors are read when the
    first of its pieces comes, to know whether it is shipped at all, and dropped after the last.
    """

    def __init__(
        self,
        base: Checkpoint,
        read: Read,
        adapter: Adapter | None,
        writer: VectorWriter,
        wanted: Wanted,
        progress: Advance | None,
    ) -> None:
        self.squares: dict[str, float] = {}
        self._base, self._read, self._adapter = base, read, adapter
        self._writer, self._wanted, self._progress = writer, wanted, progress
        self._factors: dict[str, tuple[Floats32, Floats32]] = {}
        self._shipped: dict[str, bool] = {}
        self._trims: dict[str, np.float32] = {}
        self._written: dict[str, set[str]] = {}

    def write(self, piece: _Piece) -> None:
        """Append one piece, if its tensor is shipped."""
        job, part = piece.job, piece.part
        if part == "":
            self._full(job)
        elif self._ships(job):
            self._rest(piece)
        if self._shipped[job.name]:
            self._writer.keep(piece.key, piece.shape)
            self._written.setdefault(part, set()).add(job.name)
        else:
            self._writer.drop()

    def check_statistics(self) -> None:
        """Hold what was written against what is wanted.

        Raises:
            TaskVectorError: a statistic of a tensor that is shipped is missing.
        """
        shipped = self._written.get("", set()) | self._written.get("A", set())
        for kind in self._wanted.counts:
            missing = shipped - self._written.get(kind, set())
            if missing and (kind != "gram" or missing == shipped):
                whose = "at least one linear layer" if kind == "gram" else "each tensor"
                raise TaskVectorError(
                    "extract.no_statistic",
                    f"The fine-tune has no {kind} of tensor {min(missing)}.",
                    expected=f"one of {whose} that is shipped",
                    got=f"of {len(shipped) - len(missing)} of {len(shipped)} tensors",
                    hint="Measure again with `coldmerge train`; docs/training.md says how.",
                )

    def _full(self, job: _Job) -> None:
        """Append one full delta, and note the sum of the squares of what was stored."""
        total = 0.0
        for delta in _deltas(self._base, self._read, job):
            stored = self._writer.as_stored(delta)
            square = sum_of_squares(stored)
            _check_finite(square, job)
            total += square
            self._writer.append(stored)
            if self._progress:
                self._progress(len(delta))
        self.squares[job.name] = total
        self._shipped[job.name] = total > 0
        if total > 0:
            self._trim(job, self._writer.current)

    def _ships(self, job: _Job) -> bool:
        """Whether a tensor is shipped; a LoRA target's factors are read to know it."""
        if job.name not in self._shipped and job.target is not None and self._adapter is not None:
            factors = self._adapter.factors(job.target, job.shape)
            squares = [sum_of_squares(factor.reshape(-1)) for factor in factors]
            for square in squares:
                _check_finite(square, job)
            self._shipped[job.name] = all(squares)
            self._factors[job.name] = factors
            if self._progress:
                self._progress(size(job.shape))
        return self._shipped[job.name]

    def _rest(self, piece: _Piece) -> None:
        """Append a factor or a statistic."""
        job, part, measured = piece.job, piece.part, self._wanted.measured
        if part == "A":
            self._writer.append(self._factors[job.name][0].reshape(-1))
        elif part == "B":
            self._writer.append(self._factors[job.name][1].reshape(-1))
            self._trim(job, self._product(job))
        elif part == "trim" or measured is None:
            self._writer.append_statistic(np.array([self._trims.pop(job.name)]))
        else:
            for start, stop in blocks(size(piece.shape)):
                values = measured.block(job.name, cast(Statistic, part), start, stop)
                self._writer.append_statistic(values)

    def _product(self, job: _Job) -> Callable[[int, int], Floats32]:
        """A reader of s·B@A, from the factors as they are stored."""
        factors = self._factors.pop(job.name)
        a, b = map(self._writer.as_stored, factors)
        flat, scaling = b.reshape(-1), job.target.scaling if job.target else 1.0
        return Expansion(a.reshape(len(a), -1), lambda i, j: flat[i:j], len(b), scaling).block

    def _trim(self, job: _Job, read: Callable[[int, int], Floats32]) -> None:
        """Note the trim threshold of a delta as it is stored, where one is wanted."""
        if self._wanted.density is not None:
            count = size(job.shape)
            k = kept(self._wanted.density, count)
            self._trims[job.name] = kth_magnitude(read, count, k)


def _deltas(base: Checkpoint, read: Read, job: _Job) -> Iterator[Floats32]:
    for start, stop in blocks(size(job.shape)):
        tuned = read(job.source, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # _check_finite says it better
            yield tuned - base.block(job.name, start, stop)


def _check_names(jobs: Sequence[_Job], wanted: Wanted) -> None:
    for job in jobs:
        about, kind = split_key(job.name, wanted.counts)
        if kind in wanted.counts:
            raise TaskVectorError(
                "extract.reserved_name",
                f"Tensor {job.name} is called as the {kind} of tensor {about} would be.",
                expected=f"no tensor of the release that ends in .{kind}",
                hint="The round's merge method cannot be used with this model; tell the admin.",
                tensor=job.name,
            )


def _check_finite(square: float, job: _Job) -> None:
    if not math.isfinite(square):
        raise TaskVectorError(
            "extract.not_finite",
            f"The change of tensor {job.name} holds NaN or Inf.",
            expected="finite values",
            hint="The training diverged; train again with a smaller learning rate.",
            tensor=job.source or job.name,
        )


def _check_changed(writer: VectorWriter, folder: Path, matching: Matching) -> None:
    if writer.kept == 0:
        raise TaskVectorError(
            "extract.nothing_changed",
            "The fine-tuned folder changes no tensor of the release that may leave.",
            expected="at least one changed, non-private tensor",
            got=f"{len(matching.pairs)} equal, {len(matching.kept_home)} kept at home",
            hint="Check that the folder holds the trained weights and not the pulled ones.",
            folder=folder,
        )
