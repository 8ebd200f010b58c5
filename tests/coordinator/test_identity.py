"""The federation's certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from coldmerge.core.errors import ConfigError
from coldmerge_coordinator import identity, setup
from coldmerge_coordinator.identity import Authority, read_peer

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority() -> Authority:
    root_key, root = identity.make_root("fed", NOW)
    key, intermediate = identity.make_intermediate(root_key, root, "fed", NOW)
    return Authority("fed", key, intermediate, root)


def _csr() -> x509.CertificateSigningRequest:
    key = ec.generate_private_key(ec.SECP256R1())
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())


def test_a_client_certificate_says_who_and_with_which_key(authority: Authority) -> None:
    issued = authority.issue_client(
        _csr(), contributor="a", machine="box", identity_public_key=b"k" * 32, now=NOW
    )
    leaf, intermediate = x509.load_pem_x509_certificates(issued.chain_pem)
    leaf.verify_directly_issued_by(intermediate)
    peer = read_peer(leaf.public_bytes(Encoding.PEM))
    assert peer is not None
    assert (peer.federation, peer.contributor, peer.machine) == ("fed", "a", "box")
    assert peer.identity == identity.identity_fingerprint(b"k" * 32)
    assert peer.serial == issued.serial
    assert peer.expires_at == issued.expires_at == NOW + timedelta(hours=24)


def test_no_client_certificate_lives_longer_than_a_day(authority: Authority) -> None:
    issued = authority.issue_client(
        _csr(),
        contributor="a",
        machine="box",
        identity_public_key=b"k" * 32,
        now=NOW,
        lifetime=timedelta(days=400),
    )
    assert issued.expires_at == NOW + timedelta(hours=24)


def test_a_server_certificate_names_its_hosts_and_loopback(authority: Authority) -> None:
    _, issued = authority.issue_server(("merge.example.org", "10.1.2.3"), NOW)
    leaf = x509.load_pem_x509_certificate(issued.chain_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "merge.example.org"}
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"10.1.2.3", "127.0.0.1", "::1"}
    assert read_peer(leaf.public_bytes(Encoding.PEM)) is None


def test_the_intermediate_may_not_make_authorities(authority: Authority) -> None:
    _, issued = authority.issue_server(("localhost",), NOW)
    leaf, intermediate = x509.load_pem_x509_certificates(issued.chain_pem)
    limits = intermediate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (limits.ca, limits.path_length) == (True, 0)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("damage", [b"", b"not a key"])
def test_damaged_files_are_said_so(tmp_path: Path, damage: bytes) -> None:
    setup.init(tmp_path / "hub", federation="fed")
    (tmp_path / "hub" / identity.INTERMEDIATE_KEY).write_bytes(damage)
    with pytest.raises(ConfigError) as caught:
        Authority.open(tmp_path / "hub", "fed")
    assert caught.value.code == "identity.unreadable"


def test_a_key_of_another_kind_is_said_so(tmp_path: Path) -> None:
    setup.init(tmp_path / "hub", federation="fed")
    signing = (tmp_path / "hub" / "keys" / "signing.key").read_bytes()
    (tmp_path / "hub" / identity.INTERMEDIATE_KEY).write_bytes(signing)
    with pytest.raises(ConfigError) as caught:
        Authority.open(tmp_path / "hub", "fed")
    assert caught.value.code == "identity.wrong_key"
