"""Pulling a release or candidate: only the tensors that no local release has are fetched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.digests import Content
from coldmerge.core.documents import FileEntry, TensorEntry
from coldmerge.core.dtypes import blocks
from coldmerge.core.errors import ColdmergeError, IntegrityError
from coldmerge.core.files import PositionalFile
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge.core.release_file import RELEASE_FILE, render_release_file
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import models_pb2
from coldmerge_client import checkpoints
from coldmerge_client.download import fetch
from coldmerge_client.files import exclusive, require_space
from coldmerge_client.home import Home, Seen
from coldmerge_client.session import Session
from coldmerge_client.trust import check_not_older, checked_content, checked_record

_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Pulled:
    """A release on this disk. `number` is None for a candidate; byte counts are of this pull."""

    folder: Path
    model: str
    number: int | None
    digest: str
    private: tuple[str, ...]
    downloaded: int
    copied: int


@dataclass(frozen=True)
class _Source:
    """A tensor or file that a local release already has."""

    folder: Path
    name: str


class _DamagedError(Exception):
    def __init__(self, folder: Path) -> None:
        self.folder = folder


def pull(
    session: Session,
    model: str,
    number: int | None = None,
    *,
    allow_older: bool = False,
    progress: Progress = silent,
) -> Pulled:
    """Bring a release (the latest by default) into the home folder, verified.

    Raises:
        NotFoundError: there is no such release.
        IntegrityError: signature, digest or bytes are wrong; the audit log was set back,
            rewritten or frozen, or does not hold the release; or the release is older
            than the last one seen and `allow_older` is false.
        ResourceError: the disk is too small.
        UnavailableError: the coordinator stayed away for the session's timeout.
    """
    checkpoint = checkpoints.refresh(session)
    release = session.release(model, number)
    record = checked_record(release, model, session)
    if number is not None and record.number != number:
        raise _another(release, f"release {number}", f"release {record.number}")
    check_not_older(session, model, record, allow_older=allow_older)
    checkpoints.check_release(session, checkpoint, record, latest=number is None)
    folder = session.home.release(model, record.number)
    pulled = _bring(session, model, release, folder, record.number, progress)
    session.home.saw(model, Seen(record.number, record.content_digest, record.digest()))
    return pulled


def pull_candidate(
    session: Session, model: str, digest: str, *, progress: Progress = silent
) -> Pulled:
    """Bring a candidate, named by its content digest, into the home folder.

    Raises:
        NotFoundError: there is no such candidate.
        IntegrityError: what came does not have that digest.
    """
    release = session.release(model, digest=digest)
    if release.content_digest != digest:
        raise _another(release, digest, release.content_digest)
    folder = session.home.candidates(model) / digest
    return _bring(session, model, release, folder, None, progress)


def _another(release: models_pb2.Release, expected: str, got: str) -> IntegrityError:
    return IntegrityError(
        "release.not_the_one_asked",
        "The coordinator answered with another release than the one asked for.",
        expected=expected,
        got=got,
        hint="Do not use it; ask the coordinator's admin what happened.",
        model=release.model,
    )


def _bring(
    session: Session,
    model: str,
    release: models_pb2.Release,
    folder: Path,
    number: int | None,
    progress: Progress,
) -> Pulled:
    private = tuple(release.private_patterns)
    digest = release.content_digest
    if _listing(folder, digest) is not None:
        return Pulled(folder, model, number, digest, private, 0, 0)
    content = checked_content(release)
    with exclusive(session.home.lock("pull"), "pulling", wait=True):
        if _listing(folder, digest) is not None:
            return Pulled(folder, model, number, digest, private, 0, 0)
        downloaded, copied = _assemble(session, model, content, release, folder, progress)
    return Pulled(folder, model, number, digest, private, downloaded, copied)


def _assemble(
    session: Session,
    model: str,
    content: Content,
    release: models_pb2.Release,
    folder: Path,
    progress: Progress,
) -> tuple[int, int]:
    """Fetch and write; a local release that turns out damaged is left out and it starts over."""
    damaged: set[Path] = set()
    sizes = _sizes(content)
    cache = session.home.cache / "blobs"
    signed = signed_from_proto(release.record) if release.record.document else None
    key = session.home.keyring().signer_of(signed) if signed else None
    about = render_release_file(signed, key or session.member.signing_key, content)
    for left in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
        shutil.rmtree(left, ignore_errors=True)
    while True:
        local = _local_sources(session.home, model, damaged)
        missing = {sha: size for sha, size in sizes.items() if sha not in local and size}
        require_space(session.home.path, _needed(content, missing, cache), "this release")
        fetch(session, missing, cache, Counter("download", sum(missing.values()), progress))
        try:
            _write(content, about, folder, local, cache, progress)
        except _DamagedError as error:
            damaged.add(error.folder)
            continue
        for sha in missing:
            (cache / sha).unlink(missing_ok=True)
        fetched = sum(missing.values())
        return fetched, sum(sizes.values()) - fetched


def _sizes(content: Content) -> dict[str, int]:
    sizes = {entry.sha256: entry.nbytes for entry in content.tensors}
    return sizes | {entry.sha256: entry.size for entry in content.files}


def _needed(content: Content, missing: dict[str, int], cache: Path) -> int:
    folder = sum(e.nbytes for e in content.tensors) + sum(e.size for e in content.files)
    parts = (path for sha in missing for path in (cache / sha, cache / f"{sha}.part"))
    there = sum(path.stat().st_size for path in parts if path.exists())
    return folder + max(sum(missing.values()) - there, 0)


def _write(
    content: Content,
    about: bytes,
    folder: Path,
    local: dict[str, _Source],
    cache: Path,
    progress: Progress,
) -> None:
    counter = Counter("write", sum(entry.nbytes for entry in content.tensors), progress)
    opened: dict[Path, Checkpoint] = {}
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with CheckpointWriter(folder) as writer:
        writer.declare(content.tensors)
        for entry in content.tensors:
            source = local.get(entry.sha256)
            digest = hashlib.sha256()
            for block in _tensor_blocks(entry, source, cache, opened):
                digest.update(block)
                writer.write(entry.name, block)
                counter.add(len(block))
            if digest.hexdigest() != entry.sha256:
                raise _damaged(source, cache / entry.sha256)
        for file in content.files:
            writer.write_file(file.path, _file_bytes(file, local.get(file.sha256), cache))
        writer.write_file(RELEASE_FILE, about)


def _tensor_blocks(
    entry: TensorEntry, source: _Source | None, cache: Path, opened: dict[Path, Checkpoint]
) -> Iterator[bytearray]:
    if entry.nbytes == 0:
        return
    if source is None:
        with PositionalFile(cache / entry.sha256) as file:
            for start, stop in blocks(entry.nbytes, _BLOCK_BYTES):
                yield file.read(start, stop)
        return
    try:
        if source.folder not in opened:
            opened[source.folder] = Checkpoint.open(source.folder)
        for start, stop in blocks(entry.nbytes, _BLOCK_BYTES):
            yield opened[source.folder].raw(source.name, start, stop)
    except ColdmergeError as error:
        raise _DamagedError(source.folder) from error


def _file_bytes(file: FileEntry, source: _Source | None, cache: Path) -> bytes:
    if file.size == 0:
        data = b""
    elif source is None:
        data = (cache / file.sha256).read_bytes()
    else:
        try:
            data = (source.folder / source.name).read_bytes()
        except OSError as error:
            raise _DamagedError(source.folder) from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise _damaged(source, cache / file.sha256)
    return data


def _damaged(source: _Source | None, cached: Path) -> Exception:
    if source is not None:
        return _DamagedError(source.folder)
    cached.unlink(missing_ok=True)
    return IntegrityError(
        "pull.damaged_cache",
        "A downloaded tensor changed on this disk before it was used.",
        expected=cached.name,
        hint="It was removed: pull again; if it repeats, check the disk.",
    )


def _listing(folder: Path, digest: str | None = None) -> Content | None:
    """What a complete local folder holds, if it is there (and has `digest`)."""
    try:
        body = json.loads((folder / RELEASE_FILE).read_bytes())
        content = Content.from_json(body["listing"])
    except (OSError, ValueError, KeyError, TypeError, IntegrityError):
        return None
    return content if digest in (None, content.digest) else None


def _local_sources(home: Home, model: str, damaged: set[Path]) -> dict[str, _Source]:
    """Where each sha256 that this machine already has can be copied from."""
    folders = [home.release(model, number) for number in home.local_releases(model)]
    if home.candidates(model).is_dir():
        folders += sorted(home.candidates(model).glob("?" * 64))
    found: dict[str, _Source] = {}
    for folder in folders:
        content = _listing(folder) if folder not in damaged else None
        for entry in content.tensors if content else ():
            found[entry.sha256] = _Source(folder, entry.name)
        for file in content.files if content else ():
            found[file.sha256] = _Source(folder, file.path)
    return found


def prune(home: Home, model: str, *, keep: int, candidate: str | None = None) -> None:
    """Remove all but the newest `keep` releases, and every candidate but `candidate`.

    What cannot be removed now, because another process does so too, goes the next time.
    """
    for number in home.local_releases(model)[:-keep]:
        shutil.rmtree(home.release(model, number), ignore_errors=True)
    folder = home.candidates(model)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != candidate:
            shutil.rmtree(path, ignore_errors=True)
