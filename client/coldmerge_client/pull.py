"""Pulling a release or candidate: only the tensors that no local release has are fetched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.digests import Content
from coldmerge.core.dtypes import blocks
from coldmerge.core.errors import ColdmergeError, IntegrityError
from coldmerge.core.files import make_folder
from coldmerge.core.progress import Counter, Progress, silent
from coldmerge.core.release_file import RELEASE_FILE, render_release_file
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.v1 import models_pb2
from coldmerge_client import checkpoints
from coldmerge_client.download import Ledger, Piece, fetch
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
    is_file: bool = False


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
    """Copy what local releases have and fetch the rest, each byte to where it stays.

    The folder grows in the cache, and is kept there when this ends before it is whole.
    """
    signed = signed_from_proto(release.record) if release.record.document else None
    key = session.home.keyring().signer_of(signed) if signed else None
    about = render_release_file(signed, key or session.member.signing_key, content)
    for left in (folder, *folder.parent.glob(f"{folder.name}.partial-*")):
        shutil.rmtree(left, ignore_errors=True)
    nursery = _nursery(session.home, model, content.digest)
    require_space(session.home.path, _needed(content, nursery), "this release")
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lines = len(content.tensors) + len(content.files)
    with (
        Ledger(nursery / "ledger", lines) as ledger,
        CheckpointWriter(folder, growing=nursery / "release") as writer,
    ):
        pieces = _declared(content, writer)
        local = _local_sources(session.home, model)
        missing = _copy(pieces, local, ledger, progress)
        total = sum(piece.nbytes for piece in missing)
        fetch(session, missing, ledger, Counter("download", total, progress))
        _repeat(pieces, ledger)
        for entry in content.tensors:
            writer.written_elsewhere(entry.name)
        writer.write_file(RELEASE_FILE, about)
    shutil.rmtree(nursery, ignore_errors=True)
    return total, sum({piece.sha256: piece.nbytes for piece in pieces}.values()) - total


def _nursery(home: Home, model: str, digest: str) -> Path:
    """The folder in which a release grows; what other pulls of the model left goes."""
    shutil.rmtree(home.cache / "blobs", ignore_errors=True)  # of clients up to 0.1
    around = home.cache / "pull" / model
    for left in around.iterdir() if around.is_dir() else ():
        if left.name != digest:
            shutil.rmtree(left, ignore_errors=True)
    make_folder(around / digest)
    return around / digest


def _needed(content: Content, nursery: Path) -> int:
    folder = sum(e.nbytes for e in content.tensors) + sum(e.size for e in content.files)
    files = (path for path in nursery.rglob("*") if path.is_file())
    return max(0, folder - sum(512 * path.stat().st_blocks for path in files))


def _declared(content: Content, writer: CheckpointWriter) -> list[Piece]:
    """A place on the disk for every byte."""
    writer.declare(content.tensors)
    for file in content.files:
        writer.declare_file(file.path, file.size)
    whole = [(e.sha256, e.nbytes, writer.slots, e.name) for e in content.tensors]
    whole += [(e.sha256, e.size, writer.files, e.path) for e in content.files]
    return [Piece(*what, line) for line, what in enumerate(whole)]


def _copy(
    pieces: Sequence[Piece], local: Mapping[str, _Source], ledger: Ledger, progress: Progress
) -> list[Piece]:
    """Copy from local releases; what must be fetched, each content once.

    What is damaged there must be fetched, too.
    """
    distinct = {piece.sha256: piece for piece in reversed(pieces) if piece.nbytes}
    there = [piece for sha256, piece in distinct.items() if sha256 in local]
    counter = Counter("write", sum(piece.nbytes for piece in there), progress)
    opened: dict[Path, Checkpoint] = {}
    for piece in there:
        try:
            whole = _written(piece, _blocks(piece, local[piece.sha256], opened), counter)
        except (ColdmergeError, FileNotFoundError):
            whole = False
        if whole:
            ledger.note(piece, piece.nbytes)
            del distinct[piece.sha256]
    return list(distinct.values())


def _blocks(
    piece: Piece, source: _Source, opened: dict[Path, Checkpoint]
) -> Iterator[bytearray | bytes]:
    if source.is_file:
        yield (source.folder / source.name).read_bytes()
        return
    if source.folder not in opened:
        opened[source.folder] = Checkpoint.open(source.folder)
    for start, stop in blocks(piece.nbytes, _BLOCK_BYTES):
        yield opened[source.folder].raw(source.name, start, stop)


def _written(piece: Piece, found: Iterable[bytearray | bytes], counter: Counter) -> bool:
    """Put `found` where the piece belongs: whether these are its bytes."""
    digest, at = hashlib.sha256(), 0
    for block in found:
        if at + len(block) > piece.nbytes:
            return False
        digest.update(block)
        piece.write(at, block)
        at += len(block)
        counter.add(len(block))
    return digest.hexdigest() == piece.sha256


def _repeat(pieces: Sequence[Piece], ledger: Ledger) -> None:
    """Contents that are there more than once: from the first place to the others.

    Raises:
        IntegrityError: the first place changed on this disk meanwhile.
    """
    first: dict[str, Piece] = {}
    for piece in pieces:
        origin = first.setdefault(piece.sha256, piece)
        if origin is piece or not piece.nbytes:
            continue
        counter = Counter("write", piece.nbytes, silent)
        spans = blocks(piece.nbytes, _BLOCK_BYTES)
        found = (origin.slots.read_at(origin.name, start, stop) for start, stop in spans)
        if not _written(piece, found, counter):
            ledger.note(origin, 0)
            raise _damaged(piece)


def _damaged(piece: Piece) -> IntegrityError:
    return IntegrityError(
        "pull.damaged_cache",
        "A downloaded tensor changed on this disk before it was used.",
        expected=piece.sha256,
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


def _local_sources(home: Home, model: str) -> dict[str, _Source]:
    """Where each sha256 that this machine already has can be copied from."""
    folders = [home.release(model, number) for number in home.local_releases(model)]
    if home.candidates(model).is_dir():
        folders += sorted(home.candidates(model).glob("?" * 64))
    found: dict[str, _Source] = {}
    for folder in folders:
        content = _listing(folder)
        for entry in content.tensors if content else ():
            found[entry.sha256] = _Source(folder, entry.name)
        for file in content.files if content else ():
            found[file.sha256] = _Source(folder, file.path, is_file=True)
    return found


def prune(home: Home, model: str, *, keep: int, candidates: Collection[str] = ()) -> None:
    """Remove all but the newest `keep` releases, and every candidate but `candidates`.

    What cannot be removed now, because another process does so too, goes the next time.
    """
    for number in home.local_releases(model)[:-keep]:
        shutil.rmtree(home.release(model, number), ignore_errors=True)
    folder = home.candidates(model)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in candidates:
            shutil.rmtree(path, ignore_errors=True)
