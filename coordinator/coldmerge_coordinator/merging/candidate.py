"""Merging a sealed round: contributions and the fp32 master in, candidate blobs out.

Everything here can be thrown away and done again: blobs are named by their content, and
the same inputs give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.digests import Content
from coldmerge.core.documents import Manifest, TensorEntry
from coldmerge.core.dtypes import nbytes, size
from coldmerge.core.errors import IntegrityError
from coldmerge.core.task_vector import TaskVector
from coldmerge.merging import Input, Job, Pool
from coldmerge.merging.outer import Outer
from coldmerge.merging.pool import processors
from coldmerge.rounds.coefficients import Weights
from coldmerge.rounds.policy import MergePolicy
from coldmerge.rounds.statistics import statistics_for
from coldmerge.screening.report import Inner
from coldmerge.screening.scaled import Vector, scaled
from coldmerge.screening.shares import BOUNDED, Shares, bounded_shares
from coldmerge_coordinator.merging.likeness import Likeness
from coldmerge_coordinator.merging.outer_step import OuterStep, Place
from coldmerge_coordinator.merging.recipes import outer_of, recipe_with
from coldmerge_coordinator.merging.sources import Beat, Beating, Blobs
from coldmerge_coordinator.merging.tensor_sink import Stored, TensorSink
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.room import check_room
from coldmerge_coordinator.store.states import OuterState

MAX_THREADS = 16
"""Memory is O(threads), so that a large machine does not need more than a small one has."""


@dataclass(frozen=True)
class Sealed:
    """One frozen input: its manifest, its task vector file, and what that is multiplied by."""

    manifest: Manifest
    payload: Path
    factor: float = 1.0


@dataclass(frozen=True)
class Work:
    """All that a merge depends on: the base release with masters and state, inputs, recipe.

    `most_statistics`: how many times the median a contributor's statistics may be. `learned`:
    the coefficients that the round learned, by which the inputs' weights are multiplied.
    """

    base: Content
    masters: Mapping[str, str]
    state: OuterState | None
    inputs: Sequence[Sealed]
    policy: MergePolicy
    most_statistics: float | None = None
    learned: Weights | None = None


@dataclass(frozen=True)
class Candidate:
    """A merged release, durable in the blobs and not yet in the database.

    `note`: what an admin should know of the merge. `inner`: how alike its inputs were.
    """

    content: Content
    masters: dict[str, str]
    state: OuterState | None
    note: str | None
    inner: Inner | None = None


def build(blobs: BlobStore, work: Work, beat: Beat) -> Candidate:
    """Merge tensor by tensor; `beat` is called at least once a block, from any thread.

    The new master is float32(float64(master) + what the outer optimizer makes of τ), rounded
    once; what is published is its rendering in the base's type. Tensors that no input
    touches, and the optimizer does not move, keep their blobs.

    Raises:
        IntegrityError: an input's file is not what its manifest promised.
        CheckpointError: the result does not fit the published type.
        ConfigError: no such method or optimizer, or not with these parameters.
        ResourceError: the disk is too small.
    """
    vectors = [TaskVector.open(sealed.payload) for sealed in work.inputs]
    optimizer = outer_of(work.policy)
    step = OuterStep(blobs, optimizer, work.state)
    moved = frozenset(step.before.names).union(*(vector.names for vector in vectors))
    moving = [entry for entry in work.base.tensors if entry.name in moved]
    check_room(blobs.folder, _needed(moving, optimizer), "the candidate and its fp32 master")
    published, masters = dict(work.base.by_name), dict(work.masters)
    with Pool(min(processors(), MAX_THREADS)) as pool:
        pairs = list(zip(work.inputs, vectors, strict=True))
        pool.spread(lambda pair: _verify(*pair, beat), pairs)
        job = _job(blobs, work, _bounded(work, vectors, pool, beat))
        likeness = Likeness(job.inputs, sum(size(entry.shape) for entry in moving))
        job.survey(pool)
        for entry in moving:
            stored = _merge(
                blobs, Place(job, pool, likeness), step, entry, masters[entry.name], beat
            )
            published[entry.name] = entry.model_copy(update={"sha256": stored.published})
            masters[entry.name] = stored.master
    content = Content(tuple(published.values()), work.base.files)
    return Candidate(content, masters, step.after(), step.note, likeness.inner())


def _bounded(work: Work, vectors: Sequence[TaskVector], pool: Pool, beat: Beat) -> list[Vector]:
    """The task vectors within the bounds of the round's screening, in the order of the inputs."""
    watched = [Beating(vector, beat) for vector in vectors]
    shares: list[Shares] = [{} for _ in watched]
    asked = statistics_for(work.policy) & BOUNDED
    most = work.most_statistics or math.inf
    for kind in sorted(asked) if most < math.inf else ():
        found = bounded_shares(watched, kind, most, pool.spread)
        for own, more in zip(shares, found, strict=True):
            own |= more
    return [
        scaled(vector, sealed.factor, share)
        for sealed, vector, share in zip(work.inputs, watched, shares, strict=True)
    ]


def _job(blobs: BlobStore, work: Work, vectors: Sequence[Vector]) -> Job:
    """The merge of the published tensors, in the order of the manifests' content keys."""
    inputs = []
    for sealed, vector in zip(work.inputs, vectors, strict=True):
        weight = float(sealed.manifest.examples) if work.policy.weights == "examples" else 1.0
        manifest = sealed.manifest
        inputs.append(Input(manifest.content_key(), vector, weight, manifest.contributor))
    inputs.sort(key=lambda item: item.key)
    weighed = [(item.weight, item.label) for item in inputs]
    recipe = recipe_with(work.policy, work.learned, weighed)
    entries = [work.base.by_name[name] for name in work.masters]
    published = Blobs(blobs, {entry.name: (entry.sha256, entry.dtype) for entry in entries})
    return Job(published, {entry.name: entry.shape for entry in entries}, inputs, recipe)


def _verify(sealed: Sealed, vector: TaskVector, beat: Beat) -> None:
    """Compare every stored byte with what the contributor signed: disks fail too."""
    where = vector.difference(sealed.manifest.tensors, lambda _: beat())
    if where is not None:
        raise IntegrityError(
            "merge.input_corrupt",
            f"A stored contribution is not what its contributor signed: {where} differs.",
            hint="Restore `contributions/` from a backup, or abandon the round.",
            contributor=sealed.manifest.contributor,
            manifest=sealed.manifest.digest(),
            path=sealed.payload,
        )


def _merge(
    blobs: BlobStore,
    place: Place,
    step: OuterStep,
    entry: TensorEntry,
    master: str,
    beat: Beat,
) -> Stored:
    """Merge one tensor into its blobs, and its slots into theirs."""
    with TensorSink(blobs, entry.name, entry.dtype) as sink, step.tensor(entry, master) as moved:
        for theta in moved.blocks(place):
            sink.write(theta)
            beat()
        stored = sink.commit()
        moved.commit()
    beat()
    return stored


def _needed(moving: Sequence[TensorEntry], optimizer: Outer) -> int:
    needed = 0
    for entry in moving:
        needed += nbytes("F32", entry.shape) * (1 + len(optimizer.remembers))
        needed += 0 if entry.dtype == "F32" else entry.nbytes
    return needed
