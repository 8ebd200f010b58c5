"""Whether a release is what its record says: signatures, bytes, and the merge done again.

Reads a coordinator's folder, served or not, or one restored from a backup, and changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core import dtypes
from coldmerge.core.digests import Content, master_digest
from coldmerge.core.documents import Manifest, ReleaseRecord, Signed, verify
from coldmerge.core.errors import ColdmergeError, IntegrityError, ManifestError, NotFoundError
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge_coordinator.merging.candidate import Candidate
from coldmerge_coordinator.merging.works import Base, base_of, job_of, merged
from coldmerge_coordinator.store import Store, continuous, keys, learned, releases, rounds, states
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.models import Contribution, Machine, Release, Round
from coldmerge_coordinator.store.releases import Recipe

Answer = Literal["exact", "within-tolerance", "inputs-erased", "different"]
TOLERANCE = 1e-4
"""How far a merge by another processor or BLAS may be off: this share of the largest change that
the release made to the tensor, and one unit in the last place of its largest weight."""

ROUNDED_OTHERWISE = 1e-12
"""By what share a discount may differ where it was worked out by another C library."""


@dataclass
class Verified:
    """The answer, and what it rests on.

    `problems` make it `different`. `largest`: the largest difference of a weight, where the
    merge done again is not the same to the bit. `signatures`: how many contributions are
    signed by a machine that is still known, of how many.
    """

    model: str
    number: int
    answer: Answer = "exact"
    problems: list[str] = field(default_factory=list)
    erased: list[str] = field(default_factory=list)
    merged: int = 0
    signatures: tuple[int, int] = (0, 0)
    largest: float = 0.0
    note: str | None = None


def verify_release(
    store: Store,
    model: str,
    number: int | None,
    scratch: Path,
    *,
    progress: Progress = silent,
) -> Verified:
    """Check release `number` (None: the latest) of `model`, and merge it again below `scratch`.

    Raises:
        NotFoundError: no such model or release.
        ResourceError: the disk is too small for another copy of the model.
    """
    with store.database.read(patient=True) as session:
        row = (
            releases.latest_release(session, model)
            if number is None
            else releases.get_release(session, model, number)
        )
        found = Verified(model, row.number)
        found.problems += _record(session, store, row)
        found.problems += _bytes(session, store.blobs, row, progress)
        record = releases.get_record(row)
        inputs = _inputs(session, record)
        found.problems += _signed(session, record, inputs, found)
        found.problems += _stale(session, record, inputs)
        found.problems += _learned(session, record)
        found.erased = _erased(store, inputs)
        if record.round is None:
            found.problems += _repeats(session, row, record)
            found.note = "an import or a rollback: nothing was merged"
    if found.problems:
        found.answer = "different"
    elif found.erased:
        found.answer = "inputs-erased"
    elif record.round is not None:
        _merge(store, row, record, scratch, found, progress)
    return found


def _record(session: Session, store: Store, row: Release) -> Iterator[str]:
    """The record's signature and fields, and the chain of records before it."""
    ring = keys.keyring(session, store.signer)
    before: str | None = None
    for release in releases.list_releases(session, row.model):
        if release.number > row.number:
            break
        signed = releases.signed_record(release)
        if ring.signer_of(signed) is None:
            yield f"the record of release {release.number} is not signed by this coordinator"
            return
        record = releases.get_record(release)
        if record.previous_record != before:
            yield f"the record of release {release.number} does not follow the one before it"
        before = record.digest()
    record = releases.get_record(row)
    named = (record.model, record.number, record.content_digest, record.master_digest)
    if named != (row.model, row.number, row.content_digest, row.master_digest):
        yield "the database names other digests than the signed record"
    if record.state_digest != row.state_digest:
        yield "the database names another optimizer state than the signed record"


