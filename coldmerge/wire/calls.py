"""Calling a coordinator: a deadline on every call, our errors, bounded honest retries."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import grpc
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_before_delay,
    wait_random_exponential,
)

from coldmerge.core.errors import UnavailableError
from coldmerge.wire.errors import from_rpc_error
from coldmerge.wire.version import call_metadata

DEADLINE = 30.0
PATIENCE = 60.0

Request = TypeVar("Request")
OnRetry = Callable[[UnavailableError, float], None]


def call(
    method: Callable[..., Any],
    request: object,
    *,
    deadline: float = DEADLINE,
    patience: float = PATIENCE,
    on_retry: OnRetry | None = None,
) -> Any:
    """Call a unary method; retry while the coordinator is away, at most `patience` seconds.

    Use `patience=0` for calls that must not run twice.

    Args:
        method: a stub's unary-unary method.
        request: its message.
        deadline: seconds one attempt may take.
        patience: seconds after which the last UnavailableError is raised.
        on_retry: told the error and the seconds until the next attempt.

    Raises:
        ColdmergeError: what the coordinator answered, or UnavailableError.
    """

    def attempt() -> Any:
        try:
            return method(request, timeout=deadline, metadata=call_metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    return with_patience(attempt, patience=patience, on_retry=on_retry)


def with_patience(
    attempt: Callable[[], Any], *, patience: float = PATIENCE, on_retry: OnRetry | None = None
) -> Any:
    """Run `attempt`, again and again while it raises UnavailableError, until patience ends."""

    def announce(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if on_retry is not None and isinstance(error, UnavailableError):
            on_retry(error, state.upcoming_sleep)

    retrying = Retrying(
        retry=retry_if_exception_type(UnavailableError),
        wait=wait_random_exponential(multiplier=0.2, max=5.0),
        stop=stop_before_delay(patience),
        before_sleep=announce,
        reraise=True,
    )
    return retrying(attempt)


def server_stream(
    method: Callable[..., Any], request: object, *, deadline: float | None = None
) -> Generator[Any, None, None]:
    """Iterate over a server stream. No retries: the caller knows where to go on.

    Closing the iterator cancels the call.

    Raises:
        ColdmergeError: what the coordinator answered, or UnavailableError.
    """
    stream = method(request, timeout=deadline, metadata=call_metadata())
    try:
        yield from stream
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    finally:
        stream.cancel()


def client_stream(
    method: Callable[..., Any], requests: Iterable[Request], *, deadline: float | None = None
) -> Any:
    """Send a stream of messages and take the one answer.

    An exception inside `requests` is raised as it is: gRPC alone would turn it into
    `UNKNOWN: Exception iterating requests!`.

    Raises:
        ColdmergeError: what the coordinator answered, or UnavailableError.
    """
    failure: list[Exception] = []

    def guarded() -> Iterator[Request]:
        try:
            yield from requests
        except Exception as error:
            failure.append(error)
            raise

    try:
        return method(guarded(), timeout=deadline, metadata=call_metadata())
    except grpc.RpcError as error:
        if failure:
            raise failure[0] from error
        raise from_rpc_error(error) from error
