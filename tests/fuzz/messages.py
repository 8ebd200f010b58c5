"""What comes over the wire before anybody is trusted: messages, invitations, certificates."""

from __future__ import annotations

import base64
import json
import re
import warnings
from datetime import UTC, datetime
from functools import cache
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from google.protobuf.message import DecodeError

from coldmerge.core.documents import Manifest, verify
from coldmerge.core.errors import ConfigError, IntegrityError, ManifestError
from coldmerge.wire.convert import instant, put_content, signed_from_proto, signed_to_proto
from coldmerge.wire.errors import from_rpc_error, to_status
from coldmerge.wire.invitation import PREFIX, Invitation
from coldmerge.wire.v1 import contributions_pb2, enrolment_pb2, models_pb2
from coldmerge.wire.version import ERROR_KEY
from coldmerge_client.trust import checked_content
from coldmerge_coordinator.identity import MAX_CSR_BYTES, read_csr, read_peer
from coldmerge_coordinator.service.contributions import _check_chunk
from coldmerge_coordinator.service.uploads import LiveUpload
from tests.fuzz.engine import Verdict, demand
from tests.fuzz.headers import _no_twice
from tests.fuzz.papers import KEY, genuine

TOKENS = (b"coldmerge-invite:", b"coldmerge://", b"-----BEGIN CERTIFICATE-----", b"\x08\x96\x01")


@cache
def _signed() -> frozenset[tuple[bytes, bytes]]:
    return frozenset((signed.document, signed.signature) for signed in genuine().values())


def begin(data: bytes) -> Verdict:
    """A `BeginRequest` off the wire: only a manifest that was signed comes out of it."""
    try:
        request = contributions_pb2.BeginRequest.FromString(data)
        signed = signed_from_proto(request.manifest)
        verify(signed, Manifest, KEY.public_key())
    except (DecodeError, ManifestError):
        return Verdict.REFUSED
    demand((signed.document, signed.signature) in _signed(), "nobody signed this")
    again = contributions_pb2.BeginRequest(manifest=signed_to_proto(signed))
    demand(again.manifest == request.manifest, "another message when written again")
    return Verdict.ACCEPTED


class _Upload:
    id = "upload-1"


def write(data: bytes) -> Verdict:
    """A `WriteRequest` off the wire, for an upload called upload-1."""
    try:
        request = contributions_pb2.WriteRequest.FromString(data)
        _check_chunk(request.upload_id, request.chunk.data, cast(LiveUpload, _Upload))
    except (DecodeError, ManifestError):
        return Verdict.REFUSED
    demand(request.upload_id in ("", "upload-1") and len(request.chunk.data) <= 2**20, "a chunk")
    demand(-(2**63) <= request.chunk.offset < 2**63, "an offset")
    return Verdict.ACCEPTED


def release(data: bytes) -> Verdict:
    """A `Release` from a coordinator that may lie: its listing is what the client writes to."""
    try:
        message = models_pb2.Release.FromString(data)
        content = checked_content(message)
    except (DecodeError, IntegrityError):
        return Verdict.REFUSED
    for entry in content.tensors:
        demand(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}", entry.name), "a tensor's name")
    for file in content.files:
        parts = file.path.split("/")
        demand(len(parts) <= 2 and all(re.fullmatch(r"[A-Za-z0-9_][\w.-]*", p) for p in parts), "")
        demand(not file.path.endswith((".py", ".bin", ".pkl", ".pt")), "code")
    again = models_pb2.Release()
    put_content(content, again)
    demand(again.content_digest == message.content_digest, "another digest")
    return Verdict.ACCEPTED


class _FailedError(Exception):
    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((ERROR_KEY, self._raw),)

    def code(self) -> Any:
        return None

    def details(self) -> str:
        return ""


def failure(data: bytes) -> Verdict:
    """The error that a coordinator's answer carries: ours, printable, and sent on again."""
    error = from_rpc_error(cast(Any, _FailedError(data)))
    demand(str(error), "an error that says nothing")
    status, _, metadata = to_status(error)
    demand(status.name == type(error).grpc_status, "another status")
    demand(sum(len(value) for _, value in metadata) <= 2**13, "metadata beyond gRPC's limit")
    return Verdict.REFUSED if error.code == "wire.failed" else Verdict.ACCEPTED


def renewal(data: bytes) -> Verdict:
    """A `RenewRequest`: its time and its certificate request."""
    try:
        request = enrolment_pb2.RenewRequest.FromString(data)
        read_csr(request.csr_der)
        at = instant(request.at)
    except (DecodeError, ManifestError, ValueError, OverflowError):
        return Verdict.REFUSED
    demand(datetime(1, 1, 1, tzinfo=UTC) <= at, "a time")
    demand(request.at.ToJsonString(), "a time that cannot be written")
    return Verdict.ACCEPTED


def csr(data: bytes) -> Verdict:
    """A certificate request in DER."""
    try:
        found = read_csr(data)
    except ManifestError:
        return Verdict.REFUSED
    key = found.public_key()
    demand(isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1", "the key")
    demand(len(data) <= MAX_CSR_BYTES, "too large")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    digest = found.signature_hash_algorithm
    demand(digest is not None, "no hash")
    key.verify(found.signature, found.tbs_certrequest_bytes, ec.ECDSA(digest or hashes.SHA256()))
    return Verdict.ACCEPTED


def peer(data: bytes) -> Verdict:
    """A client certificate: DER, or PEM as it stands."""
    pem = data
    if not data.startswith(b"-----"):
        body = base64.encodebytes(data)
        pem = b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return _peer(pem)


def _peer(pem: bytes) -> Verdict:
    found = read_peer.__wrapped__(pem)
    if found is None:
        return Verdict.REFUSED
    certificate = x509.load_pem_x509_certificate(pem)
    raw = certificate.public_bytes(Encoding.DER)
    uri = f"coldmerge://{found.federation}/{found.contributor}/{found.machine}"
    demand(uri.encode() in raw, "a name that is not in the certificate")
    demand(found.serial == format(certificate.serial_number, "x"), "another serial number")
    return Verdict.ACCEPTED


def invitation(data: bytes) -> Verdict:
    """An invitation, as text that somebody pasted."""
    text = data.decode("utf-8", "surrogateescape")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        try:
            found = Invitation.parse(text)
        except ConfigError:
            return Verdict.REFUSED
    compact = "".join(text.split()).removeprefix(PREFIX)
    raw = base64.urlsafe_b64decode(compact + "=" * (-len(compact) % 4))
    body = json.loads(raw, object_pairs_hook=_no_twice)
    demand(set(body) == {"v", "federation", "address", "enrol", "token", "root"}, "other keys")
    for address in (body["address"], body["enrol"]):
        port = address.rpartition(":")[2]
        demand(re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= 65535, f"no port: {port}")
        demand(address.isascii() and "/" not in address, f"no address: {address}")
    demand(body["root"].count("BEGIN") == 1, "a second certificate, which TLS would trust too")
    demand(len(found.fingerprint) == 64, "no fingerprint")
    return Verdict.ACCEPTED
