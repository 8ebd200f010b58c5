"""`coldmerge.v1.Enrolment`: invitations and identity keys become certificates."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coldmerge.core.errors import (
    ConflictError,
    ManifestError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from coldmerge.core.ids import IDENTIFIER_RULE, is_identifier
from coldmerge.wire.convert import instant, timestamp
from coldmerge.wire.invitation import token_digest
from coldmerge.wire.proofs import enrol_message, rekey_message, renew_message
from coldmerge.wire.v1 import enrolment_pb2, enrolment_pb2_grpc
from coldmerge_coordinator import audit
from coldmerge_coordinator.auth import refuse_revoked
from coldmerge_coordinator.identity import Authority, Issued, identity_fingerprint, read_csr
from coldmerge_coordinator.service.backend import Backend
from coldmerge_coordinator.store import people
from coldmerge_coordinator.store.models import Contributor, Invitation, Machine

CLOCK_TOLERANCE = timedelta(minutes=5)


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServicer):
    """The only service for callers without a certificate."""

    def __init__(self, backend: Backend, authority: Authority) -> None:
        self._store = backend.store
        self._clock = backend.clock
        self._authority = authority

    async def Enrol(
        self, request: enrolment_pb2.EnrolRequest, _context: Any
    ) -> enrolment_pb2.EnrolResponse:
        """Trade an invitation for a certificate."""
        return await asyncio.to_thread(self._enrol, request)

    def _enrol(self, request: enrolment_pb2.EnrolRequest) -> enrolment_pb2.EnrolResponse:
        message = enrol_message(request.token, request.csr_der)
        _check_proof(request.identity_public_key, request.proof, message)
        csr = read_csr(request.csr_der)
        _check_machine_name(request.machine)
        with (
            _one_machine_per_key(request.identity_public_key),
            self._store.database.write() as session,
        ):
            invitation = _find_invitation(session, request.token)
            contributor = session.get_one(Contributor, invitation.contributor)  # held
            machine = self._admit(session, invitation, contributor, request)
            issued = self._issue(csr, machine)
            role = contributor.role
        return enrolment_pb2.EnrolResponse(
            federation=self._store.federation,
            contributor=machine.contributor,
            role=role,
            certificate_chain_pem=issued.chain_pem,
            signing_public_key=self._store.signer.key.public_key().public_bytes_raw(),
            expires_at=timestamp(issued.expires_at),
        )

    def _admit(
        self,
        session: Session,
        invitation: Invitation,
        contributor: Contributor,
        request: enrolment_pb2.EnrolRequest,
    ) -> Machine:
        """The machine's row, new or that of the same call sent twice."""
        now = self._clock.now()
        if now >= invitation.expires_at:
            raise _bad_invitation("has expired")
        refuse_revoked(contributor, None)
        key = request.identity_public_key
        machine = session.get(Machine, (contributor.name, request.machine))
        if invitation.used_at is not None:
            return _asked_again(invitation, contributor, machine, key)
        _check_name(invitation, machine, request.machine)
        _refuse_known_key(session, key)
        invitation.used_at = now
        if machine is None:
            machine = Machine(contributor=contributor.name, name=request.machine)
            session.add(machine)
        machine.identity_public_key = key
        machine.enrolled_at = now
        machine.revoked_at = machine.revoked_reason = None
        _log_enrolment(session, machine, now)
        return machine

    def _issue(self, csr: x509.CertificateSigningRequest, machine: Machine) -> Issued:
        issued = self._authority.issue_client(
            csr,
            contributor=machine.contributor,
            machine=machine.name,
            identity_public_key=machine.identity_public_key,
            now=self._clock.now(),
        )
        machine.certificate_serial = issued.serial
        return issued

    async def Renew(
        self, request: enrolment_pb2.RenewRequest, _context: Any
    ) -> enrolment_pb2.RenewResponse:
        """A new certificate for an enrolled machine."""
        return await asyncio.to_thread(self._renew, request)

    def _renew(self, request: enrolment_pb2.RenewRequest) -> enrolment_pb2.RenewResponse:
        csr, key = read_csr(request.csr_der), request.new_identity_public_key
        with _one_machine_per_key(key), self._store.database.write() as session:
            # Held: an invitation may be replacing these keys this instant.
            contributor = session.get(Contributor, request.contributor, **people.SHARE)
            machine = people.hold_machine(session, request.contributor, request.machine)
            if machine is None or contributor is None:
                raise UnauthenticatedError(
                    "enrolment.unknown_machine",
                    "No machine of that name is enrolled.",
                    got=f"{request.contributor[:64]}/{request.machine[:64]}",
                    hint="Ask the admin for an invitation, then `coldmerge join`.",
                )
            self._check_time(request)
            _check_renewal(machine, request)
            refuse_revoked(contributor, machine)
            if key:
                self._rekey(session, machine, key)
            issued = self._issue(csr, machine)
        return enrolment_pb2.RenewResponse(
            certificate_chain_pem=issued.chain_pem, expires_at=timestamp(issued.expires_at)
        )

    def _rekey(self, session: Session, machine: Machine, key: bytes) -> None:
        _refuse_known_key(session, key)
        old = identity_fingerprint(machine.identity_public_key)
        machine.identity_public_key = key
        audit.append(
            session,
            "machine.rekeyed",
            f"{machine.contributor}/{machine.name}",
            self._clock.now(),
            ids={"contributor": machine.contributor, "machine": machine.name},
            detail={"identity": identity_fingerprint(key), "previous": old},
        )

    def _check_time(self, request: enrolment_pb2.RenewRequest) -> None:
        now = self._clock.now()
        try:
            at = instant(request.at)
        except (ValueError, OverflowError):
            at = datetime.max.replace(tzinfo=UTC)
        if abs(now - at) > CLOCK_TOLERANCE:
            raise PermissionDeniedError(
                "enrolment.clock_skew",
                "The renewal was signed at a time too far from the coordinator's clock.",
                expected=f"within five minutes of {now.isoformat()}",
                got=at.isoformat(),
                hint="Set this machine's clock (NTP), then try again.",
            )


