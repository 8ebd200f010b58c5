"""Callers that are not who they should be: refused, and the coordinator stays up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import grpc
import pytest
from cryptography import x509

from coldmerge.core.errors import (
    ConflictError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from coldmerge.wire.calls import call, server_stream
from coldmerge.wire.channel import secure_channel
from coldmerge.wire.errors import from_rpc_error
from coldmerge.wire.v1 import contributions_pb2, models_pb2, models_pb2_grpc, rounds_pb2
from coldmerge.wire.version import PROTOCOL_KEY
from coldmerge_coordinator import identity
from coldmerge_coordinator.identity import Authority
from coldmerge_coordinator.service import admin
from coldmerge_coordinator.store import contributions, rounds
from coldmerge_coordinator.store.models import Contribution, Machine, Upload
from tests.harness import MODEL, Keys, Live, MachineClient, chunk, deltas
from tests.support import until

LIST = models_pb2.ListModelsRequest()


def _revoke(live: Live, contributor: str, machine: str = "") -> None:
    admin.revoke(live.store, contributor, machine, "test", live.clock.now())


def _still_up(live: Live) -> None:
    assert call(live.machine("bystander").models.ListModels, LIST).models[0].name == MODEL


def test_without_a_certificate_nobody_gets_in(live: Live) -> None:
    channel = live.keep(secure_channel(live.servers.addresses.api, live.authority.root_pem))
    stub = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
    with pytest.raises(UnavailableError) as caught:
        call(stub.ListModels, LIST, patience=0)
    assert "certificate" in caught.value.hint
    _still_up(live)


def test_a_certificate_of_another_authority_is_refused(live: Live) -> None:
    now = live.clock.now()
    root_key, root = identity.make_root("test", now)
    key, intermediate = identity.make_intermediate(root_key, root, "test", now)
    keys = Keys.make()
    live.machine("a")
    forged = Authority("test", key, intermediate, root).issue_client(
        keys.csr(), contributor="a", machine="box", identity_public_key=keys.public, now=now
    )
    impostor = MachineClient(live, "a", "box", keys, forged.chain_pem)
    with pytest.raises(UnavailableError):
        call(impostor.models.ListModels, LIST, patience=0)
    _still_up(live)


def test_a_client_certificate_cannot_issue_certificates(live: Live) -> None:
    org = live.machine("a")
    keys = Keys.make()
    leaf = x509.load_pem_x509_certificate(org.chain_pem)
    rogue = Authority("test", org.keys.tls, leaf, leaf).issue_client(
        keys.csr(),
        contributor="a",
        machine="box",
        identity_public_key=org.keys.public,
        now=live.clock.now(),
    )
    impostor = MachineClient(live, "a", "box", keys, rogue.chain_pem + org.chain_pem)
    with pytest.raises(UnavailableError):
        call(impostor.models.ListModels, LIST, patience=0)


def test_an_expired_certificate_is_refused_at_the_handshake(live: Live) -> None:
    org = live.machine("a")
    stale = live.authority.issue_client(
        org.keys.csr(),
        contributor="a",
        machine="box",
        identity_public_key=org.keys.public,
        now=live.clock.now() - timedelta(days=2),
    )
    late = MachineClient(live, "a", "box", org.keys, stale.chain_pem)
    with pytest.raises(UnavailableError):
        call(late.models.ListModels, LIST, patience=0)
    call(org.models.ListModels, LIST)


def test_a_certificate_that_expires_on_an_open_connection_is_refused(live: Live) -> None:
    org = live.machine("a")
    call(org.models.ListModels, LIST)
    live.clock.offset = timedelta(hours=25)
    with pytest.raises(UnauthenticatedError) as caught:
        call(org.models.ListModels, LIST)
    assert caught.value.code == "auth.expired"


def test_a_certificate_for_another_federation_is_refused(live: Live) -> None:
    org = live.machine("a")
    live.authority.federation = "elsewhere"
    other = live.authority.issue_client(
        org.keys.csr(),
        contributor="a",
        machine="box",
        identity_public_key=org.keys.public,
        now=live.clock.now(),
    )
    impostor = MachineClient(live, "a", "box", org.keys, other.chain_pem)
    with pytest.raises(UnauthenticatedError) as caught:
        call(impostor.models.ListModels, LIST)
    assert caught.value.code == "auth.other_federation"


def test_a_machine_the_database_does_not_know_is_refused(live: Live) -> None:
    keys = Keys.make()
    issued = live.authority.issue_client(
        keys.csr(),
        contributor="ghost",
        machine="box",
        identity_public_key=keys.public,
        now=live.clock.now(),
    )
    with pytest.raises(UnauthenticatedError) as caught:
        call(MachineClient(live, "ghost", "box", keys, issued.chain_pem).models.ListModels, LIST)
    assert caught.value.code == "auth.unknown_machine"


def test_revocation_holds_from_the_next_call_on(live: Live) -> None:
    org, other = live.machine("a"), live.machine("b")
    call(org.models.ListModels, LIST)
    _revoke(live, "a")
    with pytest.raises(PermissionDeniedError) as caught:
        call(org.models.ListModels, LIST)
    assert caught.value.code == "auth.revoked"
    call(other.models.ListModels, LIST)


def test_a_revoked_contribution_is_not_merged(live: Live) -> None:
    round_ = live.open_round()
    live.machine("a").contribute(round_, deltas(1))
    _revoke(live, "a")
    assert list(live.store.payloads.listed()) == []
    for index, name in enumerate("bc"):
        live.machine(name).contribute(round_, deltas(index))
    with live.store.database.read() as session:
        sealed = rounds.get(session, round_.id)
        assert sealed.state == "SEALED"
        merged = {row.contributor for row in contributions.sealed(session, sealed)}
    assert merged == {"b", "c"}


def test_one_machine_can_be_revoked_alone(live: Live) -> None:
    lost, kept = live.machine("a", name="laptop"), live.machine("a", name="server")
    _revoke(live, "a", "laptop")
    with pytest.raises(PermissionDeniedError):
        call(lost.models.ListModels, LIST)
    call(kept.models.ListModels, LIST)


def test_a_machine_enrolled_again_with_a_new_key_ends_the_old_certificate(live: Live) -> None:
    old = live.machine("a")
    _revoke(live, "a", "box")
    new = live.machine("a")
    call(new.models.ListModels, LIST)
    with pytest.raises(UnauthenticatedError) as caught:
        call(old.models.ListModels, LIST)
    assert caught.value.code == "auth.unknown_machine"


def test_revocation_ends_an_upload_in_mid_stream(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(min_contributions=1), deltas())
    begun = org.begin(manifest)
    ended = threading.Event()

    def requests() -> Iterator[contributions_pb2.WriteRequest]:
        for offset in range(0, len(payload), 4):
            if offset == 40:
                _revoke(live, "a")
            if offset + 4 >= len(payload):
                ended.wait(30)  # whoever is shut out is hung up on before
            yield chunk(begun.upload_id, offset, payload[offset : offset + 4])

    try:
        with pytest.raises(PermissionDeniedError) as caught:
            org.stream(requests())
    finally:
        ended.set()
    assert caught.value.code == "auth.revoked"
    with live.store.database.read() as session:
        assert session.get_one(Upload, begun.upload_id).committed_size < len(payload)
        assert session.query(Contribution).count() == 0


def test_an_upload_finished_before_the_revocation_is_not_counted_after_it(live: Live) -> None:
    org = live.machine("a")
    manifest, payload = org.manifest(live.open_round(min_contributions=1), deltas())
    begun = org.begin(manifest)
    org.write(begun.upload_id, payload)
    _revoke(live, "a")
    with pytest.raises(PermissionDeniedError):
        org.commit(begun.upload_id)


@pytest.mark.parametrize("watch", ["releases", "rounds"])
def test_revocation_ends_an_open_watch(live: Live, watch: str) -> None:
    org = live.machine("a")
    live.open_round()
    if watch == "rounds":
        stream = server_stream(org.rounds.Watch, rounds_pb2.WatchRoundsRequest(model=MODEL))
    else:
        request = models_pb2.WatchReleasesRequest(model=MODEL, after_number=-1)
        stream = server_stream(org.models.WatchReleases, request)
    next(stream)
    _revoke(live, "a")
    with pytest.raises(PermissionDeniedError):
        for _ in stream:
            pass


def test_revocation_ends_a_download(live: Live) -> None:
    org = live.machine("a")
    release = call(org.models.GetRelease, models_pb2.GetReleaseRequest(model=MODEL))
    _revoke(live, "a")
    with pytest.raises(PermissionDeniedError):
        org.collect(
            org.models.ReadBlob, models_pb2.ReadBlobRequest(sha256=release.tensors[0].sha256)
        )


@pytest.mark.parametrize("sent", ["0", "", "-1", "one", "9" * 30])
def test_an_older_or_absurd_protocol_is_refused(live: Live, sent: str) -> None:
    org = live.machine("a")
    metadata = ((PROTOCOL_KEY, sent),) if sent else ()
    with pytest.raises(grpc.RpcError) as caught:
        org.models.ListModels(LIST, timeout=10, metadata=metadata)
    error = from_rpc_error(caught.value)
    assert isinstance(error, ConflictError)
    assert error.code == "protocol.too_old"


def test_the_socket_is_for_this_user_alone(live: Live) -> None:
    assert live.servers.socket.stat().st_mode & 0o777 == 0o600
    assert live.folder.stat().st_mode & 0o777 == 0o700


def test_last_seen_is_written_down(live: Live) -> None:
    org = live.machine("a")
    call(org.models.ListModels, LIST)

    def seen() -> bool:
        with live.store.database.read() as session:
            machine = session.get_one(Machine, ("a", "box"))
            return machine.last_seen_at is not None and bool(machine.client_version)

    until("the call to be seen", seen)
