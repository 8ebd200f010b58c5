"""The audit log as this home knows it: its last checkpoint, and what it refuses after that.

A checkpoint must be signed, of our federation, fresh by our clock, and extend the last one
that this home has verified. A release must be in the log, and the latest one must be the
checkpoint's. So a coordinator that goes back, shows us another history than before, or
keeps news from us is found out by whoever it tries that on.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from coldmerge.core.audit_log import check_key
from coldmerge.core.documents import ReleaseRecord, Signed
from coldmerge.core.errors import ConflictError, IntegrityError, NotFoundError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.core.keys import Keyring
from coldmerge.core.merkle import leaf_hash, verify_consistency, verify_inclusion
from coldmerge.wire.convert import signed_from_proto
from coldmerge_client.files import exclusive
from coldmerge_client.session import Session

OLDEST = timedelta(hours=1)
"""How long ago, by our clock, a checkpoint may have been issued."""
SKEW = timedelta(minutes=5)
"""How far ahead of ours the coordinator's clock may be."""

COPIED = timedelta(hours=1)
"""How long a replica may sign with the old key after a rotation: until it is copied there."""

_ASK = "Use nothing of it; tell the coordinator's admin and the other contributors."
_CLOCK = (
    "Check this machine's clock (NTP) first; if it is right, the coordinator's is wrong, or "
    "somebody keeps its news from you: ask its admin."
)


def refresh(session: Session) -> AuditCheckpoint | None:
    """Fetch the log's head now, check it against the last one, and remember it.

    None: this coordinator is older than the audit log, and always was to this home.

    Raises:
        IntegrityError: rollback, fork, freeze, a head of another federation, or one signed
            with a key that was replaced.
        ManifestError: the signature is not the coordinator's.
    """
    with exclusive(session.home.lock("checkpoint"), "the audit log's checkpoint", wait=True):
        kept = session.home.checkpoint()
        last = None if kept is None else AuditCheckpoint.parse(kept.document)
        answer = _fetch(session, last)
        if answer is None:
            return None
        signed = signed_from_proto(answer.checkpoint)
        found = checked(session, signed)
        _check_time(found, session.clock.now())
        _check_in_use(found, session.home.keyring(session.member))
        if last is not None:
            _check_extends(last, found, list(answer.consistency))
        _keep(session, signed)
    return found


def _fetch(session: Session, last: AuditCheckpoint | None) -> Any | None:
    try:
        return session.checkpoint(0 if last is None else last.size)
    except ConflictError as error:
        if last is None or error.code != "audit.shorter":
            raise
        raise _rolled_back(f"at least {last.size} entries", f"{error.got} entries") from error
    except NotFoundError as error:
        if error.code != "wire.failed":
            raise
        if last is None:
            return None
        raise _rolled_back(f"a log of {last.size} entries", "no audit log at all") from error


def checked(session: Session, signed: Signed) -> AuditCheckpoint:
    """A checkpoint with the coordinator's signature, of our federation.

    Raises:
        ManifestError: the signature is not the coordinator's.
        IntegrityError: it is another federation's, or names another key than its own.
    """
    found = session.verify(signed, AuditCheckpoint)
    check_key(signed, found, session.home.keyring(session.member))
    if found.federation != session.member.federation:
        raise IntegrityError(
            "checkpoint.other_federation",
            "The checkpoint is of another federation's audit log.",
            expected=session.member.federation,
            got=found.federation,
            hint=_ASK,
        )
    return found


def _check_time(found: AuditCheckpoint, now: datetime) -> None:
    if now >= found.expires_at or now - found.issued_at > OLDEST:
        raise IntegrityError(
            "checkpoint.stale",
            "The coordinator answered with an old checkpoint: it, or somebody between, "
            "keeps news back.",
            expected=f"one issued after {(now - OLDEST).isoformat()}",
            got=f"issued {found.issued_at.isoformat()}, expires {found.expires_at.isoformat()}",
            hint=_CLOCK,
        )
    if found.issued_at - now > SKEW:
        raise IntegrityError(
            "checkpoint.from_the_future",
            "The coordinator's checkpoint was issued after now, by this machine's clock.",
            expected=f"one issued before {(now + SKEW).isoformat()}",
            got=f"issued {found.issued_at.isoformat()}",
            hint=_CLOCK,
        )


