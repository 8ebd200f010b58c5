"""Logs that somebody changed: every one is found, offline; honest ones are accepted.

`pytest tests/attacks/test_tampered_logs.py -s` prints the counts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coldmerge.core.audit_file import AuditFile, parse_audit_file
from coldmerge.core.documents import Receipt, ReleaseRecord, Signed, sign
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.evidence import AuditCheckpoint, AuditEntry, Latest
from coldmerge.core.keys import KeyStatement
from coldmerge.core.merkle import merkle_root

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OLDER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw().hex()
HOUR = timedelta(hours=1)


def leaves(count: int, seed: int) -> list[bytes]:
    """A log as a coordinator writes it: entries, receipts, and a chain of releases."""
    draw = random.Random(seed)
    found: list[bytes] = []
    previous: ReleaseRecord | None = None
    while len(found) < count:
        at, what = NOW + timedelta(minutes=len(found)), draw.random()
        digest = draw.randbytes(32).hex()
        if what < 0.2:
            previous = ReleaseRecord(
                federation="fed",
                model="triage",
                number=0 if previous is None else previous.number + 1,
                content_digest=digest,
                master_digest=digest,
                previous_record=None if previous is None else previous.digest(),
                parents=(),
                round=None,
                recipe={"method": "mean"},
                contributions=(),
                created_at=at,
            )
            found.append(previous.canonical())
        elif what < 0.5:
            receipt = Receipt(
                federation="fed",
                model="triage",
                round="round-1",
                contributor=f"org-{draw.randrange(5)}",
                contribution=f"contribution-{digest[:24]}",
                manifest_digest=digest,
                payload_bytes=draw.randrange(10**6),
                accepted_at=at,
            )
            found.append(receipt.canonical())
        else:
            entry = AuditEntry(
                federation="fed",
                position=len(found),
                at=at,
                kind=draw.choice(("round.sealed", "contributor.revoked", "gate.decided")),
                actor=draw.choice(("local admin", "coordinator", "boss/box")),
                ids={"round": "round-1"},
                detail={"reason": "why", "inputs": draw.randrange(9), "held": False},
            )
            found.append(entry.canonical())
    return found


def statements() -> list[Signed]:
    """The key was exchanged once, and takes over from one that signed nothing here."""
    said = KeyStatement(
        federation="fed",
        number=1,
        public_key=PUBLIC,
        previous=OLDER.public_key().public_bytes_raw().hex(),
        created_at=NOW,
    )
    return [sign(said, OLDER), sign(said, KEY)]


def head(entries: list[bytes], size: int) -> Signed:
    records = [ReleaseRecord.parse(raw) for raw in entries[:size] if b"coldmerge.release/1" in raw]
    newest = {one.model: Latest(number=one.number, record_digest=one.digest()) for one in records}
    issued = NOW + timedelta(minutes=size)
    return sign(
        AuditCheckpoint(
            federation="fed",
            size=size,
            root=merkle_root(entries[:size]),
            releases=newest,
            key=1,
            issued_at=issued,
            expires_at=issued + 24 * HOUR,
        ),
        KEY,
    )


@lru_cache
def honest(seed: int, count: int = 40) -> AuditFile:
    entries = leaves(count, seed)
    sizes = sorted({*random.Random(seed).sample(range(1, count), 4), count})
    return AuditFile("fed", PUBLIC, statements(), [head(entries, size) for size in sizes], entries)


def check(lines: list[bytes], kept: Signed) -> None:
    """What `coldmerge audit verify FILE --checkpoint` does."""
    whole = b"".join(lines).splitlines(keepends=True)
    parse_audit_file(whole).check(PUBLIC, kept)


Lines = list[bytes]


def edit_a_byte(lines: Lines, draw: random.Random) -> Lines:
    raw = bytearray(b"".join(lines))
    at = draw.randrange(len(raw))
    raw[at] = draw.choice([byte for byte in range(256) if byte != raw[at]])
    return bytes(raw).splitlines(keepends=True)


def drop(lines: Lines, draw: random.Random) -> Lines:
    at = draw.randrange(len(lines))
    return lines[:at] + lines[at + 1 :]


def drop_and_renumber(lines: Lines, draw: random.Random) -> Lines:
    """Drop the end of the log, and adjust header, positions and checkpoints to it."""
    file = parse_audit_file(lines)
    size = draw.randrange(len(file.entries))
    heads = [one for one in file.checkpoints if AuditCheckpoint.parse(one.document).size <= size]
    last = AuditCheckpoint.parse(heads[-1].document).size if heads else 0
    return list(AuditFile("fed", PUBLIC, file.statements, heads, file.entries[:last]).lines())


def reorder(lines: Lines, draw: random.Random) -> Lines:
    a, b = draw.sample(range(len(lines)), 2)
    if lines[a] == lines[b]:
        return drop(lines, draw)
    changed = list(lines)
    changed[a], changed[b] = lines[b], lines[a]
    return changed


def duplicate(lines: Lines, draw: random.Random) -> Lines:
    at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
    return [*lines[:to], lines[at], *lines[to:]]


def truncate(lines: Lines, draw: random.Random) -> Lines:
    raw = b"".join(lines)
    return raw[: draw.randrange(len(raw))].splitlines(keepends=True)


def swap_signatures(lines: Lines, draw: random.Random) -> Lines:
    file = parse_audit_file(lines)
    a, b = draw.sample(range(len(file.checkpoints)), 2)
    heads = list(file.checkpoints)
    heads[a], heads[b] = (
        Signed(heads[a].document, heads[b].signature),
        Signed(heads[b].document, heads[a].signature),
    )
    return list(AuditFile("fed", PUBLIC, file.statements, heads, file.entries).lines())


def checkpoint_of_another_log(lines: Lines, draw: random.Random) -> Lines:
    """A checkpoint with a true signature, of another history."""
    file = parse_audit_file(lines)
    other = leaves(len(file.entries), draw.randrange(10**9) + 10**6)
    heads = list(file.checkpoints)
    at = draw.randrange(len(heads))
    heads[at] = head(other, AuditCheckpoint.parse(heads[at].document).size)
    return list(AuditFile("fed", PUBLIC, file.statements, heads, file.entries).lines())


def rewrite_an_entry(lines: Lines, draw: random.Random) -> Lines:
    """A well-formed entry in the place of another, with the numbers right."""
    file = parse_audit_file(lines)
    entries = list(file.entries)
    at = draw.randrange(len(entries))
    entries[at] = AuditEntry(
        federation="fed",
        position=at,
        at=NOW,
        kind="upload.refused",
        actor="org-1/box",
        ids={},
        detail={"code": "made.up", "nonce": draw.randrange(10**9)},
    ).canonical()
    return list(AuditFile("fed", PUBLIC, file.statements, file.checkpoints, entries).lines())


ATTACKS: tuple[Callable[[Lines, random.Random], Lines], ...] = (
    edit_a_byte,
    edit_a_byte,
    drop,
    drop_and_renumber,
    reorder,
    duplicate,
    truncate,
    swap_signatures,
    checkpoint_of_another_log,
    rewrite_an_entry,
)


def test_every_tampered_log_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    found: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    accepted, passed = 0, []
    for number in range(1000):
        draw = random.Random(number)
        file = honest(number % 25)
        lines = list(file.lines())
        if number < 25:
            check(lines, file.checkpoints[-1])
            accepted += 1
        attack = ATTACKS[number % len(ATTACKS)]
        changed = attack(lines, draw)
        assert changed != lines
        try:
            check(changed, file.checkpoints[-1])
        except ColdmergeError as error:
            found[attack.__name__] += 1
            codes[error.code] += 1
        else:
            passed.append((number, attack.__name__))
    with capsys.disabled():
        print(f"\n{found.total()} of 1000 tampered logs found, {accepted} of 25 honest accepted")
        print(f"  {dict(found)}\n  {dict(codes)}")
    assert passed == []
    assert accepted == 25


def test_a_log_with_the_kinds_of_before_verifies_as_it_is() -> None:
    """Refused uploads were once `contribution.refused`, and receipts shown as admitted."""
    refused = AuditEntry(
        federation="fed",
        position=12,
        at=NOW + timedelta(minutes=12),
        kind="contribution.refused",
        actor="org-1/box",
        ids={"contributor": "org-1"},
        detail={"code": "manifest.wrong_base", "call": "Begin"},
    )
    entries = [*leaves(12, 7), refused.canonical()]
    heads = [head(entries, size) for size in (5, 13)]
    file = AuditFile("fed", PUBLIC, statements(), heads, entries)
    checked = parse_audit_file(list(file.lines())).check(PUBLIC, heads[-1])
    receipts = sum(b"coldmerge.receipt/1" in raw for raw in entries)
    assert receipts > 0
    assert checked.kinds["contribution.received"] == receipts
    assert checked.kinds["contribution.refused"] == 1
    assert checked.unsigned == 0
