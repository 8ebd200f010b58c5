"""What an identity key signs to prove itself on the enrolment port."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from coldmerge.wire.invitation import token_digest


def enrol_message(token: str, csr_der: bytes) -> bytes:
    """The bytes that `EnrolRequest.proof` signs."""
    return b"coldmerge enrol v1\n" + token_digest(token) + csr_der


def renew_message(at: Timestamp, csr_der: bytes) -> bytes:
    """The bytes that `RenewRequest.proof` signs; `at` is rendered in RFC 3339."""
    return b"coldmerge renew v1\n" + at.ToJsonString().encode("ascii") + b"\n" + csr_der


def rekey_message(at: Timestamp, new_identity_public_key: bytes, csr_der: bytes) -> bytes:
    """The bytes that both proofs of a `RenewRequest` with a new identity key sign."""
    begin = b"coldmerge rekey v1\n" + at.ToJsonString().encode("ascii") + b"\n"
    return begin + new_identity_public_key + csr_der
