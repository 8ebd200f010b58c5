"""Making a coordinator of a backup."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import MetaData, delete

from coldmerge.core.digests import file_digest
from coldmerge.core.errors import ConflictError, IntegrityError
from coldmerge.core.files import fsync_path, make_folder
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge_coordinator import config as settings
from coldmerge_coordinator.backup.making import CONTRIBUTIONS, DATABASE, FOLDERS, Index
from coldmerge_coordinator.backup.rows import read_rows
from coldmerge_coordinator.store import Store, lay_out
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.database import Database, migrate, schema_revision
from coldmerge_coordinator.store.models import Base


def restore(
    backup: Path,
    folder: Path,
    *,
    database_url: str | None = None,
    blobs: str | None = None,
    progress: Progress = silent,
) -> Index:
    """Make a coordinator in `folder`, which must be new or empty, as it was at the backup.

    Every file is compared with its hash before anything is written. `database_url` and `blobs`
    replace the configuration's: rows go into an empty database, tensors to another disk or
    bucket. `config.yaml` is written last: a folder without it holds no coordinator.

    Raises:
        ConfigError: `backup` holds no complete backup.
        ConflictError: the folder or the database holds something.
        IntegrityError: a file of the backup is missing or damaged.
    """
    index = Index.load(backup)
    _check_empty(folder)
    kept = _check_files(backup, index)
    changes = {"database_url": database_url, "blobs": blobs}
    config = settings.load(backup).model_copy(
        update={key: value for key, value in changes.items() if value is not None}
    )
    lay_out(folder)
    for name in FOLDERS:
        make_folder(folder / name)
        for path in sorted((backup / name).iterdir()):
            _copy_private(path, folder / name / path.name)
    _restore_rows(backup, index, config.database_in(folder))
    with Store(folder, config) as store:
        _restore_files(backup, kept, store, progress)
    settings.save(config, folder)
    return index


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(
            "restore.folder_not_empty",
            f"{folder} is not empty.",
            expected="a new or empty folder",
            hint="Choose another folder; the old coordinator must not run beside the new one.",
        )


def _check_files(backup: Path, index: Index) -> list[str]:
    """Compare every hash; the names of the blobs."""
    for name, expected in index.files.items():
        found = file_digest(backup / name)[0] if (backup / name).is_file() else None
        if found != expected:
            raise _damaged(name, expected, found)
    blobs = []
    store = BlobStore(backup / "blobs")
    for path in sorted(store.folder.glob("??/*")):
        found = file_digest(path)[0]
        if found != path.name:
            raise _damaged(f"blobs/{path.parent.name}/{path.name}", path.name, found)
        blobs.append(path.name)
    if len(blobs) < index.blobs:
        raise _damaged("blobs", f"{index.blobs} files", f"{len(blobs)} files")
    return blobs


def _damaged(name: str, expected: str, got: str | None) -> IntegrityError:
    return IntegrityError(
        "restore.damaged",
        f"The backup is not whole: {name} is missing or damaged.",
        expected=expected,
        got=got,
        hint="Use another backup; nothing was written.",
    )


def _copy_private(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o600)
    fsync_path(target)


def _restore_rows(backup: Path, index: Index, url: str) -> None:
    """Make the schema of the backup's time, fill it, and bring it to this version's."""
    database = Database(url)
    try:
        if schema_revision(database) is not None:
            raise ConflictError(
                "restore.database_not_empty",
                "There is a coordinator in that database already.",
                expected="an empty database",
                hint="Create another one, and name it with --database.",
            )
        migrate(url, index.revision)
        with database.write() as session:
            schema = MetaData()
            schema.reflect(session.connection())
            names = [table.name for table in Base.metadata.sorted_tables]
            tables = [schema.tables[name] for name in names if name in index.tables]
            for table in reversed(tables):
                session.execute(delete(table))  # what the migrations themselves put there
            for table in tables:
                read_rows(session, table, backup / DATABASE / f"{table.name}.jsonl")
    finally:
        database.close()
    migrate(url)


def _restore_files(backup: Path, blobs: Sequence[str], store: Store, progress: Progress) -> None:
    kept = BlobStore(backup / "blobs")
    payloads = sorted((backup / CONTRIBUTIONS).iterdir())
    total = sum(kept.path(sha256).stat().st_size for sha256 in blobs)
    advance = Counter("restore", total + sum(p.stat().st_size for p in payloads), progress).add
    for sha256 in blobs:
        with store.blobs.writer() as writer:
            for chunk in kept.chunks(sha256):
                writer.write(chunk)
                advance(len(chunk))
            writer.commit()
    for path in payloads:
        part = store.payloads.part(f"restore-{path.stem}")
        _copy_private(path, part)
        store.payloads.keep(path.name, part)
        advance(path.stat().st_size)
