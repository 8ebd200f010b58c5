"""Merging into a model folder, which appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from coldmerge.core.algebra import check_fits, common_base
from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import MAX_SHARD_BYTES, CheckpointWriter
from coldmerge.core.digests import Content, file_digest
from coldmerge.core.documents import FileEntry, TensorEntry
from coldmerge.core.dtypes import FLOATS, NUMPY, Floats32, blocks, from_float32, nbytes
from coldmerge.core.errors import ResourceError
from coldmerge.core.files import CHUNK_BYTES
from coldmerge.core.header import Described
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge.core.vector_writer import Planned
from coldmerge.merging.engine import Job
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
    progress: Progress = silent,
) -> Content:
    """Merge `inputs` into the model folder `out` and give what its digest names.

    `recipe` may be a merger: it then merges every tensor, with the inputs' weights. `dtype`
    (`F32`, `F16`, `BF16`) is the type of the float tensors written, by default the base's
    own. The bytes do not depend on `threads` (default: all processors). Tensors that no
    input touches and files beside the weights are the base's. `progress` may raise to end
    the merge; nothing is left behind then.

    Raises:
        ConfigError: the inputs or parameters are unusable.
        TaskVectorError: an input does not fit the base, the inputs' bases differ, or a
            value is NaN or infinite.
        ConflictError: `out` exists and is not empty.
        ResourceError: the disk is too small.
    """
    if isinstance(recipe, Merger):
        ordered = sorted(inputs, key=lambda item: item.key)
        recipe = uniform(type(recipe), recipe.model_dump(by_alias=True), [i.weight for i in ordered])
    shapes = {n: spec.shape for n, spec in base.tensors.items() if spec.dtype in FLOATS}
    job = Job(base, shapes, inputs, recipe)
    common_base([item.source for item in job.inputs])
    for item in job.inputs:
        check_fits(base, item.source)
    planned = [
        Planned(name, dtype if dtype and name in shapes else spec.dtype, spec.shape)
        for name, spec in base.tensors.items()
    ]
    _check_disk(Path(out), planned)
    with CheckpointWriter(out, max_shard_bytes) as writer, Pool(threads) as pool:
        writer.declare(planned)
        for path in base.files():
            writer.copy_file(base.folder / path, path)
        for name, data in (extra_files or {}).items():
            writer.write_file(name, data)
        return _Merge(base, job, writer, planned, pool, progress).run()


class _Merge:
    def __init__(
        self,
        base: Checkpoint,
        job: Job,
        writer: CheckpointWriter,
        planned: Sequence[Planned],
        pool: Pool,
        progress: Progress,
    ) -> None:
        self._base, self._job, self._writer, self._pool = base, job, writer, pool
        self._planned = {entry.name: entry for entry in planned}
        self._count = Counter("merge", sum(nbytes(e.dtype, e.shape) for e in planned), progress)

    def run(self) -> Content:
        digests: dict[str, str] = {}
        touched = frozenset(self._job.names)

        def tensor(name: str) -> None:
            self._job.tensor(name, self._pool, lambda at, values: self._put(name, at, values))
            digests[name] = self._writer.digest(name)

        def copy(name: str) -> None:
            self._copy(name)
            digests[name] = self._writer.digest(name)

        self._job.all_tensors(self._pool, tensor)
        self._pool.spread(copy, [name for name in self._planned if name not in touched])
        return Content(tuple(_entries(self._planned.values(), digests)), self._files())

    def _put(self, name: str, at: int, values: Floats32) -> None:
        dtype = self._planned[name].dtype
        data = from_float32(values, dtype)
        self._writer.write_at(name, at * NUMPY[dtype].itemsize, data)
        self._count.add(data.nbytes)

    def _copy(self, name: str) -> None:
        spec, dtype = self._base.tensors[name], self._planned[name].dtype
        if dtype == spec.dtype:
            for start, stop in blocks(spec.nbytes, CHUNK_BYTES):
                self._writer.write(name, self._base.raw(name, start, stop))
                self._count.add(stop - start)
        else:
            for start, stop in blocks(spec.size):
                self._put(name, start, self._base.block(name, start, stop))

    def _files(self) -> tuple[FileEntry, ...]:
        found = []
        for path in self._base.files():
            digest, length = file_digest(self._base.folder / path)
            found.append(FileEntry(path=path.as_posix(), size=length, sha256=digest))
        return tuple(sorted(found, key=lambda entry: entry.path))


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
    folder = next(parent for parent in [out.absolute(), *out.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            "merge.output_too_large",
            "The disk is too small for the merged model.",
            expected=f"{needed} bytes free",
            got=f"{free} bytes",
            hint="Free some space, or write to another disk.",
            path=out,
        )
