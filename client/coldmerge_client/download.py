"""Fetching blobs: several at a time, each resumable, each checked by its sha256."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from coldmerge.core.digests import file_digest
from coldmerge.core.errors import IntegrityError
from coldmerge.core.files import raise_if_full
from coldmerge.core.progress import Counter
from coldmerge_client.patience import persist
from coldmerge_client.session import Session

PARALLEL = 8


def fetch(session: Session, wanted: Mapping[str, int], folder: Path, counter: Counter) -> None:
    """Bring every blob of `wanted` (sha256 → size) into `folder/<sha256>`.

    What an earlier, interrupted call left in `folder` is not fetched again.

    Raises:
        IntegrityError: the coordinator sent other bytes than it promised.
        UnavailableError: the coordinator stayed away for the session's timeout.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    largest_first = sorted(wanted.items(), key=lambda item: (-item[1], item[0]))
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
        tasks = [
            pool.submit(_fetch_one, session, sha256, nbytes, folder, counter)
            for sha256, nbytes in largest_first
        ]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for task in tasks:
        if not task.cancelled():
            task.result()


def _fetch_one(session: Session, sha256: str, nbytes: int, folder: Path, counter: Counter) -> None:
    final, part = folder / sha256, folder / f"{sha256}.part"
    if final.exists() and final.stat().st_size == nbytes:
        counter.add(nbytes)
        return
    resumed = _size(part)
    counter.add(min(resumed, nbytes))
    persist(
        lambda: _continue(session, sha256, nbytes, part, counter),
        lambda: _size(part),
        patience=session.timeout,
        on_retry=session.on_retry,
    )
    if file_digest(part)[0] != sha256:
        part.unlink()
        counter.add(-nbytes)
        if not resumed:
            raise _wrong_bytes(sha256, "other bytes")
        _fetch_one(session, sha256, nbytes, folder, counter)
        return
    part.replace(final)


def _continue(session: Session, sha256: str, nbytes: int, part: Path, counter: Counter) -> None:
    """Append to `part` what is missing."""
    offset = _size(part)
    if offset > nbytes:
        part.unlink()
        offset = 0
    if offset == nbytes:
        part.touch()
        return
    try:
        with part.open("ab", buffering=0) as file:
            for chunk in session.read_blob(sha256, offset, nbytes):
                if chunk.offset != offset or offset + len(chunk.data) > nbytes:
                    raise _wrong_bytes(sha256, f"{len(chunk.data)} bytes at {chunk.offset}")
                file.write(chunk.data)
                offset += len(chunk.data)
                counter.add(len(chunk.data))
    except OSError as error:
        raise_if_full(error)
        raise
    if offset < nbytes:
        raise _wrong_bytes(sha256, f"{offset} of {nbytes} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _wrong_bytes(sha256: str, got: str) -> IntegrityError:
    return IntegrityError(
        "pull.wrong_bytes",
        "The coordinator sent other bytes than the release lists.",
        expected=sha256,
        got=got,
        hint="Pull again; if it happens twice, ask the admin to check the coordinator's disk.",
    )
