"""Which releases to believe: signed, whole, one chain, and never older than the last seen."""

from __future__ import annotations

import re

from coldmerge.core.checkpoint import RELEASE_FILES
from coldmerge.core.digests import Content
from coldmerge.core.documents import ReleaseRecord
from coldmerge.core.dtypes import NUMPY, nbytes
from coldmerge.core.errors import IntegrityError
from coldmerge.wire.convert import content_of, signed_from_proto
from coldmerge.wire.v1 import models_pb2
from coldmerge_client.home import Seen
from coldmerge_client.session import Session

_HINT = "Do not use this release; ask the coordinator's admin what happened."


def checked_record(release: models_pb2.Release, model: str, session: Session) -> ReleaseRecord:
    """The signed record of a published release, fitting the message it came in.

    Raises:
        ManifestError: the signature is not the coordinator's.
        IntegrityError: the record is about another release.
    """
    record = session.verify(signed_from_proto(release.record), ReleaseRecord)
    said = (record.federation, record.model, record.number, record.content_digest)
    asked = (session.member.federation, model, release.number, release.content_digest)
    if said != asked:
        raise IntegrityError(
            "release.wrong_record",
            "The signed record is about another release.",
            expected=asked,
            got=said,
            hint=_HINT,
            model=model,
            number=release.number,
        )
    return record


def checked_content(release: models_pb2.Release) -> Content:
    """The listing of a release or candidate, safe to write to disk.

    Raises:
        IntegrityError: it does not have the digest it claims, or lists what no release
            may hold: code, unknown types, wrong sizes.
    """
    content = content_of(release)
    problem = None
    for entry in content.tensors:
        if entry.dtype not in NUMPY or nbytes(entry.dtype, entry.shape) != entry.nbytes:
            problem = f"tensor {entry.name} with {entry.dtype} {entry.shape} {entry.nbytes}"
    for file in content.files:
        if not _allowed_file(file.path):
            problem = f"file {file.path}"
    if problem:
        raise IntegrityError(
            "release.forbidden_content",
            "A release lists something that no release may hold.",
            expected="tensors of known types, configuration and tokenizer files",
            got=problem,
            hint=_HINT,
            model=release.model,
        )
    return content


def _allowed_file(path: str) -> bool:
    if "/" in path:
        return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/config\.json", path))
    return any(_matches(path, pattern) for pattern in RELEASE_FILES) and not path.endswith(
        ".index.json"
    )


def _matches(path: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), path) is not None


def check_not_older(
    session: Session, model: str, record: ReleaseRecord, *, allow_older: bool = False
) -> None:
    """Refuse a release older than the last seen, and one whose history was rewritten.

    A rollback is fine: it is an old content under a new number. `allow_older` lets an
    older one pass that a person asked for by its number.

    Raises:
        IntegrityError: the coordinator went back, or its records do not chain up.
    """
    seen = session.home.seen(model)
    if seen is None:
        return
    if record.number < seen.number:
        if allow_older:
            return
        raise IntegrityError(
            "release.older_than_seen",
            "The coordinator offers a release older than the last one seen here.",
            expected=f"release {seen.number} or later",
            got=f"release {record.number}",
            hint="Its database may have been set back: ask the admin (a true rollback has a new "
            "number). To look at an old release on purpose, use `coldmerge pull --release N`.",
            model=model,
        )
    _check_chain(session, model, seen, record)


def _check_chain(session: Session, model: str, seen: Seen, record: ReleaseRecord) -> None:
    """Follow `previous_record` from the last seen release to `record`."""
    digest = seen.record_digest
    if record.number > seen.number + 1:
        for release in session.releases_between(model, seen.number, record.number):
            step = checked_record(release, model, session)
            digest = step.digest() if step.previous_record == digest else ""
    reached = record.digest() if record.number == seen.number else record.previous_record
    if reached != digest:
        raise IntegrityError(
            "release.rewritten_history",
            "The records of this model do not lead from the last release seen here to this one.",
            expected=f"a chain from release {seen.number}, record {seen.record_digest}",
            got=f"release {record.number} after record {record.previous_record}",
            hint=_HINT,
            model=model,
            number=record.number,
        )
