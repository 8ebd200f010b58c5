"""Extraction: what a fine-tuned folder changed against a release, as a task vector file.

One block of one tensor is in memory at a time. What may leave is an allow-list: tensors
of the release that are not private. Everything else stays at home, and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldmerge.core.adapters import CONFIG, Adapter, Target
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.documents import TensorEntry
from coldmerge.core.dtypes import Floats32, blocks, from_float32, size, to_float32
from coldmerge.core.errors import TaskVectorError
from coldmerge.core.matching import Matching, match_folder, sort_out
from coldmerge.core.progress import Advance
from coldmerge.core.task_vector import TaskVector, sum_of_squares
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

    def stored(self, adapter: Adapter | None) -> list[tuple[str, tuple[int, ...]]]:
        """Keys and shapes that this job may write."""
        if self.target is None or adapter is None:
            return [(self.name, self.shape)]
        a, b = adapter.shapes(self.target, self.shape)
        return [(f"{self.name}.lora_A", a), (f"{self.name}.lora_B", b)]


def extract(
    base: Checkpoint,
    tuned: Path | str,
    out: Path | str,
    *,
    base_digest: str,
    private: Sequence[str] = (),
    encoding: str = "fp32",
    progress: Advance | None = None,
) -> Extraction:
    """Write the task vector of `tuned` (a model folder or a PEFT adapter folder) to `out`.

    `private` are patterns of tensors that never leave; `encoding` is `fp32` or `bf16`.
    `progress` is called with the number of elements done since the last call.

    Raises:
        CheckpointError: a folder cannot be read.
        TaskVectorError: shapes differ, a value is NaN or Inf, the adapter is of another
            kind, or nothing changed.
    """
    tuned, out = Path(tuned), Path(out)
    if (tuned / CONFIG).is_file():
        return _extract_adapter(base, tuned, out, base_digest, private, encoding, progress)
    model = Checkpoint.open(tuned)
    matching = match_folder(base, model, private)
    jobs = [_Job(name, base.shape(name), source) for name, source in sorted(matching.pairs.items())]
    with VectorWriter(
        out,
        [pair for job in jobs for pair in job.stored(None)],
        kind="full",
        encoding=encoding,
        base_digest=base_digest,
        scaling={},
    ) as writer:
        squares = {job.name: _write_full(base, model.block, job, writer, progress) for job in jobs}
        _check_changed(writer, tuned, matching)
    return _result(writer.open(), matching, squares)


def _extract_adapter(
    base: Checkpoint,
    folder: Path,
    out: Path,
    base_digest: str,
    private: Sequence[str],
    encoding: str,
    progress: Advance | None,
) -> Extraction:
    adapter = Adapter(folder)
    targets = {target.weight: target for target in adapter.targets.values()}
    specs = dict(adapter.whole)
    for weight, target in targets.items():
        specs[weight] = adapter.specs[target.a]
    matching = sort_out(base, specs, folder, private, deltas=frozenset(targets))
    jobs = [
        _Job(name, base.shape(name), source, targets.get(source))
        for name, source in matching.pairs.items()
    ]
    jobs.sort(key=lambda job: job.stored(adapter)[0])
    with VectorWriter(
        out,
        [pair for job in jobs for pair in job.stored(adapter)],
        kind="lora",
        encoding=encoding,
        base_digest=base_digest,
        scaling={job.name: job.target.scaling for job in jobs if job.target},
    ) as writer:
        squares = {}
        for job in jobs:
            if job.target is None:
                squares[job.name] = _write_full(base, adapter.values, job, writer, progress)
            else:
                squares[job.name] = _write_factors(adapter, job, job.target, writer, progress)
        _check_changed(writer, folder, matching)
    return _result(writer.open(), matching, squares)


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


def _write_full(
    base: Checkpoint, read: Read, job: _Job, writer: VectorWriter, progress: Advance | None
) -> float:
    """Append one full delta; gives the sum of the squares of what was stored."""
    total = 0.0
    for delta in _deltas(base, read, job):
        stored = to_float32(from_float32(delta, writer.dtype))
        square = sum_of_squares(stored)
        _check_finite(square, job)
        total += square
        writer.append(stored)
        if progress:
            progress(len(delta))
    if total > 0:
        writer.keep(job.name, job.shape)
    else:
        writer.drop()
    return total


def _deltas(base: Checkpoint, read: Read, job: _Job) -> Iterator[Floats32]:
    for start, stop in blocks(size(job.shape)):
        tuned = read(job.source, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # _check_finite says it better
            yield tuned - base.block(job.name, start, stop)


def _write_factors(
    adapter: Adapter, job: _Job, target: Target, writer: VectorWriter, progress: Advance | None
) -> float:
    factors = adapter.factors(target, job.shape)
    squares = [sum_of_squares(factor.reshape(-1)) for factor in factors]
    for square in squares:
        _check_finite(square, job)
    if all(squares):
        for factor, (key, shape) in zip(factors, job.stored(adapter), strict=True):
            writer.append(factor.reshape(-1))
            writer.keep(key, shape)
    if progress:
        progress(size(job.shape))
    return 0.0


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
