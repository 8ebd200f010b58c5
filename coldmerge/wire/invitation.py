"""Invitations: everything a new machine needs, in one string that is handed over whole."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BaseModel, ConfigDict, Field

from coldmerge.core.documents import Identifier
from coldmerge.core.errors import ConfigError, IntegrityError
from coldmerge.core.ids import ADDRESS

PREFIX = "coldmerge-invite:"
MAX_CHARACTERS = 2**15
"""An invitation has 2000; what is beyond is not looked at, and what was cut is refused."""

Address = Annotated[str, Field(pattern=rf"^{ADDRESS}$")]


class Invitation(BaseModel):
    """A one-time invitation. The token is a secret; the rest is public.

    `address` is the mTLS port, `enrol` the one with server TLS only, `root` the
    federation's root certificate in PEM.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    federation: Identifier
    address: Address
    enrol: Address
    token: str = Field(pattern=r"^[A-Za-z0-9_-]{43}$")
    root: str

    def render(self) -> str:
        """The string to hand over."""
        raw = self.model_dump_json().encode("ascii")
        return PREFIX + base64.urlsafe_b64encode(raw).decode("ascii").rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Read an invitation; white space from line wrapping is ignored.

        Raises:
            ConfigError: it is not an invitation, or was cut short.
        """
        compact = "".join(text[:MAX_CHARACTERS].split())
        body = compact.removeprefix(PREFIX)
        try:
            if body == compact:
                raise ValueError(f"it does not begin with {PREFIX}")
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            invitation = cls.model_validate_json(raw)
            _check_root(invitation.root)
            if invitation.render() != PREFIX + body:
                raise ValueError("it is not as `render` writes it")
        except (ValueError, binascii.Error, x509.InvalidVersion) as error:
            raise ConfigError(
                "invitation.malformed",
                "This is not a coldmerge invitation, or it was cut short.",
                expected=f"{PREFIX} followed by one long word",
                got=f"{compact[:24]}… ({len(compact)} characters)",
                hint="Copy the whole line that `coldmerge invite` printed.",
            ) from error
        return invitation

    @property
    def fingerprint(self) -> str:
        """sha256 of the root certificate in DER, as 64 hexadecimal digits."""
        return root_fingerprint(self.root.encode("ascii"))

    def check_fingerprint(self, told: str) -> None:
        """Compare the root certificate with the fingerprint told by another channel.

        Upper case, colons and spaces do not matter.

        Raises:
            IntegrityError: they differ: nothing must be sent to this coordinator.
        """
        clean = re.sub(r"[\s:]", "", told).lower().removeprefix("sha256")
        if clean != self.fingerprint:
            raise IntegrityError(
                "invitation.wrong_fingerprint",
                "The invitation's root certificate does not have the fingerprint you were told.",
                expected=clean,
                got=self.fingerprint,
                hint="Ask the admin for invitation and fingerprint again, by two channels.",
                federation=self.federation,
            )


def _check_root(pem: str) -> None:
    """TLS trusts every certificate it is given, and the fingerprint is of one: there is one.

    Raises:
        ValueError: there is other text, or another certificate.
    """
    certificate = x509.load_pem_x509_certificate(pem.encode("ascii"))
    plain = certificate.public_bytes(Encoding.PEM).decode("ascii")
    if pem.split() != plain.split():
        raise ValueError("the root is not one certificate and nothing else")


def root_fingerprint(root_pem: bytes) -> str:
    """sha256 of a PEM certificate's DER bytes, as 64 hexadecimal digits."""
    certificate = x509.load_pem_x509_certificate(root_pem)
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def token_digest(token: str) -> bytes:
    """sha256 of a token: the only form of it the coordinator keeps."""
    return hashlib.sha256(token.encode("utf-8")).digest()
