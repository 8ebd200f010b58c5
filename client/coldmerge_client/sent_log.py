"""The sent log: a signed, hash-chained line for everything that ever left this machine.

A line is written and synced before the thing leaves. Each holds its number, the sha256
of the line before and an Ed25519 signature by the identity key, so an edit, a removal
or a reordering shows. `state.json` keeps the number and hash of the last line, so a cut
tail shows too. When the identity key changes, a line signed by the new key names the one
before it. Asking (pull, watch, certificate renewal) sends nothing made from data
and is not listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from coldmerge.core.errors import IntegrityError
from coldmerge.core.files import fsync_path
from coldmerge_client.home import Home, load_key

_START = "0" * 64
NEW_KEY = "new-keys"


@dataclass(frozen=True)
class Sent:
    """One line: what left, and when."""

    number: int
    at: datetime
    event: str
    body: Mapping[str, Any]


def record(home: Home, event: str, body: Mapping[str, Any], now: datetime) -> None:
    """Add a line, durably. `body` holds JSON values: names, sizes and digests of what leaves."""
    _record(home, home.identity_key(), event, body, now)


def record_new_key(home: Home, new: Ed25519PrivateKey, now: datetime) -> None:
    """Add the line by which a new identity key stands for all that the old one signed."""
    old = home.identity_key().public_key().public_bytes_raw().hex()
    body = {"previous_key": old, "identity_key": new.public_key().public_bytes_raw().hex()}
    _record(home, new, NEW_KEY, body, now)


def _record(
    home: Home, key: Ed25519PrivateKey, event: str, body: Mapping[str, Any], now: datetime
) -> None:
    with home.state() as state:
        head = state.get("sent", {"lines": 0, "hash": _START})
        lines = _repaired(home, head)
        head = {"lines": len(lines), "hash": _hash(lines[-1]) if lines else _START}
        content = {
            "number": head["lines"],
            "at": now.isoformat(),
            "event": event,
            "body": dict(body),
            "previous": head["hash"],
        }
        signature = key.sign(_canonical(content)).hex()
        line = _canonical({**content, "signature": signature})
        handle = os.open(home.sent_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_path(home.path)
        state["sent"] = {"lines": head["lines"] + 1, "hash": _hash(line)}


def read(home: Home) -> tuple[Sent, ...]:
    """All lines, checked.

    Raises:
        IntegrityError: a line was changed, removed, added or moved; says which.
    """
    with home.state() as state:
        lines = _repaired(home, state.get("sent", {"lines": 0, "hash": _START}))
    keys = _last_keys(home)
    found = []
    for number in reversed(range(len(lines))):
        previous = _hash(lines[number - 1]) if number else _START
        line = _checked(lines[number], number, previous, keys)
        if line.event == NEW_KEY:
            keys.append(
                Ed25519PublicKey.from_public_bytes(bytes.fromhex(line.body["previous_key"]))
            )
        found.append(line)
    return tuple(reversed(found))


def _last_keys(home: Home) -> list[Ed25519PublicKey]:
    """Who may have signed the last line: this machine's key, or the one about to take over."""
    keys = [home.identity_key().public_key()]
    waiting = home.next_keys / "identity.key"
    if waiting.exists():
        new = load_key(waiting)
        if isinstance(new, Ed25519PrivateKey):
            keys.append(new.public_key())
    return keys


def _repaired(home: Home, head: Mapping[str, Any]) -> list[bytes]:
    """The whole lines, after dropping one that a crash left half written.

    A line past the head is one that was written just before a crash: it counts.
    """
    raw = home.sent_log.read_bytes() if home.sent_log.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.splitlines()
    expected = head["lines"]
    if len(lines) < expected or (expected and _hash(lines[expected - 1]) != head["hash"]):
        raise _tampered(
            expected if len(lines) >= expected else len(lines) + 1,
            "is missing or differs from the one that was written",
        )
    if len(whole) < len(raw):
        with home.sent_log.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    return lines


def _checked(line: bytes, number: int, previous: str, keys: Sequence[Ed25519PublicKey]) -> Sent:
    try:
        content = json.loads(line)
        signature = bytes.fromhex(content.pop("signature"))
        at = datetime.fromisoformat(content["at"])
        if not any(_signed_by(key, signature, _canonical(content)) for key in keys):
            raise InvalidSignature
    except (ValueError, KeyError, TypeError, AttributeError, InvalidSignature) as error:
        raise _tampered(number + 1, "does not carry a valid signature of this machine") from error
    if content["number"] != number or content["previous"] != previous:
        raise _tampered(number + 1, "does not follow the line before it")
    return Sent(number, at, content["event"], content["body"])


def _signed_by(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _tampered(line: int, how: str) -> IntegrityError:
    return IntegrityError(
        "sent_log.tampered",
        f"Line {line} of the sent log {how}.",
        hint="Compare sent.jsonl with a backup; ask the coordinator what it received.",
        line=line,
    )


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
