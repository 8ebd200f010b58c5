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

from coldmerge.core.audit_log import Checked, check_log
from coldmerge.core.documents import Signed
from coldmerge.core.errors import IntegrityError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.core.files import fsync_path
from coldmerge.core.keys import Keyring

TYPE = "coldmerge.audit-export/1"
FILE_NAME = "audit.jsonl"
MAX_LINE = 8 * 2**20


@dataclass(frozen=True)
class AuditFile:
    """A log to write, or one that was read.

    `public_key` (hexadecimal) is one of the signing keys; `statements` lead to the others.
    """

    federation: str
    public_key: str
    statements: list[Signed]
    checkpoints: list[Signed]
    entries: list[bytes] = field(repr=False)

    def check(self, expected: str | None = None, *more: Signed) -> Checked:
        """Check the log against its checkpoints, and against `more` that others kept.

        `expected`: a signing key that is known from elsewhere: the file's must follow from it.

        Raises:
            IntegrityError: the first difference, with its position.
            ManifestError: a signature does not fit.
        """
        keys = self._keyring(expected or self.public_key)
        self._check_order()
        checked = check_log(self.federation, self.entries, [*self.checkpoints, *more], keys)
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

    def _keyring(self, pinned: str) -> Keyring:
        keys = Keyring(self.federation, pinned, self.statements)
        believed = all(signed in keys.statements for signed in self.statements)
        if self.public_key not in keys.trusted or not believed:
            raise IntegrityError(
                "audit.other_key",
                "The log's signing keys do not follow from the one that is known.",
                expected=pinned,
                got=self.public_key,
                hint="It is another federation's log, or a made-up one.",
                position=0,
            )
        return keys

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

    def lines(self) -> Iterator[bytes]:
        """The file, line by line."""
        yield _line(
            {
                "type": TYPE,
                "federation": self.federation,
                "public_key": self.public_key,
                "keys": len(self.statements),
                "checkpoints": len(self.checkpoints),
                "entries": len(self.entries),
            }
        )
        for name, signatures in (("key", self.statements), ("checkpoint", self.checkpoints)):
            for signed in signatures:
                text = signed.document.decode("ascii")
                yield _line({name: text, "signature": signed.signature.hex()})
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
    header = reader.json("type", "federation", "public_key", "keys", "checkpoints", "entries")
    counts = [header["keys"], header["checkpoints"], header["entries"]]
    if header["type"] != TYPE or not all(type(count) is int and count >= 0 for count in counts):
        raise reader.bad(f"a header of type {TYPE}")
    public_key = reader.hex(header["public_key"], 32).hex()
    statements = [reader.signed("key") for _ in range(counts[0])]
    checkpoints = [reader.signed("checkpoint") for _ in range(counts[1])]
    entries = [reader.take() for _ in range(counts[2])]
    reader.end()
    return AuditFile(str(header["federation"]), public_key, statements, checkpoints, entries)


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

    def signed(self, name: str) -> Signed:
        line = self.json(name, "signature")
        document = str(line[name]).encode("ascii", "replace")
        return Signed(document, self.hex(line["signature"], 64))

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
