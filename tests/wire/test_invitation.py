"""Invitations: whole or not at all, and bound to a fingerprint."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.timestamp_pb2 import Timestamp

from coldmerge.core.errors import ConfigError, IntegrityError
from coldmerge.wire.invitation import PREFIX, Invitation, token_digest
from coldmerge.wire.proofs import enrol_message, renew_message


@pytest.fixture(scope="module")
def invitation() -> Invitation:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
    now = datetime.now(UTC)
    root = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    ).sign(key, hashes.SHA256())
    return Invitation(
        federation="f",
        address="merge.example.org:7443",
        enrol="[::1]:7444",
        token="t" * 43,
        root=root.public_bytes(Encoding.PEM).decode(),
    )


def test_there_and_back(invitation: Invitation) -> None:
    text = invitation.render()
    assert text.startswith(PREFIX)
    assert Invitation.parse(text) == invitation
    wrapped = "\n  ".join(textwrap.wrap(text, 60))
    assert Invitation.parse(f"  {wrapped}\n") == invitation


def test_anything_else_is_refused(invitation: Invitation) -> None:
    text = invitation.render()
    for wrong in ("", PREFIX, text[:-1], text[:100], text[len(PREFIX) :], text + "A", f"{text}é"):
        with pytest.raises(ConfigError) as caught:
            Invitation.parse(wrong)
        assert caught.value.code == "invitation.malformed"
        assert "t" * 43 not in str(caught.value)


def test_fingerprints_are_compared_as_people_write_them(invitation: Invitation) -> None:
    print_ = invitation.fingerprint
    pairs = ":".join(print_[i : i + 2] for i in range(0, 64, 2)).upper()
    for told in (print_, print_.upper(), f" {print_} ", pairs, f"SHA256:{pairs}"):
        invitation.check_fingerprint(told)


@pytest.mark.parametrize("told", ["", "0" * 64, "abc"])
def test_another_fingerprint_is_refused(invitation: Invitation, told: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        invitation.check_fingerprint(told)
    assert caught.value.code == "invitation.wrong_fingerprint"


def test_part_of_a_fingerprint_is_not_enough(invitation: Invitation) -> None:
    with pytest.raises(IntegrityError):
        invitation.check_fingerprint(invitation.fingerprint[:32])


def test_what_proofs_sign() -> None:
    at = Timestamp(seconds=1_700_000_000, nanos=5_000_000)
    assert enrol_message("t", b"csr") == b"coldmerge enrol v1\n" + token_digest("t") + b"csr"
    expected = b"coldmerge renew v1\n2023-11-14T22:13:20.005Z\ncsr"
    assert renew_message(at, b"csr") == expected
