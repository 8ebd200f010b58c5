"""Joining a federation.

Both keys are made on this machine and never leave it. The fingerprint that a person
was told by another channel is compared before any connection is made.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ConfigError, ConflictError, IntegrityError
from coldmerge.core.ids import IDENTIFIER_RULE, is_identifier
from coldmerge.wire.calls import OnRetry, call
from coldmerge.wire.channel import secure_channel
from coldmerge.wire.invitation import Invitation
from coldmerge.wire.proofs import enrol_message
from coldmerge.wire.v1 import enrolment_pb2, enrolment_pb2_grpc
from coldmerge_client import sent_log
from coldmerge_client.files import exclusive, write_atomic
from coldmerge_client.home import Home, Membership


def join(
    invitation: str,
    fingerprint: str,
    home: Home,
    machine: str | None = None,
    *,
    clock: Clock | None = None,
    patience: float = 10.0,
    on_retry: OnRetry | None = None,
) -> Membership:
    """Trade an invitation for a certificate and remember the federation in `home`.

    Args:
        invitation: the whole line the admin handed over.
        fingerprint: of the root certificate, told by another channel.
        home: an empty home, or one where joining was interrupted.
        machine: a name for this computer; its host name by default.
        clock: where the time comes from.
        patience: seconds to keep trying; the same request twice is answered alike.
        on_retry: told when a try failed.

    Raises:
        ConfigError: the invitation or the machine's name is malformed.
        IntegrityError: the fingerprint differs (no connection was made), or the
            coordinator answered with a certificate that is not ours.
        ConflictError: this home has joined already.
        UnauthenticatedError: the invitation is unknown, used or expired.
        UnavailableError: the coordinator cannot be reached.
    """
    ticket = Invitation.parse(invitation)
    ticket.check_fingerprint(fingerprint)
    name = _machine_name(machine)
    with exclusive(home.lock("keys"), "this machine's keys", wait=True):
        return _join(ticket, home, name, clock or SystemClock(), patience, on_retry)


def _join(
    ticket: Invitation,
    home: Home,
    name: str,
    clock: Clock,
    patience: float,
    on_retry: OnRetry | None,
) -> Membership:
    _refuse_second(home)
    identity, tls = _make_keys(home)
    csr = csr_of(tls)
    raw_identity = identity.public_key().public_bytes_raw()
    sent_log.record(
        home,
        "join",
        {"federation": ticket.federation, "machine": name, "identity_key": raw_identity.hex()},
        clock.now(),
    )
    request = enrolment_pb2.EnrolRequest(
        token=ticket.token,
        machine=name,
        csr_der=csr,
        identity_public_key=raw_identity,
        proof=identity.sign(enrol_message(ticket.token, csr)),
    )
    root = ticket.root.encode()
    answer = call_enrolment(
        ticket.enrol, root, "Enrol", request, patience=patience, on_retry=on_retry
    )
    check_chain(answer.certificate_chain_pem, root, tls)
    return _remember(home, ticket, name, answer)


def _remember(home: Home, ticket: Invitation, machine: str, answer: Any) -> Membership:
    membership = Membership(
        federation=answer.federation,
        address=ticket.address,
        enrol=ticket.enrol,
        contributor=answer.contributor,
        role=answer.role,
        machine=machine,
        signing_key=answer.signing_public_key.hex(),
    )
    write_atomic(home.root_pem, ticket.root.encode(), 0o644)
    write_atomic(home.certificate, answer.certificate_chain_pem, 0o644)
    home.save_membership(membership)
    return membership


def _refuse_second(home: Home) -> None:
    if home.joined:
        member = home.membership()
        raise ConflictError(
            "enrol.already_joined",
            f"This home already belongs to {member.contributor} in {member.federation}.",
            hint="Use another COLDMERGE_HOME for a second federation or machine.",
            home=home.path,
        )


def _machine_name(given: str | None) -> str:
    name = given or re.sub(r"[^a-zA-Z0-9._-]", "-", socket.gethostname()).strip("-._") or "machine"
    name = name if given else name[:64]
    if not is_identifier(name):
        raise ConfigError(
            "enrol.bad_machine_name",
            "The machine's name cannot be used.",
            expected=IDENTIFIER_RULE,
            got=name,
            hint="Pass another one with --machine.",
        )
    return name


def _make_keys(home: Home) -> tuple[Ed25519PrivateKey, ec.EllipticCurvePrivateKey]:
    """The two keys; those of an interrupted join are used again."""
    if not home.identity_key_path.exists():
        write_atomic(home.identity_key_path, private_pem(Ed25519PrivateKey.generate()))
    if not home.tls_key.exists():
        write_atomic(home.tls_key, private_pem(ec.generate_private_key(ec.SECP256R1())))
    return home.identity_key(), home.tls_private_key()


def private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM: for a file that one user may read."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def csr_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for a certificate; the coordinator ignores its subject."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coldmerge")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def call_enrolment(
    address: str,
    root: bytes,
    method: str,
    request: object,
    *,
    patience: float,
    on_retry: OnRetry | None,
) -> Any:
    """One call of the enrolment port, which knows us by our proofs."""
    with secure_channel(address, root) as channel:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        stub_method: Callable[..., Any] = getattr(stub, method)
        return call(stub_method, request, patience=patience, on_retry=on_retry)


def check_chain(chain_pem: bytes, root_pem: bytes, key: ec.EllipticCurvePrivateKey) -> None:
    """Refuse a certificate that is for another key or not by this federation."""
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
        chain.append(x509.load_pem_x509_certificate(root_pem))
        for certificate, issuer in pairwise(chain):
            certificate.verify_directly_issued_by(issuer)
        problem = None if chain[0].public_key() == key.public_key() else "it is for another key"
    except (ValueError, TypeError, InvalidSignature) as error:
        problem = f"the chain does not lead to the federation's root ({error})"
    if problem:
        raise IntegrityError(
            "enrol.bad_certificate",
            "The coordinator answered with a certificate that cannot be used.",
            got=problem,
            hint="Ask the admin to look at the coordinator's keys; nothing was stored.",
        )
