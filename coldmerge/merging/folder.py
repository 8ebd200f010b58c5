"""Merging into a model folder, which appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.algebra import check_fits, common_base
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import MAX_SHARD_BYTES, CheckpointWriter, Slots
from coldmerge.core.digests import Content, file_entries
from coldmerge.core.documents import TensorEntry
from coldmerge.core.dtypes import FLOATS, NUMPY, Floats32, blocks, from_float32, nbytes
from coldmerge.core.errors import ResourceError
from coldmerge.core.files import CHUNK_BYTES, existing
from coldmerge.core.header import Described
from coldmerge.core.progress import Advance, Counter, Progress, silent
from coldmerge.core.vector_writer import Planned
from coldmerge.merging.engine import Job, in_order
from coldmerge.merging.merger import Merger
from coldmerge.merging.pool import Pool
from coldmerge.merging.recipe import Recipe, uniform
from coldmerge.merging.sources import Input


def merge(
    base: Checkpoint,
    inputs: Sequence[Input],
    recipe: Recipe | Merger,
    out: Path | str,
    *,
    threads: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Content:
    """Merge `inputs` into the model folder `out` and give what its digest names.

    `recipe` may be a merger: it then merges every tensor, with the inputs' weights. `dtype`
    (`F32`, `F16`, `BF16`) is the type of the float tensors written, by default the base's
    own. The bytes do not depend on `threads` (default: all processors) or `engine`. Tensors that no
    input touches and files beside the weights are the base's, unless `extra_files` has the
    file. `progress` may raise to end the merge; nothing is left behind then.

    Raises:
        ConfigError: the inputs or parameters are unusable.
        TaskVectorError: an input does not fit the base, the inputs' bases differ, or a
            value is NaN or infinite.
        ConflictError: `out` exists and is not empty.
        ResourceError: the disk is too small.
    """
    if isinstance(recipe, Merger):
        ordered = sorted(inputs, key=lambda item: item.key)
        recipe = uniform(
            type(recipe), recipe.model_dump(by_alias=True), [i.weight for i in ordered]
        )
    shapes = {n: spec.shape for n, spec in base.tensors.items() if spec.dtype in FLOATS}
    common_base([item.source for item in in_order(inputs)])
    for item in inputs:
        check_fits(base, item.source)
    job = Job(base, shapes, inputs, recipe)
    job.check_statistics()
    planned = [
        Planned(name, dtype if dtype and name in shapes else spec.dtype, spec.shape)
        for name, spec in base.tensors.items()
    ]
    _check_disk(Path(out), planned)
    with CheckpointWriter(out, max_shard_bytes) as writer:
        writer.declare(planned)
        for path in base.files():
            writer.copy_file(base.folder / path, path)
        for name, data in (extra_files or {}).items():
            writer.write_file(name, data)
        work = Work(base, job, {entry.name: entry for entry in planned}, writer.slots)
        digests = (engine or on_this_machine)(work, threads, progress)
        for name in digests:
            writer.written_elsewhere(name)
    return Content(tuple(_entries(planned, digests)), file_entries(Checkpoint.open(out)))


@dataclass(frozen=True)
class Work:
    """The tensors of one merge on their way into a folder. It may be pickled."""

    base: Checkpoint
    job: Job
    planned: Mapping[str, Planned]
    slots: Slots

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(nbytes(entry.dtype, entry.shape) for entry in self.planned.values())

    def write(self, names: Sequence[str], pool: Pool, done: Advance) -> dict[str, str]:
        """Write the tensors `names` and give their sha256 by name."""
        digests: dict[str, str] = {}

        def tensor(name: str) -> None:
            if name in merged:
                self.job.tensor(name, pool, lambda at, theta: self._put(name, at, theta, done))
            else:
                self._copy(name, done)
            digests[name] = self.slots.digest(name)

        merged = frozenset(self.job.names)
        pool.spread(tensor, sorted(names, key=lambda name: (-self.size(name), name)))
        return digests

    def size(self, name: str) -> int:
        """Bytes that tensor `name` takes in the folder."""
        return nbytes(self.planned[name].dtype, self.planned[name].shape)

    def _put(self, name: str, at: int, theta: Floats32, done: Advance) -> None:
        dtype = self.planned[name].dtype
        data = from_float32(theta, dtype)
        done(self.slots.write_at(name, at * NUMPY[dtype].itemsize, data))

    def _copy(self, name: str, done: Advance) -> None:
        spec = self.base.tensors[name]
        if self.planned[name].dtype == spec.dtype:
            for start, stop in blocks(spec.nbytes, CHUNK_BYTES):
                done(self.slots.write_at(name, start, self.base.raw(name, start, stop)))
        else:
            for start, stop in blocks(spec.size):
                self._put(name, start, self.base.block(name, start, stop), done)


Engine = Callable[[Work, int | None, Progress], dict[str, str]]
"""Does all the work with so many threads, tells its progress, gives sha256 by tensor."""


def on_this_machine(work: Work, threads: int | None, progress: Progress) -> dict[str, str]:
    """The engine that uses this process's own threads."""
    count = Counter("merge", work.nbytes, progress)
    with Pool(threads) as pool:
        work.job.survey(pool)
        return work.write(list(work.planned), pool, count.add)


def _entries(planned: Iterable[Described], digests: Mapping[str, str]) -> list[TensorEntry]:
    return [
        TensorEntry(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            sha256=digests[entry.name],
            nbytes=nbytes(entry.dtype, entry.shape),
        )
        for entry in sorted(planned, key=lambda entry: entry.name)
    ]


def _check_disk(out: Path, planned: Sequence[Planned]) -> None:
    needed = sum(nbytes(entry.dtype, entry.shape) for entry in planned)
    free = shutil.disk_usage(existing(out)).free
    if needed > free:
        raise ResourceError(
            "merge.output_too_large",
            "The disk is too small for the merged model.",
            expected=f"{needed} bytes free",
            got=f"{free} bytes",
            hint="Free some space, or write to another disk.",
            path=out,
        )
