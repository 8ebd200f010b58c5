"""Merging a sealed round: contributions and the fp32 master in, candidate blobs out.

Everything here can be thrown away and done again: blobs are named by their content, and
the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.digests import Content
from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.core.dtypes import blocks, nbytes
from coldmerge.core.errors import IntegrityError, ResourceError
from coldmerge.core.files import CHUNK_BYTES, PositionalFile
from coldmerge.core.task_vector import TaskVector
from coldmerge.merging import Input, Job, Pool, merger_class, uniform
from coldmerge.merging.pool import processors
from coldmerge.rounds.policy import MergePolicy
from coldmerge_coordinator.sources import Beat, Beating, Blobs
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.tensor_sink import TensorSink

MAX_THREADS = 16
"""Memory is O(threads), so that a large machine does not need more than a small one has."""


@dataclass(frozen=True)
class Sealed:
    """One frozen input: its manifest and its task vector file."""

    manifest: Manifest
    payload: Path


@dataclass(frozen=True)
class Work:
    """All that a merge depends on: the base release, its masters, the inputs, the recipe."""

    base: Content
    masters: Mapping[str, str]
    inputs: Sequence[Sealed]
    policy: MergePolicy


@dataclass(frozen=True)
class Candidate:
    """A merged release, durable in the blobs and not yet in the database."""

    content: Content
    masters: dict[str, str]


def build(blobs: BlobStore, work: Work, beat: Beat) -> Candidate:
    """Merge tensor by tensor; `beat` is called at least once a block, from any thread.

    The new master is float32(float64(master) + τ), rounded once; what is published is its
    rendering in the base's type. Tensors that no input touches keep their blobs.

    Raises:
        IntegrityError: an input's file is not what its manifest promised.
        CheckpointError: the result does not fit the published type.
        ConfigError: there is no such method, or not with these parameters.
        ResourceError: the disk is too small.
    """
    vectors = [TaskVector.open(sealed.payload) for sealed in work.inputs]
    touched = frozenset[str]().union(*(vector.names for vector in vectors))
    _check_disk(blobs.folder, work.base, touched)
    for sealed, vector in zip(work.inputs, vectors, strict=True):
        _verify(sealed, vector, beat)
    job = _job(blobs, work, vectors, beat)
    tensors, masters = [], dict(work.masters)
    with Pool(min(processors(), MAX_THREADS)) as pool:
        job.survey(pool)
        for entry in work.base.tensors:
            if entry.name in touched and entry.name in masters:
                entry, masters[entry.name] = _merge(blobs, work, entry, job, pool, beat)
            tensors.append(entry)
    return Candidate(Content(tuple(tensors), work.base.files), masters)


def _job(blobs: BlobStore, work: Work, vectors: Sequence[TaskVector], beat: Beat) -> Job:
    """The merge of the published tensors, in the order of the manifests' digests."""
    inputs = []
    for sealed, vector in zip(work.inputs, vectors, strict=True):
        weight = float(sealed.manifest.examples) if work.policy.weights == "examples" else 1.0
        key = sealed.manifest.digest()
        inputs.append(Input(key, Beating(vector, beat), weight, sealed.manifest.contributor))
    inputs.sort(key=lambda item: item.key)
    recipe = uniform(
        merger_class(work.policy.method),
        work.policy.parameters,
        [item.weight for item in inputs],
    )
    entries = [work.base.by_name[name] for name in work.masters]
    published = Blobs(blobs, {entry.name: (entry.sha256, entry.dtype) for entry in entries})
    return Job(published, {entry.name: entry.shape for entry in entries}, inputs, recipe)


def _verify(sealed: Sealed, vector: TaskVector, beat: Beat) -> None:
    """Compare every stored byte with what the contributor signed: disks fail too."""
    specs = [(spec.name, spec.dtype, spec.shape) for spec in vector.specs.values()]
    promised = [(entry.name, entry.dtype, entry.shape) for entry in sealed.manifest.tensors]
    if specs != promised:
        raise _corrupt(sealed, "its list of tensors")
    with PositionalFile(sealed.payload) as file:
        for entry in sealed.manifest.tensors:
            found = hashlib.sha256()
            at = vector.payload_start + vector.specs[entry.name].start
            for start, stop in blocks(entry.nbytes, CHUNK_BYTES):
                found.update(file.read(at + start, at + stop))
                beat()
            if found.hexdigest() != entry.sha256:
                raise _corrupt(sealed, f"tensor {entry.name}")


def _corrupt(sealed: Sealed, where: str) -> IntegrityError:
    return IntegrityError(
        "merge.input_corrupt",
        f"A stored contribution is not what its contributor signed: {where} differs.",
        hint="Restore `contributions/` from a backup, or abandon the round.",
        contributor=sealed.manifest.contributor,
        manifest=sealed.manifest.digest(),
        path=sealed.payload,
    )


def _merge(
    blobs: BlobStore, work: Work, entry: TensorEntry, job: Job, pool: Pool, beat: Beat
) -> tuple[TensorEntry, str]:
    masters = Blobs(blobs, {entry.name: (work.masters[entry.name], "F32")})
    with TensorSink(blobs, entry.name, entry.dtype) as sink:
        for block in job.tensor_in_order(entry.name, pool, onto=masters):
            sink.write(block)
            beat()
        stored = sink.commit()
    beat()
    return entry.model_copy(update={"sha256": stored.published}), stored.master


def _check_disk(folder: Path, base: Content, touched: frozenset[str]) -> None:
    needed = 0
    for entry in base.tensors:
        if entry.name in touched:
            needed += nbytes("F32", entry.shape)
            needed += 0 if entry.dtype == "F32" else entry.nbytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            "merge.disk_too_small",
            "The coordinator's disk is too small for the candidate and its fp32 master.",
            expected=f"{needed} bytes free",
            got=f"{free} bytes",
            hint="Free some space on the coordinator; the merge then goes on by itself.",
            folder=folder,
        )
