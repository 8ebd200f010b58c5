"""Making a backup of a coordinator, served or not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from coldmerge import __version__
from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.digests import file_digest
from coldmerge.core.errors import ConfigError, ConflictError, IntegrityError, NotFoundError
from coldmerge.core.files import fsync_path, partial_path
from coldmerge.core.progress import Advance, Counter, Progress, silent
from coldmerge_coordinator.backup.rows import write_rows
from coldmerge_coordinator.config import FILE_NAME as CONFIG
from coldmerge_coordinator.store import Store, contributions
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.database import schema_revision
from coldmerge_coordinator.store.models import Base, Blob, Contribution

INDEX = "backup.json"
DATABASE = "database"
CONTRIBUTIONS = "contributions"
FOLDERS = ("ca", "keys")
PASSING = frozenset({"lease", "upload"})
"""Tables that are not kept: who works on what now, and uploads, whose senders begin again."""
ATTEMPTS = 3


class Index(BaseModel):
    """What a backup holds; written last, so that a backup without it is not one.

    `tables`: rows of each. `files`: sha256 of every file but the blobs, which are named by theirs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    coldmerge: str
    federation: str
    revision: str
    created_at: datetime
    tables: dict[str, int]
    files: dict[str, str]
    blobs: int
    keys: bool

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read the index of a backup.

        Raises:
            ConfigError: there is no complete backup in `folder`.
        """
        try:
            return cls.model_validate_json((folder / INDEX).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                "backup.not_one",
                f"{folder} holds no complete backup.",
                expected=f"a folder with {INDEX}, as `coordinator backup` makes it",
                got=str(error).splitlines()[0],
                hint="Name the folder that was given to `coldmerge coordinator backup`.",
            ) from error


@dataclass(frozen=True)
class Made:
    """What a backup holds, and how much of it was copied now."""

    blobs: int
    contributions: int
    copied_bytes: int


def make(
    store: Store,
    out: Path,
    *,
    keys: bool = True,
    clock: Clock | None = None,
    progress: Progress = silent,
) -> Made:
    """Write a backup into `out`, or bring the one that is there up to date.

    The rows are of one moment; every blob and contribution they name is copied and its hash
    compared. Without `keys` the signing key and the intermediate's stay here: keep them
    elsewhere, no backup can be served without them.

    Raises:
        ConflictError: `out` holds something else, or another federation's backup.
        IntegrityError: a blob or contribution is missing or damaged here.
    """
    _prepare(out, store.federation)
    (out / INDEX).unlink(missing_ok=True)
    fsync_path(out)
    rows = _dump(store, out)
    copied = 0
    for attempt in range(ATTEMPTS):
        try:
            copied += _copy(store, out, rows, progress)
            break
        except NotFoundError as error:
            # Taken back or collected since the rows were read? Then newer rows do not name it.
            rows = _dump(store, out)
            if attempt == ATTEMPTS - 1:
                raise _missing(error) from error
    _remove_others(out / CONTRIBUTIONS, rows.payloads)
    _copy_settings(store.folder, out, keys)
    index = Index(
        coldmerge=__version__,
        federation=store.federation,
        revision=schema_revision(store.database) or "",
        created_at=(clock or SystemClock()).now(),
        tables=rows.counts,
        files=_hashes(out),
        blobs=len(rows.blobs),
        keys=keys,
    )
    _write_index(out, index)
    return Made(len(rows.blobs), len(rows.payloads), copied)


def _prepare(out: Path, federation: str) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / DATABASE).is_dir():
            raise ConflictError(
                "backup.folder_not_empty",
                f"{out} holds something that is no backup.",
                expected="a new or empty folder, or an earlier backup",
                hint="Choose another folder.",
            )
        if (out / INDEX).exists() and Index.load(out).federation != federation:
            raise ConflictError(
                "backup.other_federation",
                f"{out} holds the backup of another federation.",
                expected=federation,
                got=Index.load(out).federation,
                hint="Choose another folder.",
            )
    for name in ("", DATABASE, CONTRIBUTIONS, *FOLDERS):
        (out / name).mkdir(mode=0o700, parents=not name, exist_ok=True)


@dataclass(frozen=True)
class _Rows:
    """What was dumped: rows per table, and the sizes of the blobs and payloads that they name."""

    counts: dict[str, int]
    blobs: dict[str, int]
    payloads: dict[str, int]


def _dump(store: Store, out: Path) -> _Rows:
    counts = {}
    with store.database.read() as session:
        for table in Base.metadata.sorted_tables:
            if table.name not in PASSING:
                path = out / DATABASE / f"{table.name}.jsonl"
                counts[table.name] = write_rows(session, table, path)
        blobs = {row.sha256: row.nbytes for row in session.query(Blob)}
        payloads = {row.payload: row.payload_bytes for row in kept_contributions(session)}
    return _Rows(counts, blobs, payloads)


def kept_contributions(session: Session) -> list[Contribution]:
    """The contributions whose task vectors must be there."""
    query = select(Contribution).where(
        Contribution.state.in_((contributions.ADMITTED, contributions.QUARANTINED)),
        Contribution.payload_erased_at.is_(None),
    )
    return list(session.scalars(query.order_by(Contribution.id)))


def _copy(store: Store, out: Path, rows: _Rows, progress: Progress) -> int:
    total = sum(rows.blobs.values()) + sum(rows.payloads.values())
    advance = Counter("copy", total, progress).add
    kept = BlobStore(out / "blobs")
    copied = sum(_copy_blob(store, kept, sha256, advance) for sha256 in sorted(rows.blobs))
    return copied + sum(_copy_payload(store, out, name, advance) for name in sorted(rows.payloads))


def _copy_blob(store: Store, kept: BlobStore, sha256: str, advance: Advance) -> int:
    if kept.path(sha256).exists() and file_digest(kept.path(sha256))[0] == sha256:
        advance(kept.path(sha256).stat().st_size)
        return 0
    with kept.writer() as writer:
        for chunk in store.blobs.chunks(sha256):
            writer.write(chunk)
            advance(len(chunk))
        found, nbytes = writer.commit()
    if found != sha256:
        raise IntegrityError(
            "backup.blob_damaged",
            "A blob on the coordinator's disk does not have its hash.",
            expected=sha256,
            got=found,
            hint="Restore it from an earlier backup; `coldmerge coordinator verify` lists all.",
        )
    return nbytes


def _copy_payload(store: Store, out: Path, name: str, advance: Advance) -> int:
    """Task vectors never change once they are admitted: one of the same length is the same."""
    source, target = store.payloads.local(name), out / CONTRIBUTIONS / name
    if not source.exists():
        raise NotFoundError(
            "contribution.file_missing",
            "The file of an admitted task vector is missing.",
            hint="Restore `contributions/` from a backup.",
            path=source,
        )
    size = source.stat().st_size
    advance(size)
    if target.exists() and target.stat().st_size == size:
        return 0
    temporary = partial_path(target)
    shutil.copyfile(source, temporary)
    temporary.chmod(0o600)
    fsync_path(temporary)
    temporary.rename(target)
    return size


def _missing(error: NotFoundError) -> IntegrityError:
    return IntegrityError(
        "backup.missing",
        f"The coordinator lacks something that its database names: {error.message}",
        got=error.got,
        hint="`coldmerge coordinator verify` lists everything that is missing.",
        **error.ids,
    )


def _remove_others(folder: Path, kept: Mapping[str, int]) -> None:
    for path in sorted(folder.iterdir()):
        if path.name not in kept:
            path.unlink()
    fsync_path(folder)


def _copy_settings(source: Path, out: Path, keys: bool) -> None:
    shutil.copyfile(source / CONFIG, out / CONFIG)
    (out / CONFIG).chmod(0o600)
    for name in FOLDERS:
        shutil.rmtree(out / name)
        (out / name).mkdir(mode=0o700)
        for path in sorted((source / name).iterdir()) if keys or name != "keys" else ():
            if path.is_file():
                shutil.copyfile(path, out / name / path.name)
                (out / name / path.name).chmod(0o600)


def _hashes(out: Path) -> dict[str, str]:
    """sha256 of every file but the blobs. All are durable afterwards."""
    found = {}
    for path in sorted(out.rglob("*")):
        relative = path.relative_to(out)
        if path.is_dir():
            fsync_path(path)
        elif relative.parts[0] != "blobs":
            fsync_path(path)
            found[relative.as_posix()] = file_digest(path)[0]
    return found


def _write_index(out: Path, index: Index) -> None:
    temporary = partial_path(out / INDEX)
    temporary.write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.chmod(0o600)
    fsync_path(temporary)
    temporary.rename(out / INDEX)
    fsync_path(out)
