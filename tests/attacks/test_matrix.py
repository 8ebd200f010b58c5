"""Every (caller, method, owner) of the wire contract, called once on a live coordinator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from coldmerge.wire.errors import from_rpc_error
from coldmerge.wire.version import call_metadata
from coldmerge_coordinator.auth import ALLOWED
from coldmerge_coordinator.config import Limits
from tests.attacks.matrix import (
    CALLERS,
    OPEN,
    ROLES,
    RULES,
    expected,
    pairs,
    size,
)
from tests.attacks.parties import METHODS, World
from tests.harness import coordinator


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("matrix") / "hub"
    with coordinator(folder, limits=Limits(enrolments_per_minute=10_000)) as live:
        yield World(live)


def _answer(channel: Any, method: str, requests: list[Any]) -> str:
    """The code of our error, `handshake` when there was no connection, "" for success."""
    about = METHODS[method]
    shape = ["unary", "stream"]
    kind = f"{shape[about.client_streaming]}_{shape[about.server_streaming]}"
    multi = getattr(channel, kind)(
        f"/{about.full_name.rpartition('.')[0]}/{about.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(about.output_type).FromString,
    )
    sent = iter(requests) if about.client_streaming else requests[0]
    try:
        found = multi(sent, timeout=20, metadata=call_metadata())
        if about.server_streaming:
            next(iter(found), None)
            found.cancel()
    except grpc.RpcError as error:
        code = from_rpc_error(error).code
        return "handshake" if code == "wire.unreachable" else code
    return ""


def test_the_table_has_every_method_of_every_proto() -> None:
    assert set(METHODS) == set(RULES) | set(OPEN), "a method without a row may not be called"
    codes = {f"/coldmerge.v1.{name}": rule.roles for name, rule in RULES.items()}
    assert codes == ALLOWED


def test_size() -> None:
    print(f"\nauthorization matrix: {size()}")
    assert len(list(pairs())) == len(set(pairs())) > 1000


@pytest.mark.parametrize("caller", CALLERS)
def test_every_pair(world: World, caller: str) -> None:
    wrong = []
    answers: Counter[str] = Counter()
    for who, method, owner in pairs():
        if who != caller:
            continue
        with world.channel(caller) as channel:
            found = _answer(channel, method, world.requests(caller, method, owner))
        answers[found] += 1
        wanted = expected(caller, method, owner)
        denied = found.startswith(("auth.", "wire.")) or found == "handshake"
        if found != wanted if wanted is not None else denied:
            wrong.append(f"{method} on {owner}: {found or 'let in'}, not {wanted}")
    print(f"\n{caller}: {dict(answers.most_common())}")
    assert not wrong, "\n".join(wrong)


def test_an_unknown_method_is_for_nobody(world: World) -> None:
    for caller in ROLES:
        with world.channel(caller) as channel:
            unknown = channel.unary_unary("/coldmerge.v1.Admin/Everything")
            with pytest.raises(grpc.RpcError) as caught:
                unknown(b"", timeout=10, metadata=call_metadata())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
