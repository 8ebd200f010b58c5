"""Every (role, method) pair of the wire contract: what is not allowed is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from coldmerge.wire.errors import from_rpc_error
from coldmerge.wire.v1 import (
    admin_pb2,
    contributions_pb2,
    enrolment_pb2,
    models_pb2,
    rounds_pb2,
)
from coldmerge.wire.version import call_metadata
from coldmerge_coordinator.auth import ALLOWED, ROLES
from tests.harness import Live, MachineClient, coordinator

FILES = (admin_pb2, contributions_pb2, models_pb2, rounds_pb2)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
READING = {
    "/coldmerge.v1.Models/ListModels",
    "/coldmerge.v1.Models/GetRelease",
    "/coldmerge.v1.Models/ListReleases",
    "/coldmerge.v1.Models/WatchReleases",
    "/coldmerge.v1.Models/ListKeys",
    "/coldmerge.v1.Models/ReadBlob",
    "/coldmerge.v1.Rounds/Get",
    "/coldmerge.v1.Rounds/List",
    "/coldmerge.v1.Rounds/Watch",
}
SEEN_BY_AUDITORS = {"/coldmerge.v1.Contributions/Get", "/coldmerge.v1.Contributions/List"}


def _may(role: str, path: str) -> bool:
    """The rules once more, in other words than the code's."""
    if role == "admin" or path in READING:
        return True
    if path.startswith("/coldmerge.v1.Admin/"):
        return False
    if path == "/coldmerge.v1.Rounds/ReportEvaluation":
        return role in {"contributor", "evaluator"}
    return role == "contributor" or (role == "auditor" and path in SEEN_BY_AUDITORS)


@pytest.fixture(scope="module")
def everybody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, MachineClient]]:
    folder: Path = tmp_path_factory.mktemp("roles") / "hub"
    with coordinator(folder) as live:
        yield {role: live.machine(f"org-{role}", role) for role in ROLES}


def _call(channel: Any, path: str) -> str:
    """Call with an empty message: the code of our error, or "" when it was let in."""
    method = METHODS[path]
    answer = GetMessageClass(method.output_type)
    request = GetMessageClass(method.input_type)()
    shape = ["unary", "stream"]
    kind = shape[method.client_streaming] + "_" + shape[method.server_streaming]
    multi = getattr(channel, kind)(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    sent = iter([request]) if method.client_streaming else request
    try:
        result = multi(sent, timeout=10, metadata=call_metadata())
        if method.server_streaming:
            next(iter(result), None)
            result.cancel()
    except grpc.RpcError as error:
        return from_rpc_error(error).code
    return ""


def test_the_table_names_every_method_and_no_other() -> None:
    later = ("/coldmerge.v1.Audit/", "/coldmerge.v1.Screening/")
    assert {path for path in ALLOWED if not path.startswith(later)} == set(METHODS)
    assert {s.name for s in enrolment_pb2.DESCRIPTOR.services_by_name.values()} == {"Enrolment"}


@pytest.mark.parametrize("path", sorted(METHODS))
@pytest.mark.parametrize("role", ROLES)
def test_role_and_method(everybody: dict[str, MachineClient], role: str, path: str) -> None:
    found = _call(everybody[role].channel, path)
    assert (found != "auth.wrong_role") == _may(role, path), found


def test_a_method_nobody_knows_is_unimplemented(everybody: dict[str, MachineClient]) -> None:
    unknown = everybody["admin"].channel.unary_unary("/coldmerge.v1.Admin/Everything")
    with pytest.raises(grpc.RpcError) as caught:
        unknown(b"", timeout=10, metadata=call_metadata())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_enrolment_port_serves_nothing_else(everybody: dict[str, MachineClient]) -> None:
    from coldmerge.wire.channel import secure_channel

    live: Live = everybody["admin"].live
    channel = live.keep(secure_channel(live.servers.addresses.enrol, live.authority.root_pem))
    for path in sorted(METHODS):
        assert _call(channel, path) == "wire.failed"


def test_a_role_changed_in_the_database_counts_at_once(tmp_path: Path) -> None:
    from coldmerge_coordinator.store.models import Contributor

    with coordinator(tmp_path / "hub") as live:
        org = live.machine("a", "admin")
        path = "/coldmerge.v1.Admin/ListContributors"
        assert _call(org.channel, path) == ""
        with live.store.database.write() as session:
            session.get_one(Contributor, "a").role = "auditor"
        assert _call(org.channel, path) == "auth.wrong_role"