def _check_in_use(found: AuditCheckpoint, keys: Keyring) -> None:
    """A key that was replaced signs no more checkpoints: whoever has it may have stolen it."""
    replaced = keys.replaced_at(found.key)
    if replaced is None or found.issued_at - replaced <= COPIED:
        return
    raise IntegrityError(
        "checkpoint.retired_key",
        "The checkpoint is signed with a key that was replaced before it was issued.",
        expected=f"key {found.key + 1} or later, since {replaced.isoformat()}",
        got=f"key {found.key}, issued {found.issued_at.isoformat()}",
        hint="A replica may lack the new keys/signing.key: ask the admin to copy it there. If none "
        "does, the old key was stolen: use nothing of it.",
    )


def _check_extends(last: AuditCheckpoint, found: AuditCheckpoint, proof: list[bytes]) -> None:
    if found.size < last.size:
        raise _rolled_back(f"at least {last.size} entries", f"{found.size} entries")
    roots = bytes.fromhex(last.root), bytes.fromhex(found.root)
    if not verify_consistency(last.size, found.size, *roots, proof):
        raise IntegrityError(
            "checkpoint.forked",
            "The coordinator's audit log does not continue the one that this home has seen: "
            "its history was rewritten, or others are shown another one.",
            expected=f"a log whose first {last.size} entries have the root {last.root}",
            got=f"{found.size} entries, root {found.root}, and no proof",
            hint=f"Keep state.json: it is the evidence. {_ASK}",
        )
    for model, before in last.releases.items():
        now = found.releases.get(model)
        if now is None or now.number < before.number:
            raise _rolled_back(
                f"release {before.number} of {model} or later",
                "none" if now is None else f"release {now.number}",
            )


def _rolled_back(expected: str, got: str) -> IntegrityError:
    return IntegrityError(
        "checkpoint.rolled_back",
        "The coordinator went back behind what this home has seen.",
        expected=expected,
        got=got,
        hint="Its database may have been set back to a backup: ask the admin. Nothing here "
        "was changed.",
    )


def _keep(session: Session, signed: Signed) -> None:
    with session.home.state() as state:
        state["checkpoint"] = {
            "document": signed.document.decode("ascii"),
            "signature": signed.signature.hex(),
        }


def check_release(
    session: Session,
    checkpoint: AuditCheckpoint | None,
    record: ReleaseRecord,
    *,
    latest: bool,
) -> None:
    """Refuse a release that the audit log does not hold, or that is not its latest.

    `checkpoint` was fetched before the release was asked for. A release that was published
    in between is looked up in a newer one.

    Raises:
        IntegrityError: it is not in the log; or `latest`, and the log names another one.
    """
    if checkpoint is None:
        return
    named = checkpoint.releases.get(record.model)
    if named is None or named.number < record.number:
        checkpoint = refresh(session) or checkpoint
        named = checkpoint.releases.get(record.model)
    if named is None or named.number < record.number:
        raise _not_logged(record, checkpoint, "the checkpoint knows no such release")
    same = (named.number, named.record_digest) == (record.number, record.digest())
    if latest and not same:
        raise IntegrityError(
            "release.not_latest",
            "The coordinator offers a release as its latest that its audit log does not.",
            expected=f"release {named.number}, record {named.record_digest}",
            got=f"release {record.number}, record {record.digest()}",
            hint=_ASK,
            model=record.model,
        )
    prove(session, checkpoint, record.canonical(), record)


def prove(
    session: Session, checkpoint: AuditCheckpoint, document: bytes, record: ReleaseRecord
) -> int:
    """Have the coordinator prove that its log holds `document`: the position.

    Raises:
        IntegrityError: it cannot.
    """
    leaf = leaf_hash(document)
    try:
        answer = session.prove(leaf, checkpoint.size)
    except NotFoundError as error:
        raise _not_logged(record, checkpoint, error.message) from error
    root = bytes.fromhex(checkpoint.root)
    position = int(answer.position)
    if not verify_inclusion(leaf, position, checkpoint.size, list(answer.inclusion), root):
        raise _not_logged(record, checkpoint, f"a wrong proof, for position {position}")
    return position


def _not_logged(record: ReleaseRecord, checkpoint: AuditCheckpoint, got: str) -> IntegrityError:
    return IntegrityError(
        "release.not_in_the_log",
        "The audit log does not hold this release's record: others may never have seen it.",
        expected=f"a proof against the log of {checkpoint.size} entries",
        got=got,
        hint=_ASK,
        model=record.model,
        number=record.number,
    )
