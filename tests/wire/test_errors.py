"""Errors cross the wire whole."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from coldmerge.core.errors import (
    KINDS,
    ColdmergeError,
    ConflictError,
    UnavailableError,
)
from coldmerge.wire.errors import MAX_DETAIL_BYTES, from_rpc_error, to_status


class Failed(grpc.RpcError):
    """What a failed call looks like to a client."""

    def __init__(self, code: grpc.StatusCode, details: str | None, metadata: Any) -> None:
        super().__init__()
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_comes_back_as_itself(kind: str) -> None:
    sent = KINDS[kind]("a.b", "It failed.", hint="Do this.", expected=1, got="x", round="r")
    code, details, metadata = to_status(sent)
    assert code.name == sent.grpc_status
    assert details == "It failed. [a.b]"
    received = from_rpc_error(Failed(code, details, metadata))
    assert type(received) is type(sent)
    assert received.as_dict() == sent.as_dict()


def test_an_error_of_any_size_fits_the_metadata() -> None:
    ids = {f"id{index}": "é" * 5000 for index in range(50)}
    sent = ConflictError("a.b", "m" * 9000, hint="h" * 9000, expected="e" * 9000, got="g", **ids)
    _, details, metadata = to_status(sent)
    assert len(details) <= 1024
    assert sum(len(raw) for _, raw in metadata) <= MAX_DETAIL_BYTES


@pytest.mark.parametrize("raw", [b"\xff\xff", b"", b"\x0a\x03Foo"])
def test_details_that_cannot_be_read_fall_back_to_the_status(raw: bytes) -> None:
    metadata = (("coldmerge-error-bin", raw),)
    found = from_rpc_error(Failed(grpc.StatusCode.NOT_FOUND, "gone", metadata))
    assert (found.code, found.got) == ("wire.failed", "gone")


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_becomes_one_of_ours(code: grpc.StatusCode) -> None:
    found = from_rpc_error(Failed(code, None, None))
    assert isinstance(found, ColdmergeError)
    assert found.hint


def test_hanging_up_hints_at_the_certificate() -> None:
    found = from_rpc_error(Failed(grpc.StatusCode.UNAVAILABLE, "Socket closed", ()))
    assert isinstance(found, UnavailableError)
    assert "certificate" in found.hint
