"""What must be true of a coordinator's folder, whatever was done to its processes."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from coldmerge.core.documents import Manifest, Receipt, Signed
from coldmerge.core.dtypes import NUMPY, from_float32
from coldmerge.core.task_vector import TaskVector
from coldmerge.rounds.state import State
from coldmerge_coordinator.service.uploads import header_of
from coldmerge_coordinator.store import Store, contributions, models, releases
from tests.crash.members import MODEL, Base, Ledger, deltas

Masters = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Sound:
    """What was found when nothing was wrong."""

    releases: int
    rounds: int
    receipts: int


def check_folder(folder: Path, ledger: Ledger) -> Sound:
    """Everything promised is there, every release is what its inputs make, nothing is left over.

    Call it while nothing runs.
    """
    check_database(folder / "coldmerge.db")
    with Store.open(folder) as store, store.database.read() as session:
        check_receipts(store, session, ledger.receipts, ledger.given_up)
        check_no_orphans(store, session)
        count = check_releases(store, session, ledger)
        rounds = session.query(models.Round).count()
    return Sound(count, rounds, len(ledger.receipts))


def check_database(path: Path) -> None:
    """The database itself is whole, and its rows refer to rows that exist."""
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []


def check_receipts(
    store: Store, session: Session, receipts: Mapping[str, Signed], given_up: set[str]
) -> None:
    """Each acknowledged contribution has its row, its receipt and its bytes."""
    lost = [
        identifier
        for identifier, signed in receipts.items()
        if not _kept(store, session, identifier, signed, given_up)
    ]
    assert lost == [], f"{len(lost)} of {len(receipts)} acknowledged contributions are lost"


def _kept(
    store: Store, session: Session, identifier: str, signed: Signed, given_up: set[str]
) -> bool:
    row = session.get(models.Contribution, identifier)
    if row is None or (row.receipt, row.receipt_signature) != (signed.document, signed.signature):
        return False
    if row.state == contributions.WITHDRAWN:
        return identifier in given_up
    if row.state == contributions.REPLACED:
        return _replaced(session, row)
    return stored_whole(store, row)


def _replaced(session: Session, row: models.Contribution) -> bool:
    """A later one of the same contributor is there."""
    later = session.query(models.Contribution).filter(
        models.Contribution.round == row.round,
        models.Contribution.contributor == row.contributor,
        models.Contribution.accepted_at > row.accepted_at,
    )
    return later.count() > 0


def stored_whole(store: Store, row: models.Contribution) -> bool:
    """Whether a contribution's file holds, byte for byte, what its manifest says."""
    manifest = Manifest.parse(row.manifest)
    path = store.contributions / row.payload
    return path.is_file() and TaskVector.open(path).entries() == manifest.tensors


def check_no_orphans(store: Store, session: Session) -> None:
    """Rows have their files and the rows they belong to; an upload is no contribution yet."""
    for blob in session.query(models.Blob):
        assert hash_of(store.blobs.path(blob.sha256)) == blob.sha256
    for content in session.query(models.Content):
        listing = releases.get_listing(session, content.digest)
        assert listing.digest == content.digest
        named = [tensor.sha256 for tensor in listing.tensors]
        named += [file.sha256 for file in listing.files]
        assert all(session.get(models.Blob, sha256) for sha256 in named)
    for master in session.query(models.Master):
        assert all(session.get(models.Blob, sha256) for sha256 in master.tensors.values())
    for row in session.query(models.Contribution).filter_by(state=contributions.ADMITTED):
        assert stored_whole(store, row), row.id
    active = session.query(models.Round).filter(models.Round.active)
    assert active.count() <= 1
    for upload in session.query(models.Upload):
        assert session.get(models.Contribution, _counted(upload.id)) is None


def check_uploads(store: Store, ledger: Ledger) -> None:
    """What a contributor was told to be durable of an upload is; so is what its row says."""
    with store.database.read() as session:
        for upload in session.query(models.Upload):
            manifest = Manifest.parse(upload.manifest)
            vectors = deltas(ledger.base, ledger.seeds[upload.manifest_digest])
            payload = b"".join(vectors[entry.name].tobytes() for entry in manifest.tensors)
            final = store.contributions / f"{_counted(upload.id)}.safetensors"
            part = store.uploads / f"{upload.id}.part"
            if (size := upload.committed_size) > 0:
                start = len(header_of(manifest))
                found = (part if part.exists() else final).read_bytes()[start : start + size]
                assert found == payload[:size], upload.id
        for each in ledger.told:
            if each.kind == "committed":
                check_committed(session, each.what[0], each.size)


def check_committed(session: Session, upload: str, size: int) -> None:
    """An upload that has got so far has not gone back: it goes on, or came to its end."""
    row = session.get(models.Upload, upload)
    if row is not None:
        assert row.committed_size >= size, upload
        return
    done = session.get(models.Contribution, _counted(upload))
    ended = session.query(models.Round).filter(models.Round.state != State.OPEN)
    assert done is not None or ended.count() > 0, upload


def _counted(upload: str) -> str:
    return upload.replace("upload-", "contribution-", 1)


def hash_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_releases(store: Store, session: Session, ledger: Ledger) -> int:
    """Every release is, bit for bit, the base plus the float64 means of its inputs."""
    masters = first_masters(ledger.base)
    previous: str | None = None
    rows = releases.list_releases(session, MODEL)
    for number, row in enumerate(rows):
        record = releases.get_record(row)
        assert (record.number, record.previous_record) == (number, previous)
        previous = record.digest()
        if number:
            masters = merged(ledger, masters, record.contributions)
            _check_inputs(session, record.round, record.contributions)
        listing = releases.get_listing(session, record.content_digest)
        found = {entry.name: entry.sha256 for entry in listing.tensors}
        assert found == dict(_rendered(ledger.base, masters)), f"release {number}"
    return len(rows)


def _check_inputs(session: Session, round_id: str | None, digests: tuple[str, ...]) -> None:
    rows = session.query(models.Contribution).filter_by(
        round=round_id, state=contributions.ADMITTED
    )
    assert sorted(row.manifest_digest for row in rows) == sorted(digests)
    assert all(Receipt.parse(row.receipt).manifest_digest in digests for row in rows)


def first_masters(base: Base) -> Masters:
    """The fp32 tensors behind release 0."""
    return {name: np.asarray(array).astype(np.float32) for name, array in base.items()}


def merged(ledger: Ledger, masters: Masters, digests: tuple[str, ...]) -> Masters:
    """What a round makes: numpy's mean in float64, added in float64, rounded once."""
    vectors = [deltas(ledger.base, ledger.seeds[digest]) for digest in sorted(digests)]
    result = {}
    for name, master in masters.items():
        mean = np.mean([vector[name].astype(np.float64) for vector in vectors], axis=0)
        result[name] = (master.astype(np.float64) + mean).astype(np.float32)
    return result


def _rendered(base: Base, masters: Masters) -> Iterator[tuple[str, str]]:
    kinds = {kind: name for name, kind in NUMPY.items()}
    for name, master in masters.items():
        rendered = from_float32(master, kinds[base[name].dtype])
        yield name, hashlib.sha256(np.ascontiguousarray(rendered).tobytes()).hexdigest()
