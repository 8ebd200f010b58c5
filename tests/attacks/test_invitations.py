"""Invitations and enrolment requests that must not give a certificate."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from coldmerge.core.errors import (
    ColdmergeError,
    ConflictError,
    ManifestError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from coldmerge.wire.calls import call
from coldmerge.wire.convert import timestamp
from coldmerge.wire.proofs import enrol_message, rekey_message, renew_message
from coldmerge.wire.v1 import enrolment_pb2, models_pb2
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store.models import Invitation, Machine
from tests.harness import Keys, Live, MachineClient


def _enrol(live: Live, request: enrolment_pb2.EnrolRequest) -> enrolment_pb2.EnrolResponse:
    answer: enrolment_pb2.EnrolResponse = call(live.enrolment.Enrol, request, patience=0)
    return answer


def _refused(live: Live, request: enrolment_pb2.EnrolRequest, kind: type[ColdmergeError]) -> str:
    with pytest.raises(kind) as caught:
        _enrol(live, request)
    return caught.value.code


def _machines(live: Live) -> int:
    with live.store.database.read() as session:
        return session.query(Machine).count()


def test_an_unknown_token(live: Live) -> None:
    code = _refused(live, Keys.make().enrol_request("A" * 43), UnauthenticatedError)
    assert code == "enrolment.bad_invitation"
    assert _machines(live) == 0


def test_a_used_invitation(live: Live) -> None:
    token = live.token("a")
    _enrol(live, Keys.make().enrol_request(token))
    for name in ("box", "other"):
        code = _refused(live, Keys.make().enrol_request(token, name), UnauthenticatedError)
        assert code == "enrolment.bad_invitation"
    assert _machines(live) == 1


def test_an_answer_lost_on_the_way_can_be_asked_for_again(live: Live) -> None:
    keys, token = Keys.make(), live.token("a")
    request = keys.enrol_request(token)
    _enrol(live, request)
    again = _enrol(live, request)
    client = MachineClient(live, "a", "box", keys, again.certificate_chain_pem)
    call(client.models.ListModels, models_pb2.ListModelsRequest())
    _refused(live, keys.enrol_request(token, "second"), UnauthenticatedError)


def test_an_expired_invitation(live: Live) -> None:
    token = live.token("a", ttl=timedelta(seconds=60))
    live.clock.offset = timedelta(seconds=61)
    assert "bad_invitation" in _refused(
        live, Keys.make().enrol_request(token), UnauthenticatedError
    )


def test_the_token_is_kept_nowhere(live: Live) -> None:
    token = live.token("a")
    _enrol(live, Keys.make().enrol_request(token))
    live.stop()
    for path in live.folder.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path
    live.start()


def test_an_invitation_of_a_revoked_contributor(live: Live) -> None:
    token = live.token("a")
    admin.revoke(live.store, "a", "", "test", live.clock.now())
    assert _refused(live, Keys.make().enrol_request(token), UnauthenticatedError)


def test_inviting_a_revoked_contributor_lets_only_new_machines_in(live: Live) -> None:
    old = live.machine("a")
    admin.revoke(live.store, "a", "", "test", live.clock.now())
    new = live.machine("a", name="new")
    call(new.models.ListModels, models_pb2.ListModelsRequest())
    with pytest.raises(PermissionDeniedError):
        call(old.models.ListModels, models_pb2.ListModelsRequest())


def test_a_machine_name_that_is_taken(live: Live) -> None:
    live.machine("a")
    request = Keys.make().enrol_request(live.token("a"))
    assert _refused(live, request, ConflictError) == "enrolment.machine_exists"
    with live.store.database.read() as session:
        assert session.query(Invitation).filter(Invitation.used_at.is_(None)).count() == 1


def test_an_identity_key_that_is_known(live: Live) -> None:
    org = live.machine("a")
    request = org.keys.enrol_request(live.token("b"))
    assert _refused(live, request, ConflictError) == "enrolment.known_key"


@pytest.mark.parametrize("name", ["", "../box", "a/b", "x" * 65, "ü", "a b", "coldmerge://x"])
def test_a_machine_name_that_could_lie(live: Live, name: str) -> None:
    request = Keys.make().enrol_request(live.token("a"), name)
    assert _refused(live, request, ManifestError) == "enrolment.bad_machine_name"


def _other_token(live: Live, keys: Keys, token: str) -> enrolment_pb2.EnrolRequest:
    request = keys.enrol_request(token)
    request.token = live.token("b")
    return request


def _other_csr(live: Live, keys: Keys, token: str) -> enrolment_pb2.EnrolRequest:
    request = keys.enrol_request(token)
    request.csr_der = Keys.make().csr().public_bytes(Encoding.DER)
    return request


def _other_identity(live: Live, keys: Keys, token: str) -> enrolment_pb2.EnrolRequest:
    request = keys.enrol_request(token)
    request.identity_public_key = Keys.make().public
    return request


def _flipped(live: Live, keys: Keys, token: str) -> enrolment_pb2.EnrolRequest:
    request = keys.enrol_request(token)
    request.proof = bytes([request.proof[0] ^ 1]) + request.proof[1:]
    return request


def _no_proof(live: Live, keys: Keys, token: str) -> enrolment_pb2.EnrolRequest:
    request = keys.enrol_request(token)
    request.proof = b""
    return request


def _short_key(live: Live, keys: Keys, token: str) -> enrolment_pb2.EnrolRequest:
    request = keys.enrol_request(token)
    request.identity_public_key = b"short"
    return request


@pytest.mark.parametrize(
    "forge", [_other_token, _other_csr, _other_identity, _flipped, _no_proof, _short_key]
)
def test_a_forged_proof(
    live: Live, forge: Callable[[Live, Keys, str], enrolment_pb2.EnrolRequest]
) -> None:
    request = forge(live, Keys.make(), live.token("a"))
    assert _refused(live, request, ManifestError) == "enrolment.bad_proof"
    assert _machines(live) == 0


def _der(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _rsa() -> bytes:
    return _der(rsa.generate_private_key(65537, 2048))


def _p384() -> bytes:
    return _der(ec.generate_private_key(ec.SECP384R1()))


def _unsigned() -> bytes:
    raw = bytearray(Keys.make().csr().public_bytes(Encoding.DER))
    raw[-1] ^= 1
    return bytes(raw)


@pytest.mark.parametrize("make", [_rsa, _p384, _unsigned, bytes, lambda: b"\x30" * 9000])
def test_a_bad_certificate_request(live: Live, make: Callable[[], bytes]) -> None:
    keys, token, csr = Keys.make(), live.token("a"), make()
    request = keys.enrol_request(token)
    request.csr_der = csr
    request.proof = keys.identity.sign(enrol_message(token, csr))
    assert _refused(live, request, ManifestError) == "enrolment.bad_csr"


def test_a_request_cannot_choose_its_names(live: Live) -> None:
    keys, token = Keys.make(), live.token("a")
    uri = x509.UniformResourceIdentifier("coldmerge://test/admin/root")
    builder = x509.CertificateSigningRequestBuilder(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin")])
    ).add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    csr = builder.sign(keys.tls, hashes.SHA256()).public_bytes(Encoding.DER)
    request = keys.enrol_request(token)
    request.csr_der = csr
    request.proof = keys.identity.sign(enrol_message(token, csr))
    chain = _enrol(live, request).certificate_chain_pem
    leaf = x509.load_pem_x509_certificate(chain)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert found == ["coldmerge://test/a/box"]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < timedelta(hours=24, minutes=6)


def _renewal(org: MachineClient, keys: Keys, at: object = None) -> enrolment_pb2.RenewRequest:
    when = timestamp(org.live.clock.now()) if at is None else at
    csr = keys.csr().public_bytes(Encoding.DER)
    return enrolment_pb2.RenewRequest(
        contributor=org.contributor,
        machine=org.name,
        csr_der=csr,
        at=when,  # type: ignore[arg-type]
        proof=keys.identity.sign(renew_message(when, csr)),  # type: ignore[arg-type]
    )


def test_renewal_works_long_after_the_certificate_expired(live: Live) -> None:
    org = live.machine("a")
    live.clock.offset = timedelta(days=90)
    answer = call(live.enrolment.Renew, _renewal(org, org.keys))
    leaf = x509.load_pem_x509_certificate(answer.certificate_chain_pem)
    assert leaf.not_valid_after_utc > live.clock.now()


def test_renewal_keeps_the_older_certificate_until_it_expires(live: Live) -> None:
    org = live.machine("a")
    call(live.enrolment.Renew, _renewal(org, org.keys))
    call(org.models.ListModels, models_pb2.ListModelsRequest())


def test_renewal_with_another_key(live: Live) -> None:
    org = live.machine("a")
    with pytest.raises(ManifestError) as caught:
        call(live.enrolment.Renew, _renewal(org, Keys.make()))
    assert caught.value.code == "enrolment.bad_proof"


def test_renewal_replayed_at_another_time(live: Live) -> None:
    org = live.machine("a")
    request = _renewal(org, org.keys)
    for offset in (timedelta(minutes=6), timedelta(minutes=-6)):
        live.clock.offset = offset
        with pytest.raises(PermissionDeniedError) as caught:
            call(live.enrolment.Renew, request)
        assert caught.value.code == "enrolment.clock_skew"
    live.clock.offset = timedelta(0)
    request.at.FromDatetime(live.clock.now() + timedelta(seconds=1))
    with pytest.raises(ManifestError):
        call(live.enrolment.Renew, request)
    request.at.seconds = 2**62
    with pytest.raises(PermissionDeniedError):
        call(live.enrolment.Renew, request)


def test_renewal_when_revoked_or_unknown(live: Live) -> None:
    org = live.machine("a")
    org.name = "ghost"
    with pytest.raises(UnauthenticatedError):
        call(live.enrolment.Renew, _renewal(org, org.keys))
    org.name = "box"
    admin.revoke(live.store, "a", "box", "test", live.clock.now())
    with pytest.raises(PermissionDeniedError) as caught:
        call(live.enrolment.Renew, _renewal(org, org.keys))
    assert caught.value.code == "auth.revoked"


def _rekey(org: MachineClient, old: Keys, new: Keys, proved_by: Keys) -> enrolment_pb2.RenewRequest:
    at = timestamp(org.live.clock.now())
    csr = new.csr().public_bytes(Encoding.DER)
    message = rekey_message(at, new.public, csr)
    return enrolment_pb2.RenewRequest(
        contributor=org.contributor,
        machine=org.name,
        csr_der=csr,
        at=at,
        proof=old.identity.sign(message),
        new_identity_public_key=new.public,
        new_proof=proved_by.identity.sign(message),
    )


def test_a_new_identity_key_needs_the_word_of_both_keys(live: Live) -> None:
    org, new, thief = live.machine("a"), Keys.make(), Keys.make()
    for request in (
        _rekey(org, thief, thief, thief),
        _rekey(org, org.keys, new, thief),
        _rekey(org, thief, new, new),
    ):
        with pytest.raises(ManifestError) as caught:
            call(live.enrolment.Renew, request)
        assert caught.value.code == "enrolment.bad_proof"
    plain = _renewal(org, org.keys)
    plain.new_identity_public_key = thief.public
    with pytest.raises(ManifestError):
        call(live.enrolment.Renew, plain)
    call(live.enrolment.Renew, _rekey(org, org.keys, new, new))
    with pytest.raises(UnauthenticatedError):
        call(org.models.ListModels, models_pb2.ListModelsRequest())
    with pytest.raises(ManifestError):
        call(live.enrolment.Renew, _renewal(org, org.keys))
    with pytest.raises(ManifestError):
        call(live.enrolment.Renew, _rekey(org, org.keys, thief, thief))


def test_the_key_of_another_machine_is_no_new_key(live: Live) -> None:
    org, other = live.machine("a"), live.machine("b")
    with pytest.raises(ConflictError) as caught:
        call(live.enrolment.Renew, _rekey(org, org.keys, other.keys, other.keys))
    assert caught.value.code == "enrolment.known_key"


def test_a_revoked_machine_does_not_come_back_by_an_earlier_invitation(live: Live) -> None:
    live.machine("a")
    ttl = timedelta(hours=1)
    named = admin.invite(live.store, "a", "contributor", ttl, live.clock.now(), machine="box")
    other = live.token("a")
    admin.revoke(live.store, "a", "box", "stolen", live.clock.now())
    request = Keys.make().enrol_request(named.token)
    assert _refused(live, request, UnauthenticatedError) == "enrolment.bad_invitation"
    _enrol(live, Keys.make().enrol_request(other, "laptop"))
