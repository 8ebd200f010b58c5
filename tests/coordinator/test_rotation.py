"""Keys that change under a running coordinator: nothing is dropped, nothing stops verifying."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from coldmerge.core.documents import Receipt, ReleaseRecord
from coldmerge.core.errors import ConfigError, IntegrityError, ManifestError
from coldmerge.core.evidence import AuditCheckpoint
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.convert import signed_from_proto
from coldmerge.wire.invitation import Invitation
from coldmerge.wire.v1 import models_pb2, rounds_pb2
from coldmerge_client.enrol import join
from coldmerge_client.home import Home
from coldmerge_client.session import Session
from coldmerge_coordinator import identity, rotation
from coldmerge_coordinator.audit.checkpoints import checkpoint
from coldmerge_coordinator.identity import INTERMEDIATE, INTERMEDIATE_KEY, SIGNING_KEY, Authority
from coldmerge_coordinator.rotation import rotate_intermediate, rotate_signing
from coldmerge_coordinator.store import Store, keys
from coldmerge_coordinator.store.models import SigningKey
from tests.harness import MODEL, Keys, Live, coordinator, deltas

LIST = models_pb2.ListModelsRequest()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with coordinator(tmp_path / "hub") as running:
        shutil.move(running.folder / "offline", tmp_path / "disk-in-a-safe")
        yield running


def _root_key(live: Live) -> Path:
    return live.folder.parent / "disk-in-a-safe" / "root.key"


def _intermediate(live: Live) -> x509.Certificate:
    return x509.load_pem_x509_certificate((live.folder / INTERMEDIATE).read_bytes())


def _server_leaf(address: str) -> x509.Certificate:
    """What a new handshake is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
    ):
        found = tls.getpeercert(binary_form=True)
    assert found is not None
    return x509.load_der_x509_certificate(found)


def test_everything_works_while_the_root_key_is_away(live: Live) -> None:
    org = live.machine("a")
    org.contribute(live.open_round(), deltas())
    live.stop()
    live.start()
    call(live.machine("b").models.ListModels, LIST)


def test_a_new_intermediate_drops_no_stream_and_shows_in_new_handshakes(live: Live) -> None:
    org, addresses = live.machine("a"), live.servers.addresses
    round_ = live.open_round()
    watch = server_stream(org.rounds.Watch, rounds_pb2.WatchRoundsRequest(model=MODEL))
    with closing(watch):
        assert next(watch).contributions == 0
        old = _intermediate(live)
        _server_leaf(addresses.enrol).verify_directly_issued_by(old)
        rotate_intermediate(live.folder, _root_key(live))
        new = _intermediate(live)
        assert new.serial_number != old.serial_number
        assert not (live.folder / "keys" / "intermediate.key.next").exists()
        _server_leaf(addresses.enrol).verify_directly_issued_by(new)
        org.contribute(round_, deltas())
        assert next(watch).contributions == 1
    late = live.machine("b")
    chain = x509.load_pem_x509_certificates(late.chain_pem)
    assert chain[1] == new
    call(late.models.ListModels, LIST)
    org.connect()  # a certificate by the old intermediate, in a new handshake
    call(org.models.ListModels, LIST)


def test_a_wrong_or_missing_root_key_changes_nothing(live: Live, tmp_path: Path) -> None:
    before = (live.folder / INTERMEDIATE).read_bytes()
    with pytest.raises(ConfigError) as caught:
        rotate_intermediate(live.folder, tmp_path / "nowhere")
    assert caught.value.code == "rotate.no_root_key"
    with pytest.raises(ConfigError) as caught:
        rotate_intermediate(live.folder, live.folder / INTERMEDIATE_KEY)
    assert caught.value.code == "rotate.wrong_root_key"
    assert (live.folder / INTERMEDIATE).read_bytes() == before


