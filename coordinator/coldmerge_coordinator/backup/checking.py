"""Checking a coordinator: whether everything that its database names is there, and unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge.core.digests import Content, master_digest
from coldmerge.core.documents import Manifest, Receipt, ReleaseRecord, Signed
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.keys import Keyring
from coldmerge.core.progress import Advance, Counter, Progress, silent
from coldmerge.core.task_vector import TaskVector
from coldmerge_coordinator.audit.export import check_stored
from coldmerge_coordinator.backup.making import kept_contributions
from coldmerge_coordinator.store import Store, releases
from coldmerge_coordinator.store import keys as key_table
from coldmerge_coordinator.store.models import Blob, Contribution, Master, Model, Release
from coldmerge_coordinator.store.models import Content as ContentRow


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be: of what kind, which one, and what is wrong."""

    kind: str
    name: str
    problem: str


@dataclass
class Findings:
    """How much of each kind was checked, and every problem that was found."""

    checked: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def look(self, kind: str, name: str, check: Callable[[], str | None]) -> None:
        """Count one more of `kind`; what `check` says or raises is its problem."""
        self.checked[kind] = self.checked.get(kind, 0) + 1
        try:
            problem = check()
        except ColdmergeError as error:
            problem = f"{error.message} [{error.code}]"
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        if problem is not None:
            self.problems.append(Problem(kind, name, problem))


def verify(store: Store, progress: Progress = silent) -> Findings:
    """Read everything: log, blobs, contents, masters, releases, contributions, receipts.

    Looks on after a problem, so that one run names all of them. Rows are of one moment; a
    coordinator that is served may collect or admit something meanwhile.
    """
    findings = Findings()
    findings.look("audit log", store.federation, lambda: _log(store))
    with store.database.read(patient=True) as session:
        keys = key_table.keyring(session, store.signer)
        blobs = {row.sha256: row.nbytes for row in session.scalars(select(Blob))}
        payloads = {row.id: row for row in kept_contributions(session)}
        total = sum(blobs.values()) + sum(row.payload_bytes for row in payloads.values())
        advance = Counter("check", total, progress).add
        for sha256, nbytes in sorted(blobs.items()):
            findings.look("blob", sha256, _blob(store, sha256, nbytes, advance))
        for content in session.scalars(select(ContentRow).order_by(ContentRow.digest)):
            findings.look("content", content.digest, _content(content, blobs))
        for master in session.scalars(select(Master).order_by(Master.digest)):
            findings.look("master", master.digest, _master(master, blobs))
        for model in releases.list_models(session):
            _releases(session, model, keys, findings)
        for row in session.scalars(select(Contribution).order_by(Contribution.id)):
            payload = row.id in payloads
            findings.look("contribution", row.id, _contribution(store, row, keys, payload, advance))
    return findings


def _log(store: Store) -> None:
    check_stored(store)


def _blob(store: Store, sha256: str, nbytes: int, advance: Advance) -> Callable[[], str | None]:
    def check() -> str | None:
        digest, size = hashlib.sha256(), 0
        for chunk in store.blobs.chunks(sha256):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
        if size != nbytes:
            return f"it has {size} bytes, not {nbytes}"
        return None if digest.hexdigest() == sha256 else f"its hash is {digest.hexdigest()}"

    return check


def _content(row: ContentRow, blobs: dict[str, int]) -> Callable[[], str | None]:
    def check() -> str | None:
        content = Content.from_json(row.listing)
        if content.digest != row.digest:
            return f"its digest is {content.digest}"
        named = {*(e.sha256 for e in content.tensors), *(e.sha256 for e in content.files)}
        return _unknown(named - blobs.keys())

    return check


def _master(row: Master, blobs: dict[str, int]) -> Callable[[], str | None]:
    def check() -> str | None:
        if master_digest(row.tensors) != row.digest:
            return f"its digest is {master_digest(row.tensors)}"
        return _unknown(set(row.tensors.values()) - blobs.keys())

    return check


def _unknown(missing: set[str]) -> str | None:
    return f"{len(missing)} of its blobs are unknown, such as {min(missing)}" if missing else None


def _releases(session: Session, model: Model, keys: Keyring, findings: Findings) -> None:
    previous: str | None = None
    for expected, row in enumerate(releases.list_releases(session, model.name)):
        name = f"{model.name} {row.number}"
        findings.look("release", name, _release(session, row, expected, previous, keys))
        previous = hashlib.sha256(row.record).hexdigest()


def _release(
    session: Session, row: Release, expected: int, previous: str | None, keys: Keyring
) -> Callable[[], str | None]:
    def check() -> str | None:
        record = keys.verify(Signed(row.record, row.signature), ReleaseRecord)
        told = (record.model, record.number, record.content_digest, record.master_digest)
        if told != (row.model, expected, row.content_digest, row.master_digest):
            return f"its record is about another release: {told}"
        if record.previous_record != previous:
            return "its record does not follow the one before it"
        known = set(
            session.scalars(
                select(Contribution.manifest_digest).where(
                    Contribution.manifest_digest.in_(record.contributions)
                )
            )
        )
        missing = set(record.contributions) - known  # a re-merge has those of earlier rounds
        return f"{len(missing)} contributions that it names are unknown" if missing else None

    return check


def _contribution(
    store: Store, row: Contribution, keys: Keyring, payload: bool, advance: Advance
) -> Callable[[], str | None]:
    def check() -> str | None:
        manifest = Manifest.parse(row.manifest)
        receipt = keys.verify(Signed(row.receipt, row.receipt_signature), Receipt)
        digests = {manifest.digest(), receipt.manifest_digest}
        if digests != {row.manifest_digest}:
            return "its manifest, its receipt and its row name different digests"
        return _payload(store, row, manifest, advance) if payload else None

    return check


def _payload(store: Store, row: Contribution, manifest: Manifest, advance: Advance) -> str | None:
    vector = TaskVector.open(store.payloads.local(row.payload))
    where = vector.difference(manifest.tensors, advance)
    return None if where is None else f"{where} differs from what was signed"