def _bytes(session: Session, blobs: BlobStore, row: Release, progress: Progress) -> Iterator[str]:
    """Digests of the lists, and of every blob they name."""
    content = releases.get_listing(session, row.content_digest)
    masters = releases.get_masters(session, row.master_digest)
    state = states.get_state(session, row.state_digest) if row.state_digest else None
    if content.digest != row.content_digest:
        yield "the list of tensors and files has another digest"
    if master_digest(masters) != row.master_digest:
        yield "the list of fp32 masters has another digest"
    if state is not None and state.digest != row.state_digest:
        yield "the outer optimizer's state has another digest"
    hashes = {tensor.sha256 for tensor in content.tensors} | {*masters.values()}
    hashes |= {file.sha256 for file in content.files}
    hashes |= {one for slot in (state.slots if state else {}).values() for one in slot.values()}
    counter = Counter("hash", len(hashes), progress)
    for sha256 in sorted(hashes):
        problem = _blob(blobs, sha256)
        counter.add(1)
        if problem:
            yield problem
    yield from _renderings(blobs, content, masters)


def _blob(blobs: BlobStore, sha256: str) -> str | None:
    digest = hashlib.sha256()
    try:
        for chunk in blobs.chunks(sha256):
            digest.update(chunk)
    except (NotFoundError, IntegrityError):
        return f"blob {sha256} is missing or short"
    return None if digest.hexdigest() == sha256 else f"blob {sha256} is damaged"


def _renderings(blobs: BlobStore, content: Content, masters: dict[str, str]) -> Iterator[str]:
    """What is published must be its master, rounded to the published type."""
    for name, master in sorted(masters.items()):
        entry = content.by_name[name]
        for start, stop in dtypes.blocks(dtypes.size(entry.shape), dtypes.BLOCK):
            try:
                want = dtypes.from_float32(blobs.block(master, "F32", start, stop), entry.dtype)
                kind = dtypes.NUMPY[entry.dtype].itemsize
                have = blobs.read(entry.sha256, start * kind, stop * kind)
            except (NotFoundError, IntegrityError):
                return
            if bytes(dtypes.as_bytes(want)) != have:
                yield f"tensor {name} is not the rendering of its master"
                break


def _inputs(session: Session, record: ReleaseRecord) -> list[Contribution]:
    query = select(Contribution).where(Contribution.manifest_digest.in_(record.contributions))
    return list(session.scalars(query.order_by(Contribution.manifest_digest)))


def _signed(
    session: Session, record: ReleaseRecord, inputs: list[Contribution], found: Verified
) -> Iterator[str]:
    """Manifests are the ones named, and signed by a machine of their contributor."""
    missing = {*record.contributions} - {item.manifest_digest for item in inputs}
    for digest in sorted(missing):
        yield f"contribution {digest} is not in the database"
    signed = 0
    for item in inputs:
        if hashlib.sha256(item.manifest).hexdigest() != item.manifest_digest:
            yield f"the manifest of {item.id} was changed"
            continue
        machines = select(Machine).where(Machine.contributor == item.contributor)
        known = [machine.identity_public_key for machine in session.scalars(machines)]
        signed += _is_signed(Signed(item.manifest, item.signature), known)
    found.signatures = signed, len(inputs)
    if signed < len(inputs):
        found.note = "some were signed by machines that are no longer enrolled"


def _stale(session: Session, record: ReleaseRecord, inputs: list[Contribution]) -> Iterator[str]:
    """How stale the record says its inputs are must follow from their signed manifests."""
    row = session.get(Round, record.round) if record.round else None
    if row is None or row.replay is not None:
        return
    policy = rounds.get_policy(row)
    said = {key: value for key, value in record.recipe.items() if key.startswith("continuous.")}
    if not _same(said, continuous.recipe_of(session, row, policy, inputs)):
        yield "the record discounts contributions otherwise than their manifests say they are stale"


def _same(said: Recipe, due: Recipe) -> bool:
    return said.keys() == due.keys() and all(_equal(value, due[key]) for key, value in said.items())


