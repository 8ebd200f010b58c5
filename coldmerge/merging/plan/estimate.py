"""What a merge will read, write and take, from a short measured piece of it."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.dtypes import FLOATS, NUMPY, Floats32, from_float32, nbytes, size
from coldmerge.core.files import existing
from coldmerge.core.task_vector import TaskVector
from coldmerge.merging.block import View
from coldmerge.merging.engine import Job
from coldmerge.merging.merger import Cut, Merger, Space
from coldmerge.merging.plan.inputs import Opened
from coldmerge.merging.plan.plan import Plan
from coldmerge.merging.plan.run import recipe
from coldmerge.merging.pool import Pool

SAMPLE = 2**22
"""Elements that are merged, and thrown away, to learn the pace."""

WRITE_BYTES_PER_SECOND = 1.2e9
"""A new file on a local disk; slower disks and networks are not known in advance."""


@dataclass(frozen=True)
class Estimate:
    """`bytes_read` counts what is read twice twice. `memory_bytes` and `seconds` are estimates."""

    tensors: int
    merged: int
    bytes_read: int
    bytes_written: int
    bytes_free: int
    memory_bytes: int
    seconds: float


def estimate(plan: Plan, opened: Opened, out: Path, threads: int | None = None) -> Estimate:
    """Measure a piece of the merge and say what the whole will take. Nothing is written.

    Raises:
        ConfigError: a parameter is unusable; with the line.
        TaskVectorError: the piece that was measured holds NaN.
    """
    if plan.makes_adapter:
        return _adapters(opened, out)
    base = opened.base
    shapes = {n: spec.shape for n, spec in base.tensors.items() if spec.dtype in FLOATS}
    job = Job(base, shapes, opened.inputs, recipe(plan, opened))
    written = sum(
        nbytes(plan.dtype if plan.dtype and name in shapes else spec.dtype, spec.shape)
        for name, spec in base.tensors.items()
    )
    with Pool(threads) as pool:
        pace = _pace(plan, opened, job, pool)
        memory = _memory(job, pool.threads)
    return Estimate(
        tensors=len(base.tensors),
        merged=len(job.names),
        bytes_read=_bytes_read(opened, job),
        bytes_written=written,
        bytes_free=shutil.disk_usage(existing(out)).free,
        memory_bytes=memory,
        seconds=pace * sum(_work(job, n) for n in job.names) + written / WRITE_BYTES_PER_SECOND,
    )


def _adapters(opened: Opened, out: Path) -> Estimate:
    """Factors are read and written once, and small: their pace is that of hashing them."""
    vectors = [item.source for item in opened.inputs if isinstance(item.source, TaskVector)]
    stored = sum(vector.payload_bytes for vector in vectors)
    began = time.perf_counter()
    for vector in vectors[:1]:
        vector.entries()
    pace = (time.perf_counter() - began) / max(1, sum(v.payload_bytes for v in vectors[:1]))
    names = frozenset[str]().union(*(item.source.names for item in opened.inputs))
    return Estimate(
        tensors=len(names),
        merged=len(names),
        bytes_read=stored,
        bytes_written=stored,
        bytes_free=shutil.disk_usage(existing(out)).free,
        memory_bytes=_resident() + 2 * stored,
        seconds=3 * pace * stored + stored / WRITE_BYTES_PER_SECOND,
    )


def _resident() -> int:
    """Bytes of memory that the process has now."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return now if sys.platform == "darwin" else now * 1024


def _bytes_read(opened: Opened, job: Job) -> int:
    """Every source once for the result, and once more where the method measures first."""
    measures = any(
        type(job.setting(name).merger).measure is not Merger.measure for name in job.names
    )
    reads_base = any(job.setting(name).merger.space is Space.DELTAS for name in job.names)
    stored = sum(spec.nbytes for spec in opened.base.tensors.values()) if reads_base else 0
    for item in opened.inputs:
        source = item.source
        if isinstance(source, TaskVector):
            stored += source.payload_bytes
        else:
            stored += sum(
                size(source.shape(n)) * NUMPY[opened.base.dtype(n)].itemsize for n in source.names
            )
    return stored * (2 if measures else 1)


def _memory(job: Job, threads: int) -> int:
    """What the process has now, blocks of every input for each thread, and whole tensors."""
    rows = len(job.inputs) + 6
    most = max((job.setting(name).merger.block for name in job.names), default=0)
    return _resident() + 4 * rows * (threads * most + job.largest_whole)


def _work(job: Job, name: str) -> int:
    """A measure of what a tensor costs: its elements, times its rank where it is taken whole."""
    block = job.block(name, 0, 0)
    shape = block.tensor_shape
    if job.setting(name).merger.cut is Cut.WHOLE and len(shape) > 1:
        return size(shape) * min(shape[0], size(shape[1:]))
    return size(shape)


def _pace(plan: Plan, opened: Opened, job: Job, pool: Pool) -> float:
    """Seconds for each unit of work."""
    names = list(_sample(job))
    began = time.perf_counter()

    def one(name: str) -> None:
        merger = job.setting(name).merger
        facts = merger.measure(View(job, [name], pool))
        dtype = plan.dtype or opened.base.dtype(name)

        def cut(place: tuple[int, int]) -> None:
            values: Floats32 = job.theta(job.block(name, *place), facts)
            hashlib.sha256(from_float32(values, dtype).tobytes())

        pool.spread(cut, job.cuts(name))

    pool.spread(one, names)
    return (time.perf_counter() - began) / max(1, sum(_work(job, name) for name in names))


def _sample(job: Job) -> Iterator[str]:
    """Tensors of at most `SAMPLE` elements together, the largest that fit; at least one."""
    room, none = SAMPLE, True
    for name in sorted(job.names, key=lambda name: (-job.size(name), name)):
        if job.size(name) <= room:
            room -= job.size(name)
            none = False
            yield name
    if none and job.names:
        yield min(job.names, key=lambda name: (job.size(name), name))
