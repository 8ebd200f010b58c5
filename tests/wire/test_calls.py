"""Calls that end: bounded patience, and causes that are kept."""

from __future__ import annotations

import socket
import time

import pytest

from coldmerge.core.errors import ConflictError, UnavailableError
from coldmerge.wire.calls import call, client_stream, server_stream, with_patience
from coldmerge.wire.channel import local_channel, secure_channel
from coldmerge.wire.v1 import contributions_pb2, contributions_pb2_grpc, models_pb2, models_pb2_grpc


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_there_ends_within_the_patience() -> None:
    told: list[float] = []
    with secure_channel(f"127.0.0.1:{_free_port()}", b"") as channel:
        stub = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
        started = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            call(
                stub.ListModels,
                models_pb2.ListModelsRequest(),
                patience=1.5,
                on_retry=lambda _error, delay: told.append(delay),
            )
        assert time.monotonic() - started < 5
    assert caught.value.code == "wire.unreachable"
    assert told


def test_a_socket_nobody_serves(tmp_path_factory: pytest.TempPathFactory) -> None:
    with local_channel(tmp_path_factory.mktemp("s") / "admin.sock") as channel:
        stub = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(UnavailableError):
            call(stub.ListModels, models_pb2.ListModelsRequest(), patience=0)
        with pytest.raises(UnavailableError):
            list(server_stream(stub.ReadBlob, models_pb2.ReadBlobRequest(), deadline=5))


def test_a_stream_to_nobody() -> None:
    with secure_channel(f"127.0.0.1:{_free_port()}", b"") as channel:
        stub = contributions_pb2_grpc.ContributionsStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(UnavailableError):
            client_stream(stub.Write, [contributions_pb2.WriteRequest()], deadline=5)


def test_only_unavailability_is_tried_again() -> None:
    attempts: list[int] = []

    def refused() -> None:
        attempts.append(1)
        raise ConflictError("a.b", "No.", hint="Stop.")

    with pytest.raises(ConflictError):
        with_patience(refused, patience=5)
    assert len(attempts) == 1


def test_what_comes_back_in_time_is_taken() -> None:
    attempts: list[int] = []

    def second_time_lucky() -> str:
        attempts.append(1)
        if len(attempts) < 2:
            raise UnavailableError("a.b", "Away.", hint="Wait.")
        return "here"

    assert with_patience(second_time_lucky, patience=10) == "here"
