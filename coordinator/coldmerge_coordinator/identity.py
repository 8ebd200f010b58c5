"""The federation's certificates and signing key.

An offline root (the pin that contributors are told) signs an online intermediate, which
signs everything short-lived: the server's certificate and those of contributors'
machines, at most 24 hours each. Who a machine is stands in a URI SAN,
`coldmerge://<federation>/<contributor>/<machine>`, and the identity key it enrolled with
in the subject's serial number: enrolling again with a new key ends the old certificates.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coldmerge.core.errors import ConfigError, ManifestError

ROOT_LIFETIME = timedelta(days=3653)
INTERMEDIATE_LIFETIME = timedelta(days=731)
LEAF_LIFETIME = timedelta(hours=24)
CLOCK_SKEW = timedelta(minutes=5)
MAX_CSR_BYTES = 8192
_UNREADABLE = (
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What reading a certificate or a request raises beside ValueError: none of them is one."""

ROOT_KEY = Path("offline/root.key")
ROOT = Path("ca/root.pem")
INTERMEDIATE_KEY = Path("keys/intermediate.key")
INTERMEDIATE = Path("ca/intermediate.pem")
SIGNING_KEY = Path("keys/signing.key")


@dataclass(frozen=True)
class Issued:
    """A certificate with its intermediate, in PEM."""

    chain_pem: bytes
    serial: str
    expires_at: datetime


@dataclass(frozen=True)
class Peer:
    """What a client certificate says about its bearer."""

    federation: str
    contributor: str
    machine: str
    identity: str
    serial: str
    expires_at: datetime


def _name(common: str, organization: str, serial: str | None = None) -> x509.Name:
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
        x509.NameAttribute(NameOID.COMMON_NAME, common),
    ]
    if serial is not None:
        attributes.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, serial))
    return x509.Name(attributes)