def _check_renewal(machine: Machine, request: enrolment_pb2.RenewRequest) -> None:
    """Both proofs, if there is a new key: that of the old key covers the new one."""
    key = request.new_identity_public_key
    if not key:
        message = renew_message(request.at, request.csr_der)
        _check_proof(machine.identity_public_key, request.proof, message)
        return
    message = rekey_message(request.at, key, request.csr_der)
    _check_proof(machine.identity_public_key, request.proof, message)
    _check_proof(key, request.new_proof, message)


def _log_enrolment(session: Session, machine: Machine, now: datetime) -> None:
    audit.append(
        session,
        "machine.enrolled",
        f"{machine.contributor}/{machine.name}",
        now,
        ids={"contributor": machine.contributor, "machine": machine.name},
        detail={"identity": identity_fingerprint(machine.identity_public_key)},
    )


def _find_invitation(session: Session, token: str) -> Invitation:
    """The invitation, held, and with it the organization that it is for."""
    digest = token_digest(token).hex()
    known = session.get(Invitation, digest)
    if known is None:
        raise _bad_invitation("is unknown here")
    people.hold(session, known.contributor)
    return session.get_one(Invitation, digest, **people.HOLD)


def _asked_again(
    invitation: Invitation, contributor: Contributor, machine: Machine | None, key: bytes
) -> Machine:
    """The machine that used the invitation: its answer was lost on the way, so it asks again."""
    if (
        machine is None
        or machine.identity_public_key != key
        or machine.enrolled_at != invitation.used_at
    ):
        raise _bad_invitation("was used already")
    refuse_revoked(contributor, machine)
    return machine


def _check_name(invitation: Invitation, machine: Machine | None, name: str) -> None:
    """Refuse a name that is not the invitation's, or is taken and not given up by it."""
    if invitation.machine not in (None, name):
        raise ConflictError(
            "enrolment.other_machine",
            "This invitation is for another machine.",
            expected=invitation.machine,
            got=name,
            hint=f"Join with --machine {invitation.machine}, or ask for another invitation.",
        )
    if invitation.machine is None and machine is not None and machine.revoked_at is None:
        raise ConflictError(
            "enrolment.machine_exists",
            f"{machine.contributor} has a machine {name} already.",
            hint="Join with another --machine name; if this is that machine and its keys are "
            "lost, the admin invites it by its name, which replaces them.",
            contributor=machine.contributor,
            machine=name,
        )


def _bad_invitation(what: str) -> UnauthenticatedError:
    return UnauthenticatedError(
        "enrolment.bad_invitation",
        f"This invitation {what}.",
        hint="Ask the admin for a new one: `coldmerge invite`.",
    )


def _check_proof(identity_public_key: bytes, proof: bytes, message: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(identity_public_key).verify(proof, message)
    except (ValueError, InvalidSignature) as error:
        raise ManifestError(
            "enrolment.bad_proof",
            "The proof is not a signature by that identity key over this request.",
            expected="Ed25519 over the request, as protos/coldmerge/v1/enrolment.proto says",
            hint="Use `coldmerge join`; a request that was changed on the way fails like this.",
        ) from error


def _check_machine_name(name: str) -> None:
    if not is_identifier(name):
        raise ManifestError(
            "enrolment.bad_machine_name",
            "A machine cannot have that name.",
            expected=IDENTIFIER_RULE,
            got=repr(name[:80]),
            hint="Join with --machine NAME.",
        )


def _refuse_known_key(session: Session, key: bytes) -> None:
    known = session.scalars(
        select(Machine).where(Machine.identity_public_key == key).limit(1)
    ).one_or_none()
    if known is not None:
        raise _known_key(key)


@contextmanager
def _one_machine_per_key(key: bytes) -> Iterator[None]:
    """Say so when another call has enrolled the same key this instant."""
    try:
        yield
    except IntegrityError as error:
        raise _known_key(key) from error


def _known_key(key: bytes) -> ConflictError:
    return ConflictError(
        "enrolment.known_key",
        "A machine with this identity key is, or was, enrolled.",
        got=f"key {hashlib.sha256(key).hexdigest()[:16]}",
        hint="Join with a new home folder (COLDMERGE_HOME): it makes new keys.",
    )
