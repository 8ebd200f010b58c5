"""The coordinator's signing keys over time: each new one is announced by the one before it.

A participant pins the key it was told when it enrolled. From there it follows statements,
`coldmerge.key/1`: forwards, those that a key it believes signed about its successor; and
backwards, those that the newest key signed again about its predecessors, so that whoever
enrolled after a rotation can check what was signed before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AwareDatetime, Field

from coldmerge.core.documents import Document, Identifier, Signed
from coldmerge.core.errors import IntegrityError, ManifestError

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MAX_STATEMENTS = 4096

D = TypeVar("D", bound=Document)


class KeyStatement(Document):
    """That `public_key` (Ed25519, hexadecimal) took the place of `previous`; numbered from 1."""

    schema_name = "coldmerge.key/1"

    federation: Identifier
    number: int = Field(ge=1)
    public_key: PublicKey
    previous: PublicKey
    created_at: AwareDatetime


class Keyring:
    """The keys of one coordinator that are believed, and the statements that lead to them."""

    def __init__(self, federation: str, pinned: str, statements: Iterable[Signed] = ()) -> None:
        self._federation = federation
        self._trusted = {pinned: Ed25519PublicKey.from_public_bytes(bytes.fromhex(pinned))}
        self._numbered: dict[int, bytes] = {}
        self._numbers: dict[str, int] = {}
        self.statements: list[Signed] = []
        self.extend(statements)

    @property
    def trusted(self) -> tuple[str, ...]:
        """The keys, in hexadecimal, in the order they came to be believed."""
        return tuple(self._trusted)

    def extend(self, statements: Iterable[Signed]) -> None:
        """Believe what believed keys say of others; leave out the rest.

        Raises:
            IntegrityError: two statements of one number differ: history was rewritten.
        """
        waiting = list(statements)[:MAX_STATEMENTS]
        while True:
            left = [signed for signed in waiting if not self._take(signed)]
            if len(left) == len(waiting):
                return
            waiting = left

    def number_of(self, key: str) -> int | None:
        """The number of a believed key, 0 for the first; None: no statement has told it."""
        return self._numbers.get(key)

    def replaced_at(self, number: int) -> datetime | None:
        """When key `number` said that another takes its place; None: no statement is known."""
        said = self._numbered.get(number + 1)
        return None if said is None else KeyStatement.parse(said).created_at

    def _may_say(self, signer: str, said: KeyStatement) -> bool:
        """A key names its successor, and those before itself: one that was replaced, no later."""
        number = self._numbers.get(signer)
        if number is None:
            return signer in (said.previous, said.public_key)
        return said.number <= number + 1

    def _take(self, signed: Signed) -> bool:
        signer = self.signer_of(signed)
        if signer is None:
            return False
        said = KeyStatement.parse(signed.document)
        if said.federation != self._federation or not self._may_say(signer, said):
            return False
        known = self._numbered.setdefault(said.number, signed.document)
        if known != signed.document:
            raise _forked(said.number, KeyStatement.parse(known).public_key, said.public_key)
        for number, key in ((said.number - 1, said.previous), (said.number, said.public_key)):
            if self._numbers.setdefault(key, number) != number:
                raise _forked(said.number, f"key {self._numbers[key]}", key)
            self._trusted.setdefault(key, Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)))
        if signed not in self.statements:
            self.statements.append(signed)
        return True

    def signer_of(self, signed: Signed) -> str | None:
        """The believed key whose signature this is, if there is one."""
        for name, key in reversed(self._trusted.items()):
            try:
                key.verify(signed.signature, signed.document)
            except InvalidSignature:
                continue
            return name
        return None

    def verify(self, signed: Signed, kind: type[D]) -> D:
        """Check that a believed key signed the document, then parse it.

        Raises:
            ManifestError: none did, or the document is malformed.
        """
        if self.signer_of(signed) is None:
            raise ManifestError(
                "document.bad_signature",
                f"The signature on a {kind.schema_name} document is by no key of this coordinator "
                "that is believed here.",
                expected=" or ".join(key[:16] for key in self._trusted),
                hint="It was changed on the way, or signed with a key that no believed key "
                "announced; ask the admin by another channel.",
            )
        return kind.parse(signed.document)


def _forked(number: int, expected: str, got: str) -> IntegrityError:
    return IntegrityError(
        "keys.forked",
        "The coordinator names two keys as the successor of one.",
        expected=expected,
        got=got,
        hint="One of its keys may be stolen: stop, and ask the admin by another channel.",
        number=number,
    )
