"""What a merge works on, read from the store; and merges of several rounds, one on the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.orm import Session

from coldmerge.core.digests import Content
from coldmerge.core.files import PositionalFile
from coldmerge_coordinator.merging.candidate import Candidate, Sealed, Work, build
from coldmerge_coordinator.merging.sources import Beat
from coldmerge_coordinator.store import (
    Store,
    contributions,
    learned,
    releases,
    rounds,
    screening,
    states,
)
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.lineage import Step, replay_of
from coldmerge_coordinator.store.models import Release, Round
from coldmerge_coordinator.store.states import OuterState


@dataclass(frozen=True)
class Base:
    """What a merge starts from: a release's content, its masters, and the outer state."""

    content: Content
    masters: dict[str, str]
    state: OuterState | None


def base_of(session: Session, row: Release) -> Base:
    """A release as a base."""
    return Base(
        releases.get_listing(session, row.content_digest),
        releases.get_masters(session, row.master_digest),
        states.get_state(session, row.state_digest) if row.state_digest else None,
    )


@dataclass(frozen=True)
class Job:
    """Merges to do, one on the other, from `base` on; `again`: those of earlier rounds."""

    base: Base
    works: tuple[Work, ...]
    again: bool


def job_of(store: Store, session: Session, row: Round, beat: Beat) -> Job:
    """What a sealed round merges: its own inputs, or what a re-merge repeats in its order."""
    again = replay_of(row)
    number = row.base_number if again is None else again.start
    base = base_of(session, releases.get_release(session, row.model, number))
    own = (Step(row.id, tuple(contributions.kept(row))),)
    steps = own if again is None else again.steps
    works = tuple(_work(store, session, base, step, beat) for step in steps)
    return Job(base, works, again is not None)


def _work(store: Store, session: Session, base: Base, step: Step, beat: Beat) -> Work:
    row = session.get_one(Round, step.round)
    inputs = contributions.of_digests(session, row, step.inputs)
    factors = screening.factors_of(session, inputs)
    sealed = [
        Sealed(
            contributions.get_manifest(item),
            store.payloads.local(item.payload, beat),
            factors[item.manifest_digest],
        )
        for item in inputs
    ]
    policy = rounds.get_policy(row)
    most = policy.screening.statistics
    learnt = learned.weights_of(row)
    return Work(base.content, base.masters, base.state, sealed, policy.merge, most, learnt)


class Overlay(BlobStore):
    """Blobs that are written beside others: what is not here is read there."""

    def __init__(self, folder: Path, under: BlobStore) -> None:
        super().__init__(folder)
        self.under = under

    def open(self, sha256: str) -> PositionalFile:
        """A blob of either."""
        return super().open(sha256) if self.path(sha256).exists() else self.under.open(sha256)

    def keep_only(self, candidate: Candidate) -> None:
        """Remove what `candidate` is not made of."""
        needed = blobs_of(candidate)
        for path in self.folder.glob("??/*"):
            if path.name not in needed:
                path.unlink()


def blobs_of(candidate: Candidate) -> set[str]:
    """The digests of all that a candidate consists of."""
    found = {entry.sha256 for entry in candidate.content.tensors}
    slots = candidate.state.slots.values() if candidate.state else ()
    return found.union(candidate.masters.values(), *(slot.values() for slot in slots))


@contextmanager
def merged(
    blobs: BlobStore, job: Job, scratch: Path, beat: Beat
) -> Iterator[tuple[Candidate, Overlay]]:
    """Merge one after the other in a folder below `scratch`, which is removed at the end.

    No more than two models' worth of blobs is there at a time.
    """
    found = Candidate(job.base.content, dict(job.base.masters), job.base.state, None)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="merge-") as folder:
        overlay = Overlay(Path(folder), blobs)
        for work in job.works:
            onto = replace(work, base=found.content, masters=found.masters, state=found.state)
            found = build(overlay, onto, beat)
            overlay.keep_only(found)
        yield found, overlay


def merge_round(store: Store, round_id: str, beat: Beat) -> Candidate:
    """Merge a sealed round into the store's blobs.

    Raises:
        ColdmergeError: see `candidate.build`.
    """
    with store.database.read(patient=True) as session:
        job = job_of(store, session, rounds.get(session, round_id), beat)
    blobs = store.blobs.watched(beat)
    if not job.again:
        return build(blobs, job.works[0], beat)
    with merged(blobs, job, store.folder, beat) as (candidate, overlay):
        for sha256 in sorted(blobs_of(candidate)):
            if overlay.path(sha256).exists():
                _copy(overlay, blobs, sha256, beat)
    return candidate


def _copy(source: BlobStore, target: BlobStore, sha256: str, beat: Beat) -> None:
    with target.writer() as writer:
        for chunk in source.chunks(sha256):
            writer.write(chunk)
            beat()
        writer.commit()
