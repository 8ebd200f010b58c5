from __future__ import annotations

import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from coldmerge.core.clock import SystemClock
from coldmerge.core.errors import (
    ConfigError,
    ConflictError,
    IntegrityError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from coldmerge.wire.invitation import Invitation
from coldmerge.wire.v1 import admin_pb2
from coldmerge_client import enrol, sent_log
from coldmerge_client.enrol import join
from coldmerge_client.home import Home
from coldmerge_client.renewal import renew, renewal_due, validity
from coldmerge_client.session import Session
from coldmerge_coordinator import identity
from tests.client.conftest import Coordinator
from tests.support import free_ports


def invitation_to(address: str) -> Invitation:
    """An invitation by a federation whose coordinator listens (or not) at `address`."""
    root = identity.make_root("fed", SystemClock().now())[1]
    return Invitation(
        federation="fed",
        address=address,
        enrol=address,
        token="t" * 43,
        root=root.public_bytes(Encoding.PEM).decode(),
    )


def test_a_wrong_fingerprint_makes_no_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        ticket = invitation_to(f"localhost:{listener.getsockname()[1]}")
        with pytest.raises(IntegrityError, match="fingerprint") as error:
            join(ticket.render(), "0" * 64, Home(tmp_path / "home"))
        assert error.value.got == ticket.fingerprint
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not (tmp_path / "home").exists()


def test_what_is_no_invitation_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a coldmerge invitation"):
        join("hello", "0" * 64, Home(tmp_path / "home"))


def test_a_machine_name_that_cannot_be_is_refused(tmp_path: Path) -> None:
    ticket = invitation_to("localhost:1")
    with pytest.raises(ConfigError) as error:
        join(ticket.render(), ticket.fingerprint, Home(tmp_path / "home"), "a/b")
    assert error.value.code == "enrol.bad_machine_name"


def test_nobody_there_ends_soon_and_can_be_tried_again(tmp_path: Path) -> None:
    ticket = invitation_to(f"127.0.0.1:{free_ports(1)[0]}")
    home = Home(tmp_path / "home")
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        join(ticket.render(), ticket.fingerprint, home, patience=1.0)
    assert time.monotonic() - began < 10
    assert not home.joined


def test_joining_makes_keys_here_and_a_certificate_there(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    spaced = " ".join(coordinator.fingerprint.upper()[i : i + 4] for i in range(0, 64, 4))
    member = join(coordinator.invite("org-a"), spaced, home, "laptop")
    assert (member.federation, member.contributor, member.machine) == ("fed", "org-a", "laptop")
    assert member.role == "contributor"
    assert home.membership() == member
    for key in (home.tls_key, home.identity_key_path):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    start, end = validity(home)
    assert end - start <= timedelta(hours=24, minutes=10)
    assert not renewal_due(home, SystemClock().now())
    assert [line.event for line in sent_log.read(home)] == ["join"]
    with Session.open(home) as session:
        assert session.model().name == "m"


def test_an_invitation_is_good_once(coordinator: Coordinator, tmp_path: Path) -> None:
    invitation = coordinator.invite("org-a")
    join(invitation, coordinator.fingerprint, Home(tmp_path / "one"), "one")
    with pytest.raises(UnauthenticatedError, match="used"):
        join(invitation, coordinator.fingerprint, Home(tmp_path / "two"), "two")
    assert not Home(tmp_path / "two").joined


def test_a_home_joins_once(coordinator: Coordinator, tmp_path: Path) -> None:
    home = coordinator.join(tmp_path / "home")
    with pytest.raises(ConflictError) as error:
        join(coordinator.invite("org-b"), coordinator.fingerprint, home)
    assert error.value.code == "enrol.already_joined"


def test_a_join_whose_answer_was_lost_is_finished_with_the_same_keys(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    invitation = coordinator.invite("org-a")
    home = Home(tmp_path / "home")
    join(invitation, coordinator.fingerprint, home, "laptop")
    key = home.identity_key_path.read_bytes()
    (home.path / "federation.json").unlink()
    join(invitation, coordinator.fingerprint, home, "laptop")
    assert home.identity_key_path.read_bytes() == key
    with Session.open(home) as session:
        assert session.models()


def test_several_machines_of_one_contributor(coordinator: Coordinator, tmp_path: Path) -> None:
    for machine in ("laptop", "server"):
        home = coordinator.join(tmp_path / machine, "org-a", machine)
        with Session.open(home) as session:
            assert session.models()
    found = coordinator.admin("ListContributors", admin_pb2.ListContributorsRequest())
    (contributor,) = found.contributors
    assert {machine.name for machine in contributor.machines} == {"laptop", "server"}


def issue(coordinator: Coordinator, home: Home, *, age: timedelta) -> bytes:
    """A certificate for `home` that the coordinator issued `age` ago."""
    authority = identity.Authority.open(coordinator.folder, "fed")
    issued = authority.issue_client(
        x509.load_der_x509_csr(enrol.csr_of(home.tls_private_key())),
        contributor="org-a",
        machine="laptop",
        identity_public_key=home.identity_key().public_key().public_bytes_raw(),
        now=SystemClock().now() - age,
    )
    home.certificate.write_bytes(issued.chain_pem)
    return issued.chain_pem


@pytest.mark.parametrize("age", [timedelta(days=40), timedelta(hours=17)])
def test_a_certificate_is_renewed_by_the_identity_key(
    coordinator: Coordinator, tmp_path: Path, age: timedelta
) -> None:
    home = coordinator.join(tmp_path / "home")
    old = issue(coordinator, home, age=age)
    assert renewal_due(home, SystemClock().now())
    with Session.open(home) as session:
        assert session.models()
    assert home.certificate.read_bytes() != old
    assert not renewal_due(home, SystemClock().now())


def test_a_fresh_certificate_is_left_alone(coordinator: Coordinator, tmp_path: Path) -> None:
    home = coordinator.join(tmp_path / "home")
    fresh = issue(coordinator, home, age=timedelta(hours=10))
    with Session.open(home) as session:
        assert session.models()
    assert home.certificate.read_bytes() == fresh


def test_a_lost_certificate_is_renewed(coordinator: Coordinator, tmp_path: Path) -> None:
    home = coordinator.join(tmp_path / "home")
    home.certificate.unlink()
    with Session.open(home) as session:
        assert session.models()


def test_a_revoked_contributor_gets_no_certificate(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = coordinator.join(tmp_path / "home")
    before = home.certificate.read_bytes()
    coordinator.admin("Revoke", admin_pb2.RevokeRequest(contributor="org-a", reason="left"))
    with pytest.raises(PermissionDeniedError):
        renew(home)
    assert home.certificate.read_bytes() == before
    with Session.open(home) as session, pytest.raises(PermissionDeniedError, match="shut out"):
        session.models()


def test_a_certificate_for_another_key_or_by_another_root_is_not_stored(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = coordinator.join(tmp_path / "home")
    other = Home(tmp_path / "other")
    enrol._make_keys(other)
    chain, root = home.certificate.read_bytes(), home.root_pem.read_bytes()
    with pytest.raises(IntegrityError, match="cannot be used"):
        enrol.check_chain(chain, root, other.tls_private_key())
    foreign = invitation_to("localhost:1").root.encode()
    with pytest.raises(IntegrityError) as error:
        enrol.check_chain(chain, foreign, home.tls_private_key())
    assert error.value.code == "enrol.bad_certificate"
    with pytest.raises(IntegrityError):
        enrol.check_chain(b"", root, home.tls_private_key())


def test_two_that_join_at_once_make_one_machine(coordinator: Coordinator, tmp_path: Path) -> None:
    home, invitation = Home(tmp_path / "home"), coordinator.invite("org-a")

    def enter(_: int) -> str:
        try:
            return join(invitation, coordinator.fingerprint, home, "laptop").machine
        except ConflictError as error:
            return error.code

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(enter, range(4)))
    assert found == [*["enrol.already_joined"] * 3, "laptop"]
    with Session.open(home) as session:
        assert session.models()
