"""Merging a sealed round: contributions and the fp32 master in, candidate blobs out.

Everything here can be thrown away and done again: blobs are named by their content, and
the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.digests import Content
from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.core.dtypes import Floats32, blocks, nbytes, size
from coldmerge.core.errors import IntegrityError, ResourceError
from coldmerge.core.files import CHUNK_BYTES, PositionalFile
from coldmerge.core.task_vector import TaskVector
from coldmerge.merging.engine import Input, merge_tensor
from coldmerge.merging.methods import merger
from coldmerge.rounds.policy import MergePolicy
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.tensor_sink import TensorSink

Beat = Callable[[], None]


@dataclass(frozen=True)
class Sealed:
    """One frozen input: its manifest and its task vector file."""

    manifest: Manifest
    payload: Path


@dataclass(frozen=True)
class Job:
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


class MasterSource:
    """The fp32 masters of a release, read a block at a time."""

    def __init__(self, blobs: BlobStore, masters: Mapping[str, str]) -> None:
        self._blobs, self._masters = blobs, masters

    def block(self, name: str, start: int, stop: int) -> Floats32:
        """Elements [start, stop) of the flattened master of `name`."""
        return self._blobs.block(self._masters[name], "F32", start, stop)


def build(blobs: BlobStore, job: Job, beat: Beat) -> Candidate:
    """Merge tensor by tensor; `beat` is called at least once a block.

    The new master is float32(float64(master) + τ), rounded once; what is published is its
    rendering in the base's type. Tensors that no input touches keep their blobs.

    Raises:
        IntegrityError: an input's file is not what its manifest promised.
        CheckpointError: the result does not fit the published type.
        ResourceError: the disk is too small.
    """
    vectors = [TaskVector.open(sealed.payload) for sealed in job.inputs]
    touched = frozenset[str]().union(*(vector.names for vector in vectors))
    _check_disk(blobs.folder, job.base, touched)
    inputs = []
    for sealed, vector in zip(job.inputs, vectors, strict=True):
        _verify(sealed, vector, beat)
        weight = float(sealed.manifest.examples) if job.policy.weights == "examples" else 1.0
        inputs.append(Input(sealed.manifest.digest(), vector, weight))
    tensors, masters = [], dict(job.masters)
    for entry in job.base.tensors:
        if entry.name in touched and entry.name in masters:
            entry, masters[entry.name] = _merge(blobs, job, entry, inputs, beat)
        tensors.append(entry)
    return Candidate(Content(tuple(tensors), job.base.files), masters)


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
    blobs: BlobStore, job: Job, entry: TensorEntry, inputs: Sequence[Input], beat: Beat
) -> tuple[TensorEntry, str]:
    master = MasterSource(blobs, job.masters)
    chosen = merger(job.policy.method)
    with TensorSink(blobs, entry.name, entry.dtype) as sink:
        for block in merge_tensor(entry.name, size(entry.shape), master, inputs, chosen):
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