def test_an_intermediate_whose_rotation_was_cut_short_serves(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = rotation.settle

    def dies(path: Path, good: bool) -> None:
        if good:
            raise KeyboardInterrupt
        settled(path, good)

    monkeypatch.setattr(rotation, "settle", dies)
    with pytest.raises(KeyboardInterrupt):
        rotate_intermediate(live.folder, _root_key(live))
    monkeypatch.undo()
    Authority.open(live.folder, "test")
    assert x509.load_pem_x509_certificates(live.machine("a").chain_pem)[1] == _intermediate(live)
    rotate_intermediate(live.folder, _root_key(live))
    Authority.open(live.folder, "test")


def _joined(live: Live, name: str) -> Home:
    home = Home(live.folder.parent / name)
    invitation = Invitation(
        federation="test",
        address=live.servers.addresses.api,
        enrol=live.servers.addresses.enrol,
        token=live.token(name),
        root=live.authority.root_pem.decode(),
    )
    join(invitation.render(), live.authority.fingerprint, home, "box")
    return home


def test_old_and_new_signatures_verify_for_old_and_new_members(live: Live) -> None:
    early = _joined(live, "early")
    org, round_ = live.machine("a"), live.open_round(min_contributions=9)
    before = signed_from_proto(org.contribute(round_, deltas(1)))
    old_key = early.membership().signing_key
    statements = [rotate_signing(live.folder), rotate_signing(live.folder)]
    assert [said.number for said in statements] == [1, 2]
    assert statements[0].previous == old_key
    after = signed_from_proto(org.contribute(round_, deltas(2)))
    late = _joined(live, "late")
    assert late.membership().signing_key == statements[1].public_key
    for home in (early, late):
        with Session.open(home) as session:
            for signed in (before, after):
                assert session.verify(signed, Receipt).contributor == "a"
            release = session.release(MODEL)
            session.verify(signed_from_proto(release.record), ReleaseRecord)
        assert home.keyring().signer_of(after) == statements[1].public_key
        assert home.keyring().signer_of(before) == old_key


def test_a_key_that_nobody_announced_is_refused(live: Live) -> None:
    home = _joined(live, "early")
    thief = Ed25519PrivateKey.generate()
    rotation.write_private(live.folder / SIGNING_KEY, identity.private_pem(thief))
    org = live.machine("a")
    receipt = signed_from_proto(org.contribute(live.open_round(min_contributions=9), deltas()))
    with Session.open(home) as session, pytest.raises(ManifestError) as caught:
        session.verify(receipt, Receipt)
    assert caught.value.code == "document.bad_signature"


def test_a_history_of_keys_that_was_rewritten_is_an_alarm(live: Live) -> None:
    home = _joined(live, "early")
    original = (live.folder / SIGNING_KEY).read_bytes()
    rotate_signing(live.folder)
    org, round_ = live.machine("a"), live.open_round(min_contributions=9)
    with Session.open(home) as session:
        session.verify(signed_from_proto(org.contribute(round_, deltas(1))), Receipt)
    with live.store.database.write() as rows:
        rows.query(SigningKey).delete()
    rotation.write_private(live.folder / SIGNING_KEY, original)
    rotate_signing(live.folder)
    forged = signed_from_proto(org.contribute(round_, deltas(2)))
    with Session.open(home) as session, pytest.raises(IntegrityError) as caught:
        session.verify(forged, Receipt)
    assert caught.value.code == "keys.forked"


@pytest.mark.parametrize("announced", [True, False])
def test_a_signing_rotation_that_was_cut_short_is_finished_or_forgotten(
    live: Live, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if announced:
            patch.setattr(rotation, "settle", dies)
        else:
            patch.setattr(keys, "announce", dies)
        with pytest.raises(KeyboardInterrupt):
            rotate_signing(live.folder)
    waiting = live.folder / "keys" / "signing.key.next"
    new = load_pem_private_key(waiting.read_bytes(), None)
    assert isinstance(new, Ed25519PrivateKey)
    statement = rotate_signing(live.folder)
    assert statement.number == (2 if announced else 1)
    assert (statement.previous == new.public_key().public_bytes_raw().hex()) == announced
    assert not waiting.exists()


def test_a_replica_with_an_old_key_does_not_rotate(live: Live) -> None:
    old = (live.folder / SIGNING_KEY).read_bytes()
    rotate_signing(live.folder)
    rotation.write_private(live.folder / SIGNING_KEY, old)
    with pytest.raises(ConfigError) as caught:
        rotate_signing(live.folder)
    assert caught.value.code == "rotate.stale_key"
    with live.store.database.write() as session:
        now = live.clock.now()
        signed = checkpoint(session, live.store.signer, now, timedelta(hours=1))
    assert AuditCheckpoint.parse(signed.document).key == 0, "the key that signed it, not the newest"


def test_a_running_store_signs_with_the_new_key(live: Live) -> None:
    before = live.store.signer.public_key
    statement = rotate_signing(live.folder)
    assert live.store.signer.public_key == statement.public_key != before
    with Store.open(live.folder) as other:
        assert other.signer.public_key == statement.public_key


def test_certificates_that_are_issued_during_rotations_fit_their_chain(live: Live) -> None:
    authority = Authority.open(live.folder, live.store.federation)
    csr, done = Keys.make().csr(), threading.Event()

    def issue() -> list[bytes]:
        chains = []
        while not done.is_set():
            issued = authority.issue_client(
                csr,
                contributor="a",
                machine="box",
                identity_public_key=b"k" * 32,
                now=live.clock.now(),
            )
            chains.append(issued.chain_pem)
        return chains

    with ThreadPoolExecutor(4) as pool:
        try:
            issuing = [pool.submit(issue) for _ in range(4)]
            for _ in range(40):
                rotate_intermediate(live.folder, _root_key(live))
        finally:
            done.set()
    for chain in {chain for issued in issuing for chain in issued.result()}:
        leaf, intermediate = x509.load_pem_x509_certificates(chain)
        leaf.verify_directly_issued_by(intermediate)