def _equal(one: object, other: object) -> bool:
    """A discount may be rounded otherwise: powers are, from one C library to another."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=ROUNDED_OTHERWISE)
    return one == other


def _learned(session: Session, record: ReleaseRecord) -> Iterator[str]:
    """The coefficients that are merged with again must be those that the record names."""
    row = session.get(Round, record.round) if record.round else None
    if row is None:
        return
    again = row.replay is not None
    want = (
        learned.in_replay(session, row)
        if again
        else learned.in_recipe(session, row, rounds.get_policy(row))
    )
    said = {key: value for key, value in record.recipe.items() if key.startswith("coefficient")}
    if said != want:
        yield "the record names other coefficients than the round learned"
    yield from learned.problems(session, row, rounds.get_policy(row))


def _is_signed(manifest: Signed, known: Iterable[bytes]) -> bool:
    for public in known:
        try:
            verify(manifest, Manifest, Ed25519PublicKey.from_public_bytes(public))
        except ManifestError:
            continue
        return True
    return False


def _erased(store: Store, inputs: list[Contribution]) -> list[str]:
    return [
        item.id
        for item in inputs
        if item.payload_erased_at is not None or not store.payloads.exists(item.payload)
    ]


def _repeats(session: Session, row: Release, record: ReleaseRecord) -> Iterator[str]:
    if record.recipe.get("method") != "rollback":
        return
    old = releases.get_release(session, row.model, int(record.recipe["number"] or 0))
    if (old.content_digest, old.master_digest) != (row.content_digest, row.master_digest):
        yield f"it is not the content of release {old.number}, which it says it restores"


def _merge(
    store: Store,
    row: Release,
    record: ReleaseRecord,
    scratch: Path,
    found: Verified,
    progress: Progress,
) -> None:
    """Do it again and compare."""
    counter = Counter("merge", 0, progress)
    with store.database.read(patient=True) as session:
        base = base_of(session, row)
        job = job_of(store, session, session.get_one(Round, record.round), lambda: counter.add(1))
    named = {sealed.manifest.digest() for work in job.works for sealed in work.inputs}
    if named != set(record.contributions):
        found.problems.append("the round froze other inputs than the record names")
        found.answer = "different"
        return
    found.merged = sum(len(work.inputs) for work in job.works)
    try:
        with merged(store.blobs, job, scratch, lambda: counter.add(1)) as (again, overlay):
            _compare(overlay, job.base, base, again, found)
    except IntegrityError as error:
        found.problems.append(error.message)
    except ColdmergeError as error:
        if error.code == "merge.disk_too_small":
            raise
        found.problems.append(f"{error.message} [{error.code}]")
    if found.problems:
        found.answer = "different"


def _compare(
    blobs: BlobStore, before: Base, stored: Base, again: Candidate, found: Verified
) -> None:
    if again.content.files != stored.content.files:
        found.problems.append("the files beside the weights differ")
    pairs = [(name, stored.masters[name], again.masters.get(name)) for name in stored.masters]
    old = stored.state.slots if stored.state else {}
    new = again.state.slots if again.state else {}
    for slot in sorted(old):
        pairs += [(name, sha, new.get(slot, {}).get(name)) for name, sha in old[slot].items()]
    for name, want, got in pairs:
        if want == got:
            continue
        if got is None:
            found.problems.append(f"tensor {name} is missing")
            continue
        off, allowed = _difference(blobs, before.masters[name], want, got, stored.content, name)
        found.largest, found.answer = max(found.largest, off), "within-tolerance"
        if off > allowed:
            found.problems.append(
                f"tensor {name} differs by up to {off:.3g}, more than {allowed:.3g}"
            )


def _difference(
    blobs: BlobStore, before: str, want: str, got: str, content: Content, name: str
) -> tuple[float, float]:
    """The largest difference of a weight, and the largest that is allowed."""
    off = moved = largest = 0.0
    for start, stop in dtypes.blocks(dtypes.size(content.by_name[name].shape), dtypes.BLOCK):
        base, one, two = (
            blobs.block(sha256, "F32", start, stop).astype(np.float64)
            for sha256 in (before, want, got)
        )
        off = max(off, float(np.max(np.abs(one - two))))
        moved = max(moved, float(np.max(np.abs(one - base))))
        largest = max(largest, float(np.max(np.abs(one))))
    return off, TOLERANCE * moved + float(np.spacing(np.float32(largest)))
