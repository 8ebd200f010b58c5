"""The audit log checked offline: every entry, every checkpoint's root, every signature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from coldmerge.core.documents import Document, Receipt, ReleaseRecord, Signed
from coldmerge.core.errors import IntegrityError, ManifestError
from coldmerge.core.evidence import AuditCheckpoint, AuditEntry, Latest
from coldmerge.core.keys import Keyring
from coldmerge.core.merkle import Frontier, leaf_hash

TURNED_BACK = timedelta(hours=1)
PUBLISHED, RECEIVED = "release.published", "contribution.received"
"""Kinds of the leaves that are documents of their own: a release record, a receipt."""
_HINT = "Keep this log as it is, and compare it with the checkpoints that contributors keep."
_TYPES: dict[bytes, type[Document]] = {
    kind.schema_name.encode(): kind for kind in (AuditEntry, ReleaseRecord, Receipt)
}


@dataclass
class Checked:
    """What a log turned out to hold. `unsigned`: entries after the last checkpoint.

    `turned_back`: entries that say they are over an hour older than one before them.
    """

    federation: str
    size: int = 0
    root: str = ""
    checkpoints: int = 0
    unsigned: int = 0
    turned_back: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    releases: dict[str, Latest] = field(default_factory=dict)


def read_leaf(raw: bytes) -> AuditEntry | ReleaseRecord | Receipt:
    """The document that a leaf is.

    Raises:
        ManifestError: it is none that a log holds, or not in canonical form.
    """
    name = raw.rpartition(b'"type":"')[2].removesuffix(b'"}')
    kind = _TYPES.get(name, AuditEntry)
    found = kind.parse(raw)
    if isinstance(found, AuditEntry | ReleaseRecord | Receipt):
        return found
    raise TypeError(kind)


def kind_of(leaf: AuditEntry | ReleaseRecord | Receipt) -> str:
    """The kind of event that a leaf tells of."""
    if isinstance(leaf, AuditEntry):
        return leaf.kind
    return PUBLISHED if isinstance(leaf, ReleaseRecord) else RECEIVED


def time_of(leaf: AuditEntry | ReleaseRecord | Receipt) -> datetime:
    """When it happened."""
    if isinstance(leaf, AuditEntry):
        return leaf.at
    return leaf.created_at if isinstance(leaf, ReleaseRecord) else leaf.accepted_at


def check_log(
    federation: str, entries: Iterable[bytes], checkpoints: Sequence[Signed], keys: Keyring
) -> Checked:
    """Recompute the log from its entries, and hold every checkpoint against it.

    Raises:
        IntegrityError: the first difference, with the position it is at.
        ManifestError: a checkpoint's signature is by none of `keys`.
    """
    heads = _heads(federation, checkpoints, keys)
    log = _Log(federation)
    waiting = heads[::-1]
    log.compare(waiting)
    for raw in entries:
        log.take(raw)
        log.compare(waiting)
    if waiting:
        raise IntegrityError(
            "audit.truncated",
            "The audit log ends before a checkpoint that was signed of it.",
            expected=f"{waiting[-1].size} entries",
            got=f"{log.checked.size}: position {log.checked.size} is missing",
            hint=_HINT,
            position=log.checked.size,
        )
    log.checked.root = log.tree.root().hex()
    log.checked.checkpoints = len(heads)
    log.checked.unsigned = log.checked.size - (heads[-1].size if heads else 0)
    return log.checked


def check_key(signed: Signed, head: AuditCheckpoint, keys: Keyring) -> None:
    """Refuse a checkpoint that names another signing key than the one that signed it.

    Raises:
        IntegrityError: it does.
    """
    signer = keys.signer_of(signed)
    number = None if signer is None else keys.number_of(signer)
    if number is not None and number != head.key:
        raise IntegrityError(
            "checkpoint.wrong_key",
            "A checkpoint names another signing key than the one that signed it.",
            expected=f"key {number}",
            got=f"key {head.key}",
            hint=_HINT,
            position=head.size,
        )


def _heads(federation: str, checkpoints: Sequence[Signed], keys: Keyring) -> list[AuditCheckpoint]:
    found: list[AuditCheckpoint] = []
    for signed in checkpoints:
        head = keys.verify(signed, AuditCheckpoint)
        check_key(signed, head, keys)
        if head.federation != federation:
            raise IntegrityError(
                "audit.other_federation",
                "A checkpoint is of another federation's log.",
                expected=federation,
                got=head.federation,
                hint=_HINT,
                position=head.size,
            )
        found.append(head)
    return sorted(found, key=lambda head: head.size)


class _Log:
    """The log as far as it was read."""

    def __init__(self, federation: str) -> None:
        self.tree = Frontier()
        self.checked = Checked(federation)
        self._record_digests: dict[str, str] = {}
        self._last_signed = 0
        self._newest: datetime | None = None

    def take(self, raw: bytes) -> None:
        """Read the next entry."""
        position = self.tree.size
        try:
            leaf = read_leaf(raw)
        except ManifestError as error:
            raise _bad(position, "an entry of the log, in canonical form", error.message) from error
        if leaf.federation != self.checked.federation:
            raise _bad(position, f"federation {self.checked.federation}", leaf.federation)
        if isinstance(leaf, AuditEntry) and leaf.position != position:
            raise _bad(position, f"position {position}", f"position {leaf.position}")
        if isinstance(leaf, ReleaseRecord):
            self._follow(position, leaf)
        kind, at = kind_of(leaf), time_of(leaf)
        self.checked.kinds[kind] = self.checked.kinds.get(kind, 0) + 1
        self._newest = max(self._newest or at, at)
        self.checked.turned_back += at < self._newest - TURNED_BACK
        self.tree.append(leaf_hash(raw))
        self.checked.size = self.tree.size

    def _follow(self, position: int, record: ReleaseRecord) -> None:
        before = self.checked.releases.get(record.model)
        expected = (0, None) if before is None else (before.number + 1, before.record_digest)
        if (record.number, record.previous_record) != expected:
            got = (record.number, record.previous_record)
            raise _bad(position, f"release and previous record {expected}", str(got))
        self.checked.releases[record.model] = Latest(
            number=record.number, record_digest=record.digest()
        )

    def compare(self, waiting: list[AuditCheckpoint]) -> None:
        """Hold the checkpoints of this size against the log; they are taken off `waiting`."""
        while waiting and waiting[-1].size == self.tree.size:
            head = waiting.pop()
            root = self.tree.root().hex()
            if root != head.root:
                raise IntegrityError(
                    "audit.wrong_root",
                    "The audit log is not the one that a checkpoint was signed of.",
                    expected=f"root {head.root} after {head.size} entries",
                    got=f"root {root}",
                    hint=f"The difference is at a position from {self._last_signed} to "
                    f"{head.size - 1}. {_HINT}",
                    position=self._last_signed,
                )
            if head.releases != self.checked.releases:
                raise IntegrityError(
                    "audit.wrong_releases",
                    "A checkpoint names other releases than the log had published by then.",
                    expected=_releases(self.checked.releases),
                    got=_releases(head.releases),
                    hint=_HINT,
                    position=head.size,
                )
            self._last_signed = head.size


def _releases(found: dict[str, Latest]) -> str:
    return ", ".join(f"{model} {latest.number}" for model, latest in found.items()) or "none"


def _bad(position: int, expected: str, got: str) -> IntegrityError:
    return IntegrityError(
        "audit.bad_entry",
        f"The audit log is damaged at position {position}.",
        expected=expected,
        got=got,
        hint=_HINT,
        position=position,
    )