def _builder(
    subject: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_root(
    federation: str, now: datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new root key and its self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("coldmerge root", federation)
    certificate = (
        _builder(name, key.public_key(), now, ROOT_LIFETIME)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def make_intermediate(
    root_key: ec.EllipticCurvePrivateKey, root: x509.Certificate, federation: str, now: datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new intermediate key and its certificate, signed by the root."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(
            _name("coldmerge intermediate", federation),
            key.public_key(),
            now,
            INTERMEDIATE_LIFETIME,
        )
        .issuer_name(root.subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()),
            critical=False,
        )
        .sign(root_key, hashes.SHA256())
    )
    return key, certificate


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key in unencrypted PKCS #8 PEM: its file must be readable by one user only."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def identity_fingerprint(public_key: bytes) -> str:
    """The short name of an Ed25519 identity key that certificates carry: 32 hex digits."""
    return hashlib.sha256(public_key).hexdigest()[:32]


class Authority:
    """The online half of the CA: issues what lives at most a day.

    One that was opened from a folder follows a rotation of the intermediate there.
    """

    def __init__(
        self,
        federation: str,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        root: x509.Certificate,
    ) -> None:
        self.federation = federation
        self._intermediate = (key, certificate)
        self._folder: Path | None = None
        self._written = 0.0
        self.root_pem = root.public_bytes(Encoding.PEM)
        self.fingerprint = root.fingerprint(hashes.SHA256()).hex()

    @classmethod
    def open(cls, folder: Path, federation: str) -> Authority:
        """Read key and certificates from a coordinator's folder.

        Raises:
            ConfigError: a file is missing or unreadable.
        """
        try:
            written = (folder / INTERMEDIATE).stat().st_mtime
            certificate = x509.load_pem_x509_certificate((folder / INTERMEDIATE).read_bytes())
            root = x509.load_pem_x509_certificate((folder / ROOT).read_bytes())
            key = _intermediate_key(folder, certificate)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                "identity.unreadable",
                f"The certificates of {folder} cannot be read: {error}.",
                expected=f"{INTERMEDIATE_KEY}, {INTERMEDIATE} and {ROOT}",
                hint="Restore them from a backup; `coldmerge coordinator init` makes new ones.",
            ) from error
        opened = cls(federation, key, certificate, root)
        opened._folder, opened._written = folder, written
        return opened

    def refresh(self) -> bool:
        """Take over a new intermediate, if there is one; whether there was.

        Files that cannot be read change nothing: the intermediate at hand is still good.
        """
        if self._folder is None:
            return False
        try:
            if (self._folder / INTERMEDIATE).stat().st_mtime == self._written:
                return False
            found = Authority.open(self._folder, self.federation)
        except (OSError, ConfigError):
            return False
        self._intermediate = found._intermediate
        self._written = found._written
        return True

    def issue_server(self, hosts: Sequence[str], now: datetime) -> tuple[bytes, Issued]:
        """A server key in PEM and its certificate for `hosts` and loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for host in sorted({*hosts, "localhost", "127.0.0.1", "::1"}):
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        builder = _builder(
            _name("coldmerge coordinator", self.federation), key.public_key(), now, LEAF_LIFETIME
        )
        return private_pem(key), self._sign(
            builder, x509.SubjectAlternativeName(names), ExtendedKeyUsageOID.SERVER_AUTH
        )

    def issue_client(
        self,
        csr: x509.CertificateSigningRequest,
        *,
        contributor: str,
        machine: str,
        identity_public_key: bytes,
        now: datetime,
        lifetime: timedelta = LEAF_LIFETIME,
    ) -> Issued:
        """A certificate for a machine. Only the public key is taken from the request."""
        self.refresh()
        public_key = csr.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            raise _bad_csr("its key is not an elliptic curve key")
        identity = identity_fingerprint(identity_public_key)
        builder = _builder(
            _name(machine, contributor, identity), public_key, now, min(lifetime, LEAF_LIFETIME)
        )
        uri = f"coldmerge://{self.federation}/{contributor}/{machine}"
        return self._sign(
            builder,
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]),
            ExtendedKeyUsageOID.CLIENT_AUTH,
        )

    def _sign(
        self,
        builder: x509.CertificateBuilder,
        names: x509.SubjectAlternativeName,
        usage: x509.ObjectIdentifier,
    ) -> Issued:
        key, intermediate = self._intermediate  # once: another thread may take over a new one
        certificate = (
            builder.issuer_name(intermediate.subject)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        chain = certificate.public_bytes(Encoding.PEM) + intermediate.public_bytes(Encoding.PEM)
        return Issued(
            chain, format(certificate.serial_number, "x"), certificate.not_valid_after_utc
        )


def _intermediate_key(folder: Path, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    """The key of the intermediate: after a rotation that was cut short it has not moved yet.

    Raises:
        OSError, ValueError, TypeError: there is none, or of another certificate.
        ConfigError: it is of another kind.
    """
    for path in (folder / INTERMEDIATE_KEY, next_path(folder / INTERMEDIATE_KEY)):
        key = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(
                "identity.wrong_key",
                f"{path} is not an elliptic curve key.",
                hint="Restore it from a backup.",
            )
        if key.public_key() == certificate.public_key():
            return key
    raise ValueError(f"no key fits {INTERMEDIATE}")


def next_path(path: Path) -> Path:
    """Where a new key waits until what speaks for it is durable."""
    return path.with_name(f"{path.name}.next")


def read_csr(der: bytes) -> x509.CertificateSigningRequest:
    """Read a certificate request: ECDSA on P-256, signed by its own key.

    Raises:
        ManifestError: anything else.
    """
    if len(der) > MAX_CSR_BYTES:
        raise _bad_csr(f"it has more than {MAX_CSR_BYTES} bytes")
    try:
        csr = x509.load_der_x509_csr(der)
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, TypeError, *_UNREADABLE, InvalidSignature) as error:
        raise _bad_csr("it cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _bad_csr("its key is not on P-256")
    if not valid:
        raise _bad_csr("it is not signed by its own key")
    return csr


def _bad_csr(why: str) -> ManifestError:
    return ManifestError(
        "enrolment.bad_csr",
        f"The certificate request is refused: {why}.",
        expected="a PKCS #10 request in DER with an ECDSA P-256 key",
        hint="Enrol with `coldmerge join`, which makes such a request.",
    )


@lru_cache(maxsize=4096)
def read_peer(certificate_pem: bytes) -> Peer | None:
    """Who a verified client certificate names; None when it is not one of ours."""
    try:
        return _read_peer(certificate_pem)
    except (ValueError, TypeError, x509.ExtensionNotFound, *_UNREADABLE):
        return None


def _read_peer(certificate_pem: bytes) -> Peer | None:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    identity = certificate.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    if len(uris) != 1 or len(identity) != 1 or not uris[0].startswith("coldmerge://"):
        return None
    parts = uris[0].removeprefix("coldmerge://").split("/")
    if len(parts) != 3:
        return None
    return Peer(
        federation=parts[0],
        contributor=parts[1],
        machine=parts[2],
        identity=str(identity[0].value),
        serial=format(certificate.serial_number, "x"),
        expires_at=certificate.not_valid_after_utc,
    )
