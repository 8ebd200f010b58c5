"""A published release as a complete Hugging Face folder, with model card and signed record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core import documents
from coldmerge.core.checkpoint_writer import MAX_SHARD_BYTES, CheckpointWriter
from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, ReleaseRecord, Signed
from coldmerge.core.errors import IntegrityError
from coldmerge.core.progress import Advance, Counter, Progress, silent
from coldmerge.core.release_file import RELEASE_FILE, render_release_file
from coldmerge.report.model_card import CardFacts, model_card
from coldmerge_coordinator.store import Store, keys, rounds
from coldmerge_coordinator.store import releases as release_table
from coldmerge_coordinator.store.blobs import BlobStore
from coldmerge_coordinator.store.models import Round

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """Which release `export` wrote, and how many bytes of tensors."""

    number: int
    digest: str
    nbytes: int


@dataclass(frozen=True)
class _Release:
    record: ReleaseRecord
    signed: Signed
    content: Content
    private: tuple[str, ...]
    lineage: tuple[ReleaseRecord, ...]
    evaluations: tuple[documents.Evaluation, ...]


def export(
    store: Store,
    model: str,
    number: int | None,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> Exported:
    """Write release `number` (None: the latest) of `model` into the new folder `out`.

    Every byte is compared with its digest on the way. The folder appears complete or
    not at all.

    Raises:
        NotFoundError: no such model or release.
        ConflictError: `out` exists and is not empty.
        IntegrityError: a blob is damaged.
        ResourceError: the disk is too small.
    """
    release = _load(store, model, number)
    content = release.content
    total = sum(tensor.nbytes for tensor in content.tensors)
    advance = Counter("export", total, progress).add
    with CheckpointWriter(out, max_shard_bytes) as writer:
        files = _write_content(store.blobs, writer, content, advance)
        key = _signing_key(store, release.signed)
        writer.write_file(RELEASE_FILE, render_release_file(release.signed, key, content))
        writer.write_file(CARD, _card(release, files.get("config.json")).encode())
    return Exported(release.record.number, content.digest, total)


def lay_out(store: Store, digest: str, out: Path) -> Path:
    """Write the model folder of a release or candidate by its content digest; no card, no record.

    Raises:
        NotFoundError: no such content.
        ConflictError: `out` exists and is not empty.
        IntegrityError: a blob is damaged.
    """
    with store.database.read() as session:
        content = release_table.get_listing(session, digest)
    with CheckpointWriter(out) as writer:
        _write_content(store.blobs, writer, content, lambda _: None)
    return out


def _write_content(
    blobs: BlobStore, writer: CheckpointWriter, content: Content, advance: Advance
) -> dict[str, bytes]:
    """All tensors and files, compared with their digests; the files' bytes."""
    writer.declare(content.tensors)
    for tensor in content.tensors:
        _copy_tensor(blobs, writer, tensor.name, tensor.sha256, advance)
    files = {file.path: _checked(blobs, file) for file in content.files}
    for path, data in files.items():
        writer.write_file(path, data)
    return files


def _signing_key(store: Store, record: Signed) -> str:
    """The key that signed a record: there may have been others since."""
    signer = store.signer
    with store.database.read() as session:
        return keys.keyring(session, signer).signer_of(record) or signer.public_key


def _load(store: Store, model: str, number: int | None) -> _Release:
    with store.database.read() as session:
        if number is None:
            row = release_table.latest_release(session, model)
        else:
            row = release_table.get_release(session, model, number)
        record = release_table.get_record(row)
        merged = session.get(Round, record.round) if record.round else None
        reported = rounds.evaluations_of(session, merged) if merged else []
        return _Release(
            record=record,
            signed=release_table.signed_record(row),
            content=release_table.get_listing(session, row.content_digest),
            private=tuple(release_table.get_model(session, model).private_patterns),
            lineage=tuple(
                release_table.get_record(earlier)
                for earlier in release_table.list_releases(session, model)
                if earlier.number < row.number
            ),
            evaluations=tuple(documents.Evaluation.parse(item.document) for item in reported),
        )


def _copy_tensor(
    blobs: BlobStore, writer: CheckpointWriter, name: str, sha256: str, advance: Advance
) -> None:
    found = hashlib.sha256()
    for chunk in blobs.chunks(sha256):
        found.update(chunk)
        writer.write(name, chunk)
        advance(len(chunk))
    _compare(f"tensor {name}", sha256, found.hexdigest())


def _checked(blobs: BlobStore, file: FileEntry) -> bytes:
    data = blobs.read(file.sha256, 0, file.size)
    _compare(f"file {file.path}", file.sha256, hashlib.sha256(data).hexdigest())
    return data


def _compare(what: str, expected: str, got: str) -> None:
    if expected != got:
        raise IntegrityError(
            "export.corrupt",
            f"The stored bytes of {what} are damaged.",
            expected=expected,
            got=got,
            hint="The coordinator's disk may be failing: restore `blobs/` from a backup.",
        )


def _card(release: _Release, config: bytes | None) -> str:
    return model_card(
        CardFacts(
            record=release.record,
            tensors=release.content.tensors,
            config={} if config is None else json.loads(config),
            private_patterns=release.private,
            lineage=release.lineage,
            evaluations=release.evaluations,
        )
    )
