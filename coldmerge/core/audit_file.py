"""An audit log as one file: what `coldmerge audit export` writes, and `verify` reads.

JSON lines in one form only, so that no byte is free: a header, the signing keys, the
checkpoints, the entries. An entry's line is its leaf, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from coldmerge.core.audit_log import Checked, check_log
from coldmerge.core.documents import Signed
from coldmerge.core.errors import IntegrityError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.core.files import fsync_path

TYPE = "coldmerge.audit-export/1"
FILE_NAME = "audit.jsonl"
MAX_LINE = 8 * 2**20


@dataclass(frozen=True)
class AuditFile:
    """A log to write, or one that was read. `keys`: number → public key, 32 bytes."""

    federation: str
    keys: dict[int, bytes]
    checkpoints: list[Signed]
    entries: list[bytes] = field(repr=False)

    def check(self, expected: Mapping[int, bytes] | None = None, *more: Signed) -> Checked:
        """Check the log against its checkpoints, and against `more` that others kept.

        `expected`: signing keys that are known from elsewhere; they must be the file's.

        Raises:
            IntegrityError: the first difference, with its position.
            ManifestError: a signature does not fit.
        """
        self._check_keys(expected or {})
        self._check_order()
        checked = check_log(self.federation, self.entries, [*self.checkpoints, *more], self._key_of)
        if checked.unsigned or not self.checkpoints:
            raise IntegrityError(
                "audit.unsigned",
                "The log has entries after its last checkpoint: nobody signed them.",
                expected="a checkpoint of the whole log",
                got=f"{checked.unsigned} entries more",
                hint="Export it again: `coldmerge audit export` signs the head.",
                position=checked.size - checked.unsigned,
            )
        return checked

    def _check_keys(self, expected: Mapping[int, bytes]) -> None:
        for number, key in expected.items():
            if self.keys.get(number) != key:
                raise IntegrityError(
                    "audit.other_key",
                    "The log was signed with another key than the federation's.",
                    expected=f"key {number}: {key.hex()}",
                    got=self.keys[number].hex() if number in self.keys else "no such key",
                    hint="It is another federation's log, or a made-up one.",
                    position=0,
                )

    def _check_order(self) -> None:
        sizes = [AuditCheckpoint.parse(signed.document).size for signed in self.checkpoints]
        if sizes != sorted(set(sizes)):
            raise IntegrityError(
                "audit.checkpoint_order",
                "The checkpoints of the log are not in order.",
                expected="sizes that grow",
                got=sizes[:20],
                hint="Export it again with `coldmerge audit export`.",
                position=0,
            )

    def _key_of(self, number: int) -> Ed25519PublicKey:
        if number not in self.keys:
            raise IntegrityError(
                "audit.no_key",
                "A checkpoint is signed with a key that the log does not name.",
                got=f"key {number}",
                hint="Export the log again.",
            )
        return Ed25519PublicKey.from_public_bytes(self.keys[number])

    def lines(self) -> Iterator[bytes]:
        """The file, line by line."""
        yield _line(
            {
                "type": TYPE,
                "federation": self.federation,
                "keys": len(self.keys),
                "checkpoints": len(self.checkpoints),
                "entries": len(self.entries),
            }
        )
        for number, key in sorted(self.keys.items()):
            yield _line({"key": number, "public_key": key.hex()})
        for signed in self.checkpoints:
            text = signed.document.decode("ascii")
            yield _line({"checkpoint": text, "signature": signed.signature.hex()})
        for raw in self.entries:
            yield raw + b"\n"

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        temporary = path.with_name(f".{path.name}.partial")
        with temporary.open("wb") as file:
            file.writelines(self.lines())
        fsync_path(temporary)
        temporary.rename(path)
        fsync_path(path.parent)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def read_audit_file(path: Path) -> AuditFile:
    """Read an export; nothing in it is verified yet.

    Raises:
        IntegrityError: it is not a file that `write` makes.
    """
    with (path / FILE_NAME if path.is_dir() else path).open("rb") as file:
        return parse_audit_file(iter(lambda: file.readline(MAX_LINE), b""))


def parse_audit_file(lines: Iterable[bytes]) -> AuditFile:
    """Read an export's lines; nothing in it is verified yet.

    Raises:
        IntegrityError: `AuditFile.lines` would not make them.
    """
    reader = _Reader(iter(lines))
    header = reader.json("type", "federation", "keys", "checkpoints", "entries")
    counts = [header["keys"], header["checkpoints"], header["entries"]]
    if header["type"] != TYPE or not all(type(count) is int and count >= 0 for count in counts):
        raise reader.bad(f"a header of type {TYPE}")
    keys, checkpoints = {}, []
    for _ in range(counts[0]):
        line = reader.json("key", "public_key")
        keys[line["key"]] = reader.hex(line["public_key"], 32)
    for _ in range(counts[1]):
        line = reader.json("checkpoint", "signature")
        document = str(line["checkpoint"]).encode("ascii", "replace")
        checkpoints.append(Signed(document, reader.hex(line["signature"], 64)))
    entries = [reader.take() for _ in range(counts[2])]
    reader.end()
    if list(keys) != sorted(set(keys)) or len(keys) != counts[0]:
        raise reader.bad("keys in order")
    return AuditFile(str(header["federation"]), keys, checkpoints, entries)


class _Reader:
    """Lines with their numbers, strict about their form."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._number = 0

    def take(self) -> bytes:
        self._number += 1
        line = next(self._lines, b"")
        if not line.endswith(b"\n"):
            raise self.bad("another line" if not line else "a whole line")
        return line[:-1]

    def json(self, *names: str) -> dict[str, Any]:
        raw = self.take()
        try:
            found = json.loads(raw)
            fits = isinstance(found, dict) and set(found) == set(names) and _line(found)[:-1] == raw
        except (ValueError, RecursionError):
            fits = False
        if not fits:
            raise self.bad(", ".join(names))
        return dict(found)

    def hex(self, text: object, length: int) -> bytes:
        try:
            raw = bytes.fromhex(str(text))
        except ValueError:
            raw = b""
        if len(raw) != length or raw.hex() != text:
            raise self.bad(f"{2 * length} hexadecimal digits")
        return raw

    def end(self) -> None:
        self._number += 1
        if next(self._lines, b""):
            raise self.bad("the end of the file")

    def bad(self, expected: str) -> IntegrityError:
        return IntegrityError(
            "audit.bad_file",
            "The file is not an exported audit log, or was changed.",
            expected=expected,
            got="something else",
            hint="Export it again with `coldmerge audit export`.",
            line=self._number,
        )
